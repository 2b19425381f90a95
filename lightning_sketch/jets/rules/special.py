"""Special functions, from their differential equations or known derivatives, and functions of two variables."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.pointwise import Taylor, apply, product_taylor, unary
from lightning_sketch.jets.tensor import JetTensor, block_of, jet, primal_of

aten = torch.ops.aten


def _polygamma(n: int, x: Tensor) -> Tensor:
    return torch.special.digamma(x) if n == 0 else torch.special.polygamma(n, x)


def polygamma_taylor(n: int) -> Taylor:
    """``psi_n^(m) = psi_{n+m}``, ``psi_0`` the digamma function."""
    return lambda x, order: [_polygamma(n + m, x) / math.factorial(m) for m in range(order + 1)]


def lgamma_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``f' = psi_0``."""
    return [x.lgamma(), *(_polygamma(m - 1, x) / math.factorial(m) for m in range(1, order + 1))]


def _inverse_error(value: Any, factor: float, rate: float) -> Taylor:
    """``f' = factor exp(rate f^2)``: an inverse error function or normal quantile."""

    def taylor(x: Tensor, order: int) -> list[Tensor]:
        f = [value(x)]
        slope = [factor * torch.exp(rate * f[0] * f[0])]
        for m in range(1, order + 1):
            f.append(slope[m - 1] / m)
            square = product_taylor(f, f)
            # s = exp(u), from s' = u' s: m s_m = sum_{j=1..m} j u_j s_{m-j}
            total = sum((j * rate * square[j] * slope[m - j] for j in range(1, m + 1)), torch.zeros_like(x))
            slope.append(total / m)
        return f

    return taylor


def erfcx_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``exp(x^2) erfc(x)``, from ``f' = 2 x f - 2 / sqrt(pi)``."""
    f = [torch.special.erfcx(x)]
    for m in range(order):
        below = f[m - 1] if m else -1 / math.sqrt(math.pi)
        f.append(2 * (x * f[m] + below) / (m + 1))
    return f


def log_ndtr_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``log Phi(x)``: ``f' = h``, the inverse Mills ratio, for which ``h' = -h (x + h)``."""
    h = [math.sqrt(2 / math.pi) / torch.special.erfcx(-x / math.sqrt(2))]
    for m in range(order - 1):
        below = h[m - 1] if m else torch.zeros_like(x)
        h.append(-(x * h[m] + below + product_taylor(h, h)[m]) / (m + 1))
    return [torch.special.log_ndtr(x), *(h[m - 1] / m for m in range(1, order + 1))]


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
    sign = x.sign()
    return product_taylor([(-sign) ** m / math.factorial(m) for m in range(len(f))], f)


for _op, _taylor in (
    (aten.i0.default, i0_taylor),
    (aten.special_i1.default, lambda x, order: _slope(i0_taylor(x, order + 1))),
    (aten.special_i0e.default, lambda x, order: _damped(x, _scaled_bessel_taylor(x, order))),
    (aten.special_i1e.default, lambda x, order: _damped(x, _slope(_scaled_bessel_taylor(x, order + 1)))),
    (aten.lgamma.default, lgamma_taylor),
    (aten.digamma.default, polygamma_taylor(0)),
    (aten.erfinv.default, _inverse_error(torch.erfinv, math.sqrt(math.pi) / 2, 1)),
    (aten.special_ndtri.default, _inverse_error(torch.special.ndtri, math.sqrt(2 * math.pi), 0.5)),
    (aten.special_erfcx.default, erfcx_taylor),
    (aten.special_log_ndtr.default, log_ndtr_taylor),
):
    unary(_op, _taylor)


@jet_rule(aten.polygamma.default)
def polygamma(n: int, x: JetTensor) -> JetTensor:
    """The derivatives of the digamma function."""
    return apply(x, polygamma_taylor(n))


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
