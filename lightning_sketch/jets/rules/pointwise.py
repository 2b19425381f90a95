"""Functions of one variable: each states the Taylor coefficients ``f_m = f^(m)(x_0) / m!`` at the primal; composition is shared.

The coefficients of ``f`` at ``x_0`` are real and common to all directions, so that a function costs no more than its powers of
the inner series. They come from the differential equation of ``f`` (Griewank & Walther, *Evaluating Derivatives*, chapter 13).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.series import compose
from lightning_sketch.jets.tensor import JetTensor, jet

aten = torch.ops.aten

# (x_0, highest order) -> [f_0, ..., f_order]
Taylor = Callable[[Tensor, int], list[Tensor]]


def exp_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``f_m = exp(x) / m!``."""
    f = [x.exp()]
    for m in range(1, order + 1):
        f.append(f[-1] / m)
    return f


def log_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``f_m = (-1)^(m-1) / (m x^m)``."""
    inverse = x.reciprocal()
    f, power = [x.log()], torch.ones_like(x)
    for m in range(1, order + 1):
        power = power * inverse
        f.append(power * ((-1) ** (m - 1) / m))
    return f


def log1p_taylor(x: Tensor, order: int) -> list[Tensor]:
    """The logarithm at ``1 + x``."""
    return [x.log1p(), *log_taylor(1 + x, order)[1:]]


def expm1_taylor(x: Tensor, order: int) -> list[Tensor]:
    """The exponential less one."""
    return [x.expm1(), *exp_taylor(x, order)[1:]]


def power_taylor(x: Tensor, order: int, exponent: float) -> list[Tensor]:
    """``f_m = binom(p, m) x^(p-m)``; where ``x = 0`` and a derivative is infinite, the series there is identically zero.

    A second moment or a norm is exactly zero only where everything it was made of is zero, for every ``z``; then so is its root.
    """
    f, binomial = [x.pow(exponent)], 1.0
    for m in range(1, order + 1):
        binomial *= (exponent - m + 1) / m
        if binomial == 0:
            f.append(torch.zeros_like(x))
            continue
        term = x.pow(exponent - m) * binomial
        f.append(torch.where(x == 0, 0.0, term) if exponent < m and exponent > 0 else term)
    return f


def sin_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``f_m`` from ``sin, cos, -sin, -cos`` in turn."""
    s, c = x.sin(), x.cos()
    return [[s, c, -s, -c][m % 4] / math.factorial(m) for m in range(order + 1)]


def cos_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``f_m`` from ``cos, -sin, -cos, sin`` in turn."""
    s, c = x.sin(), x.cos()
    return [[c, -s, -c, s][m % 4] / math.factorial(m) for m in range(order + 1)]


def _riccati(f0: Tensor, order: int, linear: float) -> list[Tensor]:
    """``y' = c_0 + linear y - y^2`` with ``c_0 = 1 - linear``: ``(m+1) y_{m+1} = c_0 [m=0] + linear y_m - sum_i y_i y_{m-i}``."""
    f = [f0]
    for m in range(order):
        total = linear * f[m] if linear else torch.zeros_like(f0)
        if m == 0 and not linear:
            total = total + 1
        for i in range(m + 1):
            total = total - f[i] * f[m - i]
        f.append(total / (m + 1))
    return f


def tanh_taylor(x: Tensor, order: int) -> list[Tensor]:
    """From ``y' = 1 - y^2``."""
    return _riccati(x.tanh(), order, 0.0)


def sigmoid_taylor(x: Tensor, order: int) -> list[Tensor]:
    """From ``y' = y - y^2``."""
    return _riccati(x.sigmoid(), order, 1.0)


def softplus_taylor(x: Tensor, order: int) -> list[Tensor]:
    """From ``y' = sigmoid(x)``: ``f_m = s_{m-1} / m``."""
    s = sigmoid_taylor(x, max(order - 1, 0))
    return [torch.nn.functional.softplus(x), *(s[m - 1] / m for m in range(1, order + 1))]


def log_sigmoid_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``log sigmoid(x) = -softplus(-x)``."""
    return [-f * (-1) ** m for m, f in enumerate(softplus_taylor(-x, order))]


def normal_cdf_taylor(x: Tensor, order: int) -> list[Tensor]:
    """Standard normal distribution function, from ``phi' = -x phi``: ``(m+1) phi_{m+1} = -(x phi_m + phi_{m-1})``."""
    density = [torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)]
    for m in range(order - 1):
        below = density[m - 1] if m else 0.0
        density.append(-(x * density[m] + below) / (m + 1))
    return [torch.special.ndtr(x), *(density[m - 1] / m for m in range(1, order + 1))]


