"""Functions of one variable: each states the equation that it solves, on which every degree is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.equations import Identity, Series, Statement, evaluate
from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.tensor import JetTensor, block_of, jet

aten = torch.ops.aten


def apply(x: JetTensor, statement: Statement, primal: Tensor | None = None, relative: bool = False) -> JetTensor:
    """``y = f(x)``; ``relative`` as in :func:`evaluate`."""
    y0, block = evaluate(statement, x.primal, x.coefficients, relative)
    return jet(y0 if primal is None else primal, block, x.lead)


def apply_any(x: Any, statement: Statement) -> Any:
    """``f(x)`` of a JetTensor or a tensor."""
    if type(x) is not JetTensor:
        return statement(Identity(x))[0]
    if x.block is None:
        return jet(statement(Identity(x.primal))[0], None, x.lead)
    return apply(x, statement)


def times(grad: Any, x: Any, statement: Statement) -> Any:
    """``grad f(x)``, at degree 1 without the series of ``f(x)``: ``grad_1 f_0 + x_1 grad_0 f_1``."""
    gc, xc = block_of(grad), block_of(x)
    if gc is None or xc is None or x.lead[0] > 1 or gc.shape != xc.shape:
        return grad * apply_any(x, statement)
    y = statement(Identity(x.primal))
    block = torch.addcmul(xc * (grad.primal * y[1]), gc, y[0])
    return jet(grad.primal * y[0], block, x.lead)


def unary(op: Any, statement: Statement, relative: bool = False) -> None:
    """Register a function of one variable; ``relative`` as in :func:`evaluate`."""

    @jet_rule(op)
    def unary_rule(x: JetTensor) -> JetTensor:
        return apply(x, statement, op(x.primal), relative)


def exp(x: Series, value: Tensor | None = None) -> Series:
    """``y' = y x'``, for any constant multiple of the exponential given its value at ``x_0``."""
    return x.solve(x[0].exp() if value is None else value, lambda y: y)


def expm1(x: Series) -> Series:
    """``y' = (y + 1) x'``."""
    return x.solve(x[0].expm1(), lambda y: y + 1)


def log(x: Series) -> Series:
    """``y' = x' / x``."""
    return x.integral(x[0].log(), x.theta() / x)


def log1p(x: Series) -> Series:
    """``y' = x' / (1 + x)``."""
    return x.integral(x[0].log1p(), x.theta() / (1 + x))


def _pair(x: Series, sine: Tensor, cosine: Tensor, sign: float) -> tuple[Series, Series]:
    """``s' = c x'`` and ``c' = sign s x'``."""
    s, c = x.unknown(sine), x.unknown(cosine)
    x.drive(s, c)
    x.drive(c, s * sign)
    return s, c


def sin(x: Series) -> Series:
    """``s' = c x'``, ``c' = -s x'``."""
    return _pair(x, x[0].sin(), x[0].cos(), -1.0)[0]


def cos(x: Series) -> Series:
    """``s' = c x'``, ``c' = -s x'``."""
    return _pair(x, x[0].sin(), x[0].cos(), -1.0)[1]


def sinh(x: Series) -> Series:
    """``s' = c x'``, ``c' = s x'``."""
    return _pair(x, x[0].sinh(), x[0].cosh(), 1.0)[0]


def cosh(x: Series) -> Series:
    """``s' = c x'``, ``c' = s x'``."""
    return _pair(x, x[0].sinh(), x[0].cosh(), 1.0)[1]


def tan(x: Series) -> Series:
    """``y' = (1 + y^2) x'``."""
    return x.solve(x[0].tan(), lambda y: 1 + y * y)


def _inverse(value: Callable[[Tensor], Tensor], divisor: Statement, sign: float = 1.0) -> Statement:
    """``y' = sign x' / divisor(x)``."""
    return lambda x: x.integral(value(x[0]), x.theta() * sign / divisor(x))


asin = _inverse(torch.asin, lambda x: (1 - x * x).sqrt())
acos = _inverse(torch.acos, lambda x: (1 - x * x).sqrt(), -1.0)
atan = _inverse(torch.atan, lambda x: 1 + x * x)
asinh = _inverse(torch.asinh, lambda x: (1 + x * x).sqrt())
acosh = _inverse(torch.acosh, lambda x: (x * x - 1).sqrt())
atanh = _inverse(torch.atanh, lambda x: 1 - x * x)

for _op, _statement in (
    (aten.exp.default, exp),
    (aten.exp2.default, lambda x: exp(x * math.log(2))),
    (aten.expm1.default, expm1),
    (aten.log1p.default, log1p),
    (aten.sin.default, sin),
    (aten.cos.default, cos),
    (aten.tan.default, tan),
    (aten.sinh.default, sinh),
    (aten.cosh.default, cosh),
    (aten.asin.default, asin),
    (aten.acos.default, acos),
    (aten.atan.default, atan),
    (aten.asinh.default, asinh),
    (aten.acosh.default, acosh),
    (aten.atanh.default, atanh),
):
    unary(_op, _statement)

for _op, _statement in (
    (aten.log.default, log),
    (aten.log2.default, lambda x: log(x) * (1 / math.log(2))),
    (aten.log10.default, lambda x: log(x) * (1 / math.log(10))),
):
    unary(_op, _statement, relative=True)
