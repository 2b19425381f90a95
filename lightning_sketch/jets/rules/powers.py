"""Powers and roots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.equations import Series
from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.pointwise import apply, exp, unary
from lightning_sketch.jets.tensor import JetTensor, block_of, jet, primal_of

aten = torch.ops.aten


def natural_power(x: Series, n: int) -> Series:
    """``x^n`` by squaring: no division, so that ``x_0`` may be zero."""
    if n == 0:
        return x.like(torch.ones_like(x[0]), lambda k: None)
    half = natural_power(x, n // 2) if n > 1 else None
    return x if half is None else half * half * x if n % 2 else half * half


def real_power(x: Series, p: Any) -> Series:
    """``x_0^p u^p``, ``u = x / x_0``, ``y' = p y u' / u``; where ``x_0 = 0 < p`` zero, see :meth:`Series.sqrt`."""
    divisor = torch.where(x[0] == 0, 1.0, x[0])
    u = x.like(torch.ones_like(divisor), lambda k: None if x[k] is None else x[k] / divisor)
    return u.solve(u[0], lambda y: y * p / u) * x[0] ** p


def power(x: Series, p: float) -> Series:
    """``x^p`` for a number ``p``."""
    if p == 0.5:
        return x.sqrt()
    if p == -1:
        return 1 / x
    return natural_power(x, int(p)) if p >= 0 and float(p).is_integer() else real_power(x, p)


def power_by_entry(x: Series, p: Tensor, order: int) -> Series:
    """``x^p`` for a tensor ``p``, up to an order; natural powers of zero are products of repeated squares."""
    y = x.like(torch.ones_like(x[0]), lambda k: None)
    square, bits = x, order.bit_length()
    for bit in range(bits):
        square = square * square if bit else square
        y = x.where((p.long() >> bit) % 2 == 1, y * square, y)
    natural = (x[0] == 0) & (p >= 0) & (p == p.floor()) & (p < 2**bits)
    return x.where(natural, y, real_power(x, p))


def exponential(base: Any, y: Series) -> Series:
    """``a^y``: ``theta a^y = a^y log(a) theta y``, zero where ``a = 0`` and ``y >= 0``."""
    value = torch.pow(base, y[0])
    a = torch.as_tensor(base, dtype=value.dtype, device=value.device)
    return exp(y * torch.where((a == 0) & (y[0] >= 0), 0.0, a.log()), value)


unary(aten.sqrt.default, lambda x: power(x, 0.5), relative=True)
unary(aten.rsqrt.default, lambda x: power(x, -0.5), relative=True)
unary(aten.reciprocal.default, lambda x: power(x, -1), relative=True)


@jet_rule(aten.pow.Tensor_Scalar)
def pow_scalar(x: JetTensor, exponent: float) -> Any:
    """``y = x^p``; a square is one product."""
    if exponent == 2:
        return x * x
    natural = exponent >= 0 and float(exponent).is_integer()
    return apply(x, lambda s: power(s, exponent), torch.pow(x.primal, exponent), relative=not natural)


@jet_rule(aten.pow.Scalar)
def pow_base(base: float, x: JetTensor) -> JetTensor:
    """``y = a^x``."""
    return apply(x, lambda s: exponential(base, s))


@jet_rule(aten.pow.Tensor_Tensor)
def pow_tensor(x: Any, y: Any) -> Any:
    """``y = x^p`` elementwise; where both vary, ``exp(y log x)``, which needs positive bases."""
    primal = torch.pow(primal_of(x), primal_of(y))
    if block_of(y) is None:
        base, p = x.to(primal.dtype).expand(primal.shape), primal_of(y).expand(primal.shape)
        return apply(base, lambda s: power_by_entry(s, p, base.lead[0]), primal, relative=True)
    if block_of(x) is None:
        exponent = y.to(primal.dtype).expand(primal.shape)
        return apply(exponent, lambda s: exponential(primal_of(x), s), primal)
    both: Any = torch.exp(y * torch.log(x))
    return jet(primal, block_of(both), both.lead)