def erf_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``erf(x) = 2 Phi(sqrt(2) x) - 1``."""
    root = math.sqrt(2)
    cdf = normal_cdf_taylor(x * root, order)
    return [x.erf(), *(2 * root**m * cdf[m] for m in range(1, order + 1))]


def _times_x(x: Tensor, g: list[Tensor]) -> list[Tensor]:
    """``f = x g``: ``f_m = x g_m + g_{m-1}``."""
    return [x * g[0], *(x * g[m] + g[m - 1] for m in range(1, len(g)))]


def gelu_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``x Phi(x)``."""
    return _times_x(x, normal_cdf_taylor(x, order))


def gelu_tanh_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``x sigmoid(2 u)``, ``u = sqrt(2/pi) (x + 0.044715 x^3)``: the inner cubic composed with the sigmoid."""
    c, a = 2 * math.sqrt(2 / math.pi), 0.044715
    inner = [c * (1 + 3 * a * x * x), 3 * c * a * x, torch.full_like(x, c * a)]
    inner += [torch.zeros_like(x)] * max(0, order - 3)
    outer = sigmoid_taylor(c * (x + a * x**3), order)
    if order == 0:
        return _times_x(x, outer)
    h = torch.stack(inner[:order])[:, None, None]
    return _times_x(x, [outer[0], *compose(h, outer)[:, 0, 0]])


def silu_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``x sigmoid(x)``."""
    return _times_x(x, sigmoid_taylor(x, order))


def _piecewise_linear(slope: Tensor, value: Tensor, order: int) -> list[Tensor]:
    return [value, slope, *([torch.zeros_like(slope)] * (order - 1))]


def apply(x: JetTensor, taylor: Taylor, primal: Tensor | None = None) -> JetTensor:
    """``y = f(x)``."""
    f = taylor(x.primal, x.lead[0])
    return jet(f[0] if primal is None else primal, compose(x.coefficients, f), x.lead)


def apply_derivative(x: JetTensor, taylor: Taylor) -> JetTensor:
    """``y = f'(x)``, whose Taylor coefficients are ``(m+1) f_{m+1}``."""

    def derivative(x0: Tensor, order: int) -> list[Tensor]:
        f = taylor(x0, order + 1)
        return [(m + 1) * f[m + 1] for m in range(order + 1)]

    if x.block is None:
        return jet(derivative(x.primal, 0)[0], None, x.lead)
    return apply(x, derivative)


def _unary(op: Any, taylor: Taylor) -> None:
    @jet_rule(op)
    def unary_rule(x: JetTensor) -> JetTensor:
        return apply(x, taylor, op(x.primal))


for _op, _taylor in (
    (aten.exp.default, exp_taylor),
    (aten.expm1.default, expm1_taylor),
    (aten.log.default, log_taylor),
    (aten.log1p.default, log1p_taylor),
    (aten.sin.default, sin_taylor),
    (aten.cos.default, cos_taylor),
    (aten.tanh.default, tanh_taylor),
    (aten.sigmoid.default, sigmoid_taylor),
    (aten.erf.default, erf_taylor),
    (aten.special_ndtr.default, normal_cdf_taylor),
    (aten.silu.default, silu_taylor),
    (aten.sqrt.default, lambda x, order: power_taylor(x, order, 0.5)),
    (aten.rsqrt.default, lambda x, order: power_taylor(x, order, -0.5)),
    (aten.reciprocal.default, lambda x, order: power_taylor(x, order, -1)),
):
    _unary(_op, _taylor)


@jet_rule(aten.pow.Tensor_Scalar)
def pow_scalar(x: JetTensor, exponent: float) -> JetTensor:
    """``y = x^p``; a square is one product."""
    if exponent == 2:
        return x * x
    return apply(x, lambda x0, order: power_taylor(x0, order, exponent))


@jet_rule(aten.pow.Scalar)
def pow_base(base: float, x: JetTensor) -> JetTensor:
    """``y = a^x = exp(x log a)``."""
    rate = math.log(base)
    return apply(x, lambda x0, order: [f * rate**m for m, f in enumerate(exp_taylor(x0 * rate, order))])


@jet_rule(aten.pow.Tensor_Tensor)
def pow_tensor(x: Any, y: Any) -> Any:
    """``x^y = exp(y log x)``, positive bases only unless the exponent is constant and integer."""
    return torch.exp(y * torch.log(x))


@jet_rule(aten.gelu.default)
def gelu(x: JetTensor, *, approximate: str = "none") -> JetTensor:
    """``y = x Phi(x)``, or its tanh form."""
    return apply(x, gelu_taylor if approximate == "none" else gelu_tanh_taylor)


@jet_rule(aten.gelu_backward.default)
def gelu_backward(grad: Any, x: Any, *, approximate: str = "none") -> Any:
    """``grad f'(x)``."""
    return grad * _derivative_of(x, gelu_taylor if approximate == "none" else gelu_tanh_taylor)


