"""Smooth activations, the normal distribution function, and the adjoints that autograd calls by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.pointwise import Taylor, apply, derivative_of, polynomial_taylor, unary
from lightning_sketch.jets.series import compose
from lightning_sketch.jets.tensor import JetTensor

aten = torch.ops.aten


def _riccati(f0: Tensor, order: int, linear: float) -> list[Tensor]:
    """``y' = c + linear y - y^2``, ``c = 1 - linear``: ``(m+1) y_{m+1} = c [m=0] + linear y_m - sum_i y_i y_{m-i}``."""
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


def erfc_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``erfc(x) = 1 - erf(x)``."""
    return [x.erfc(), *(-f for f in erf_taylor(x, order)[1:])]


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


for _op, _taylor in (
    (aten.tanh.default, tanh_taylor),
    (aten.sigmoid.default, sigmoid_taylor),
    (aten.erf.default, erf_taylor),
    (aten.erfc.default, erfc_taylor),
    (aten.silu.default, silu_taylor),
):
    unary(_op, _taylor)


@jet_rule(aten.gelu.default)
def gelu(x: JetTensor, *, approximate: str = "none") -> JetTensor:
    """``y = x Phi(x)``, or its tanh form."""
    return apply(x, gelu_taylor if approximate == "none" else gelu_tanh_taylor)


@jet_rule(aten.gelu_backward.default)
def gelu_backward(grad: Any, x: Any, *, approximate: str = "none") -> Any:
    """``grad f'(x)``."""
    return grad * derivative_of(x, gelu_taylor if approximate == "none" else gelu_tanh_taylor)


@jet_rule(aten.silu_backward.default)
def silu_backward(grad: Any, x: Any) -> Any:
    """``grad f'(x)``."""
    return grad * derivative_of(x, silu_taylor)


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
        line = polynomial_taylor(x, order, 0, 1)
        return [torch.where(x * beta > threshold, a, b) for a, b in zip(line, scaled, strict=False)]

    return taylor


@jet_rule(aten.softplus.default)
def softplus(x: JetTensor, beta: float = 1, threshold: float = 20) -> JetTensor:
    """``y = log(1 + exp(beta x)) / beta``, linear above the threshold."""
    return apply(x, _softplus(beta, threshold))


@jet_rule(aten.softplus_backward.default)
def softplus_backward(grad: Any, x: Any, beta: float, threshold: float) -> Any:
    """``grad f'(x)``."""
    return grad * derivative_of(x, _softplus(beta, threshold))


@jet_rule(aten.log_sigmoid_forward.default)
def log_sigmoid_forward(x: JetTensor) -> tuple[JetTensor, Tensor]:
    """``y = -softplus(-x)``; the buffer of the fused kernel is not used by our backward rule."""
    return apply(x, log_sigmoid_taylor), x.primal.new_zeros(0)


@jet_rule(aten.log_sigmoid_backward.default)
def log_sigmoid_backward(grad: Any, x: Any, buffer: Any) -> Any:
    """``grad f'(x)``."""
    return grad * derivative_of(x, log_sigmoid_taylor)
