"""Special functions, and functions of two variables.

Bessel and polygamma functions state their Taylor coefficients ``f_m = f^(m)(x_0) / m!``, because their equations divide
by ``x``, which may be zero, or do not exist. They are composed by Horner's scheme at every degree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.equations import Series, Statement
from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.pointwise import unary
from lightning_sketch.jets.series import compose
from lightning_sketch.jets.tensor import JetTensor, block_of, jet, primal_of

aten = torch.ops.aten

# (x_0, highest order) -> [f_0, ..., f_order]
Taylor = Callable[[Tensor, int], list[Tensor]]


def apply_taylor(x: JetTensor, taylor: Taylor) -> JetTensor:
    """``y = f(x)`` by Horner's scheme."""
    f = taylor(x.primal, x.lead[0])
    return jet(f[0], compose(x.coefficients, f), x.lead)


def _polygamma(n: int, x: Tensor) -> Tensor:
    return torch.special.digamma(x) if n == 0 else torch.special.polygamma(n, x)


def polygamma_taylor(n: int) -> Taylor:
    """``psi_n^(m) = psi_{n+m}``, ``psi_0`` the digamma function."""
    return lambda x, order: [_polygamma(n + m, x) / math.factorial(m) for m in range(order + 1)]


def lgamma_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``f' = psi_0``."""
    return [x.lgamma(), *(_polygamma(m - 1, x) / math.factorial(m) for m in range(1, order + 1))]


def _inverse_error(value: Any, factor: float, rate: float) -> Statement:
    """``y' = s x'``, ``s = factor exp(rate y^2)``, ``s' = 2 rate y y' s``: an inverse error function or a quantile."""

    def statement(x: Series) -> Series:
        y = x.unknown(value(x[0]))
        slope = x.unknown(factor * torch.exp(rate * y[0] * y[0]))
        change = slope * x.theta()
        y.integrate(change)
        slope.integrate(y * slope * change * (2.0 * rate))
        return y

    return statement


def erfcx(x: Series) -> Series:
    """``exp(x^2) erfc(x)``: ``y' = (2 x y - 2 / sqrt(pi)) x'``."""
    return x.solve(torch.special.erfcx(x[0]), lambda y: (x * y - 1 / math.sqrt(math.pi)) * 2.0)


def log_ndtr(x: Series) -> Series:
    """``log Phi(x)``: ``y' = h x'``, the inverse Mills ratio, for which ``h' = -h (x + h) x'``."""
    mills = x.solve(
        math.sqrt(2 / math.pi) / torch.special.erfcx(-x[0] / math.sqrt(2)),
        lambda h: -(h * (x + h)),
    )
    return x.solve(torch.special.log_ndtr(x[0]), lambda y: mills)


def _scaled_bessel_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``exp(-|x_0|) I_0``: the mean of ``cos(t)^m exp(x cos t - |x|) / m!`` over the circle; far out the recurrence.

    The mean over 64 points is exact to rounding up to ``|x| = 50``. Beyond, ``x I'' + I' - x I = 0`` gives
    ``(m+2)(m+1) x f_{m+2} = x f_m + f_{m-1} - (m+1)^2 f_{m+1}``, which is stable there.
    """
    size = x.abs()
    near = [torch.zeros_like(x) for _ in range(order + 1)]
    for j in range(33):
        cosine = math.cos(2 * math.pi * j / 64)
        term = torch.exp(x * cosine - size) * ((1 if j in (0, 32) else 2) / 64)
        for m in range(order + 1):
            near[m] += term
            term = term * (cosine / (m + 1))
    far = [torch.special.i0e(x), torch.special.i1e(x)][: order + 1]
    for m in range(order - 1):
        below = far[m - 1] if m else torch.zeros_like(x)
        far.append((far[m] + (below - (m + 1) ** 2 * far[m + 1]) / x) / ((m + 2) * (m + 1)))
    return [torch.where(size < 50, a, b) for a, b in zip(near, far, strict=True)]


def i0_taylor(x: Tensor, order: int) -> list[Tensor]:
    """The modified Bessel function of order zero."""
    scale = x.abs().exp()
    return [f * scale for f in _scaled_bessel_taylor(x, order)]


def _slope(f: list[Tensor]) -> list[Tensor]:
    return [(m + 1) * f[m + 1] for m in range(len(f) - 1)]


def _damped(x: Tensor, f: list[Tensor]) -> list[Tensor]:
    """``exp(|x_0| - |x|)`` times a series, on the branch of the primal."""
    e = [(-x.sign()) ** m / math.factorial(m) for m in range(len(f))]
    return [sum((e[i] * f[m - i] for i in range(m + 1)), torch.zeros_like(x)) for m in range(len(f))]


def _from_taylor(op: Any, taylor: Taylor) -> None:
    """Register a function of one variable that is composed by Horner's scheme."""

    @jet_rule(op)
    def taylor_rule(x: JetTensor) -> JetTensor:
        return apply_taylor(x, taylor)


for _op, _taylor in (
    (aten.i0.default, i0_taylor),
    (aten.special_i1.default, lambda x, order: _slope(i0_taylor(x, order + 1))),
    (aten.special_i0e.default, lambda x, order: _damped(x, _scaled_bessel_taylor(x, order))),
    (aten.special_i1e.default, lambda x, order: _damped(x, _slope(_scaled_bessel_taylor(x, order + 1)))),
    (aten.lgamma.default, lgamma_taylor),
    (aten.digamma.default, polygamma_taylor(0)),
):
    _from_taylor(_op, _taylor)

for _op, _statement in (
    (aten.erfinv.default, _inverse_error(torch.erfinv, math.sqrt(math.pi) / 2, 1)),
    (aten.special_ndtri.default, _inverse_error(torch.special.ndtri, math.sqrt(2 * math.pi), 0.5)),
    (aten.special_erfcx.default, erfcx),
    (aten.special_log_ndtr.default, log_ndtr),
):
    unary(_op, _statement)


@jet_rule(aten.polygamma.default)
def polygamma(n: int, x: JetTensor) -> JetTensor:
    """The derivatives of the digamma function."""
    return apply_taylor(x, polygamma_taylor(n))


@jet_rule(aten.hypot.default)
def hypot(a: Any, b: Any) -> Any:
    """``sqrt(a^2 + b^2)``."""
    return (a * a + b * b).sqrt()


@jet_rule(aten.atan2.default)
def atan2(y: Any, x: Any) -> JetTensor:
    """The angle of ``(x, y)``: that of the primal plus that of the point turned back by it, which is near zero."""
    x0, y0 = primal_of(x), primal_of(y)
    turned: Any = torch.atan((y * x0 - x * y0) / (x * x0 + y * y0))
    return jet(torch.atan2(y0, x0), block_of(turned), turned.lead)