@jet_rule(aten.silu_backward.default)
def silu_backward(grad: Any, x: Any) -> Any:
    """``grad f'(x)``."""
    return grad * _derivative_of(x, silu_taylor)


def _derivative_of(x: Any, taylor: Taylor) -> Any:
    return apply_derivative(x, taylor) if type(x) is JetTensor else taylor(x, 1)[1]


@jet_rule(aten.tanh_backward.default)
def tanh_backward(grad: Any, y: Any) -> Any:
    """``grad (1 - y^2)``."""
    return grad * (1 - y * y)


@jet_rule(aten.sigmoid_backward.default)
def sigmoid_backward(grad: Any, y: Any) -> Any:
    """``grad (y - y^2)``."""
    return grad * (y - y * y)


def _softplus(beta: float, threshold: float) -> Taylor:
    def taylor(x: Tensor, order: int) -> list[Tensor]:
        scaled = [f * (beta**m / beta) for m, f in enumerate(softplus_taylor(x * beta, order))]
        line = _piecewise_linear(torch.ones_like(x), x, order)
        return [torch.where(x * beta > threshold, a, b) for a, b in zip(line, scaled, strict=False)]

    return taylor


@jet_rule(aten.softplus.default)
def softplus(x: JetTensor, beta: float = 1, threshold: float = 20) -> JetTensor:
    """``y = log(1 + exp(beta x)) / beta``, linear above the threshold."""
    return apply(x, _softplus(beta, threshold))


@jet_rule(aten.softplus_backward.default)
def softplus_backward(grad: Any, x: Any, beta: float, threshold: float) -> Any:
    """``grad f'(x)``."""
    return grad * _derivative_of(x, _softplus(beta, threshold))


@jet_rule(aten.log_sigmoid_forward.default)
def log_sigmoid_forward(x: JetTensor) -> tuple[JetTensor, Tensor]:
    """``y = -softplus(-x)``; the buffer of the fused kernel is not used by our backward rule."""
    return apply(x, log_sigmoid_taylor), x.primal.new_zeros(0)


@jet_rule(aten.log_sigmoid_backward.default)
def log_sigmoid_backward(grad: Any, x: Any, buffer: Any) -> Any:
    """``grad f'(x)``."""
    return grad * _derivative_of(x, log_sigmoid_taylor)


@jet_rule(aten.relu.default)
def relu(x: JetTensor) -> JetTensor:
    """``max(x, 0)`` on the branch of the primal; slope 0 at 0, as in autograd."""
    return jet(x.primal.relu(), x.coefficients * (x.primal > 0), x.lead)


@jet_rule(aten.threshold_backward.default)
def threshold_backward(grad: Any, x: Any, threshold: float) -> Any:
    """``grad`` where ``x > threshold``."""
    return grad * (x > threshold)


@jet_rule(aten.abs.default)
def abs_rule(x: JetTensor) -> JetTensor:
    """``|x|`` on the branch of the primal; slope 0 at 0."""
    return jet(x.primal.abs(), x.coefficients * x.primal.sign(), x.lead)


def _clamp(x: JetTensor, primal: Tensor, low: Any, high: Any) -> JetTensor:
    inside = torch.ones_like(x.primal, dtype=torch.bool)
    if low is not None:
        inside = inside & (x.primal >= low)
    if high is not None:
        inside = inside & (x.primal <= high)
    return jet(primal, x.coefficients * inside, x.lead)


@jet_rule(aten.clamp.default)
def clamp(x: JetTensor, low: Any = None, high: Any = None) -> JetTensor:
    """Clip to constant bounds; slope 1 on a bound, as in autograd."""
    return _clamp(x, x.primal.clamp(low, high), low, high)


@jet_rule(aten.clamp_min.default)
def clamp_min(x: JetTensor, low: Any) -> JetTensor:
    """Clip from below."""
    return _clamp(x, x.primal.clamp_min(low), low, None)


@jet_rule(aten.clamp_max.default)
def clamp_max(x: JetTensor, high: Any) -> JetTensor:
    """Clip from above."""
    return _clamp(x, x.primal.clamp_max(high), None, high)


@jet_rule(aten.maximum.default)
def maximum(a: Any, b: Any) -> Any:
    """The larger of two; halves where they are equal, as in autograd."""
    return torch.where(a > b, a, b) + (a == b) * ((a - b) / 2)


@jet_rule(aten.minimum.default)
def minimum(a: Any, b: Any) -> Any:
    """The smaller of two; halves where they are equal, as in autograd."""
    return torch.where(a < b, a, b) + (a == b) * ((a - b) / 2)
