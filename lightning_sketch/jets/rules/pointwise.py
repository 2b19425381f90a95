"""Functions of one variable: each states its Taylor coefficients ``f_m = f^(m)(x_0) / m!``; composition is shared.

The coefficients of ``f`` at ``x_0`` are real and common to all directions, so a function costs no more than the
powers of the inner series. They come from the differential equation of ``f`` (Griewank & Walther, *Evaluating
Derivatives*, ch. 13).
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


def derivative_of(x: Any, taylor: Taylor) -> Any:
    """``f'(x)`` of a JetTensor or a tensor."""
    return apply_derivative(x, taylor) if type(x) is JetTensor else taylor(x, 1)[1]


def unary(op: Any, taylor: Taylor) -> None:
    """Register a function of one variable."""

    @jet_rule(op)
    def unary_rule(x: JetTensor) -> JetTensor:
        return apply(x, taylor, op(x.primal))


def product_taylor(f: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    """``(f g)_m = sum_i f_i g_{m-i}``."""
    return [sum((f[i] * g[m - i] for i in range(m + 1)), torch.zeros_like(f[0])) for m in range(len(f))]


def quotient_taylor(f: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    """``q = f / g``, from ``g q = f``: ``q_m = (f_m - sum_{i=1..m} g_i q_{m-i}) / g_0``."""
    q: list[Tensor] = []
    for m in range(len(f)):
        q.append((f[m] - sum((g[i] * q[m - i] for i in range(1, m + 1)), torch.zeros_like(f[0]))) / g[0])
    return q


def integral_taylor(f0: Tensor, slope: list[Tensor]) -> list[Tensor]:
    """``f' = g``: ``f_m = g_{m-1} / m``."""
    return [f0, *(g / (m + 1) for m, g in enumerate(slope))]


def polynomial_taylor(x: Tensor, order: int, *coefficients: float) -> list[Tensor]:
    """``c_0 + c_1 x + c_2 x^2 + ...``: ``f_m = sum_j binom(j, m) c_j x^(j-m)``."""
    f = []
    for m in range(order + 1):
        terms = (math.comb(j, m) * c * x ** (j - m) for j, c in enumerate(coefficients) if j >= m and c)
        f.append(sum(terms, torch.zeros_like(x)))
    return f


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


def sin_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``f_m`` from ``sin, cos, -sin, -cos`` in turn."""
    s, c = x.sin(), x.cos()
    return [[s, c, -s, -c][m % 4] / math.factorial(m) for m in range(order + 1)]


def cos_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``f_m`` from ``cos, -sin, -cos, sin`` in turn."""
    s, c = x.sin(), x.cos()
    return [[c, -s, -c, s][m % 4] / math.factorial(m) for m in range(order + 1)]


def sinh_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``f_m`` from ``sinh, cosh`` in turn."""
    s, c = x.sinh(), x.cosh()
    return [[s, c][m % 2] / math.factorial(m) for m in range(order + 1)]


def cosh_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``f_m`` from ``cosh, sinh`` in turn."""
    s, c = x.sinh(), x.cosh()
    return [[c, s][m % 2] / math.factorial(m) for m in range(order + 1)]


def tan_taylor(x: Tensor, order: int) -> list[Tensor]:
    """``sin / cos``."""
    return quotient_taylor(sin_taylor(x, order), cos_taylor(x, order))


def _scaled(taylor: Taylor, rate: float, factor: float = 1.0) -> Taylor:
    """``factor f(rate x)``."""
    return lambda x, order: [f * (factor * rate**m) for m, f in enumerate(taylor(x * rate, order))]


def _inverse(value: Callable[[Tensor], Tensor], exponent: float, *squares: float) -> Taylor:
    """A function with derivative ``(c_0 + c_1 x + c_2 x^2)^exponent``, given its value."""

    def taylor(x: Tensor, order: int) -> list[Tensor]:
        inner = polynomial_taylor(x, max(order - 1, 0), *squares)
        # y = u^p, from u y' = p u' y: m u_0 y_m = sum_{j=1..m} (p j - (m - j)) u_j y_{m-j}
        slope = [inner[0] ** exponent]
        for m in range(1, order):
            total = sum(((exponent * j - (m - j)) * inner[j] * slope[m - j] for j in range(1, m + 1)), inner[0] * 0)
            slope.append(total / (m * inner[0]))
        return integral_taylor(value(x), slope)[: order + 1]

    return taylor


for _op, _taylor in (
    (aten.exp.default, exp_taylor),
    (aten.exp2.default, _scaled(exp_taylor, math.log(2))),
    (aten.expm1.default, expm1_taylor),
    (aten.log.default, log_taylor),
    (aten.log2.default, _scaled(log_taylor, 1, 1 / math.log(2))),
    (aten.log10.default, _scaled(log_taylor, 1, 1 / math.log(10))),
    (aten.log1p.default, log1p_taylor),
    (aten.sin.default, sin_taylor),
    (aten.cos.default, cos_taylor),
    (aten.tan.default, tan_taylor),
    (aten.sinh.default, sinh_taylor),
    (aten.cosh.default, cosh_taylor),
    (aten.asin.default, _inverse(torch.asin, -0.5, 1, 0, -1)),
    (aten.acos.default, lambda x, order: [-f for f in _inverse(lambda u: -torch.acos(u), -0.5, 1, 0, -1)(x, order)]),
    (aten.atan.default, _inverse(torch.atan, -1, 1, 0, 1)),
    (aten.asinh.default, _inverse(torch.asinh, -0.5, 1, 0, 1)),
    (aten.acosh.default, _inverse(torch.acosh, -0.5, -1, 0, 1)),
    (aten.atanh.default, _inverse(torch.atanh, -1, 1, 0, -1)),
):
    unary(_op, _taylor)
