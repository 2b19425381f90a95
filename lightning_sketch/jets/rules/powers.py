"""Powers and roots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.pointwise import apply, unary
from lightning_sketch.jets.tensor import JetTensor, block_of, jet, primal_of

aten = torch.ops.aten


def power_taylor(x: Tensor, order: int, exponent: Any) -> list[Tensor]:
    """``f_m = binom(p, m) x^(p-m)``; where ``x = 0`` and a derivative is infinite, the series is taken to be zero.

    A second moment or a norm is exactly zero only where everything it was made of is zero, for every ``z``; then so is
    its root. The exponent is a number or a tensor.
    """
    p = torch.as_tensor(exponent, dtype=x.dtype, device=x.device)
    f, binomial = [torch.pow(x, exponent)], torch.ones_like(p)
    for m in range(1, order + 1):
        binomial = binomial * (p - m + 1) / m
        vanishes = (binomial == 0) | ((x == 0) & (p > 0) & (p < m))
        f.append(torch.where(vanishes, 0.0, torch.pow(x, p - m) * binomial))
    return f


def exponential_taylor(base: Any, y: Tensor, order: int) -> list[Tensor]:
    """``a^y``: ``f_m = a^y (log a)^m / m!``, zero where ``a = 0`` and ``y >= 0``."""
    value = torch.pow(base, y)
    a = torch.as_tensor(base, dtype=value.dtype, device=value.device)
    rate = torch.where((a == 0) & (y >= 0), 0.0, a.log())
    f = [value]
    for m in range(1, order + 1):
        f.append(f[-1] * rate / m)
    return f


unary(aten.sqrt.default, lambda x, order: power_taylor(x, order, 0.5))
unary(aten.rsqrt.default, lambda x, order: power_taylor(x, order, -0.5))
unary(aten.reciprocal.default, lambda x, order: power_taylor(x, order, -1))


@jet_rule(aten.pow.Tensor_Scalar)
def pow_scalar(x: JetTensor, exponent: float) -> Any:
    """``y = x^p``; a square is one product."""
    if exponent == 2:
        return x * x
    return apply(x, lambda x0, order: power_taylor(x0, order, exponent))


@jet_rule(aten.pow.Scalar)
def pow_base(base: float, x: JetTensor) -> JetTensor:
    """``y = a^x``."""
    return apply(x, lambda x0, order: exponential_taylor(base, x0, order))


@jet_rule(aten.pow.Tensor_Tensor)
def pow_tensor(x: Any, y: Any) -> Any:
    """``y = x^p`` elementwise; where both vary, ``exp(y log x)``, which needs positive bases."""
    if block_of(y) is None:
        shape = torch.broadcast_shapes(x.shape, y.shape)
        return apply(x.expand(shape), lambda x0, order: power_taylor(x0, order, primal_of(y)))
    if block_of(x) is None:
        shape = torch.broadcast_shapes(x.shape, y.shape)
        return apply(y.expand(shape), lambda y0, order: exponential_taylor(primal_of(x), y0, order))
    both: Any = torch.exp(y * torch.log(x))
    return jet(torch.pow(x.primal, y.primal), block_of(both), both.lead)
