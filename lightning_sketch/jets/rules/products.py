"""Elementwise products and quotients: the Cauchy product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, lead_of
from lightning_sketch.jets.series import add_cauchy, add_square, divide, lift, stretch
from lightning_sketch.jets.tensor import JetTensor, block_of, jet, primal_of

aten = torch.ops.aten


def product_block(a: Any, b: Any, shape: torch.Size, start: Tensor | None = None) -> Tensor:
    """Orders ``1..R`` of ``a b``: ``y_r = a_0 b_r + a_r b_0 + sum_{i=1..r-1} a_i b_{r-i}``, plus those in ``start``."""
    a0, b0, ac, bc = primal_of(a), primal_of(b), block_of(a), block_of(b)
    if ac is None:
        assert bc is not None
        a0, b0, ac, bc = b0, a0, bc, ac
    lifted, n = lift(ac, len(shape)), len(shape)
    first = 2 * b0 if ac is bc else b0
    out = lifted * first if start is None else torch.addcmul(lift(start, n), lifted, first)
    if bc is None:
        return stretch(out, shape)
    if ac is bc:
        add_square(out, lifted)
        return out
    other = lift(bc, n)
    out.addcmul_(other, a0)
    if out.shape[0] > 1:
        add_cauchy(out, lifted, other)
    return out


@jet_rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(a: Any, b: Any) -> JetTensor:
    """``y = a b``."""
    primal = torch.mul(primal_of(a), primal_of(b))
    return jet(primal, product_block(a, b, primal.shape), lead_of((a, b)))


@jet_rule(aten.div.Tensor, aten.div.Scalar)
def div(a: Any, b: Any) -> JetTensor:
    """``y = a / b``, from ``b y = a``."""
    a0, b0, ac, bc = primal_of(a), primal_of(b), block_of(a), block_of(b)
    primal = torch.true_divide(a0, b0)
    n = primal.ndim
    if bc is None:
        assert ac is not None
        block = stretch(lift(ac, n) / b0, primal.shape)
    else:
        block = divide(None if ac is None else lift(ac, n), primal, b0, lift(bc, n), primal.shape)
    return jet(primal, block, lead_of((a, b)))


@jet_rule(aten.addcmul.default)
def addcmul(x: Any, a: Any, b: Any, *, value: float = 1) -> Any:
    """``y = x + value a b``."""
    if value != 1 and a is not b:
        return torch.addcmul(x, a, b * value)
    if value != 1 or (block_of(a) is None and block_of(b) is None):
        return x + a * b * value
    primal = torch.addcmul(primal_of(x), primal_of(a), primal_of(b))
    return jet(primal, product_block(a, b, primal.shape, block_of(x)), lead_of((x, a, b)))


@jet_rule(aten.addcdiv.default)
def addcdiv(x: Any, a: Any, b: Any, *, value: float = 1) -> Any:
    """``y = x + value a / b``."""
    return x + (a / b if value == 1 else a / b * value)


@jet_rule(aten.lerp.Scalar, aten.lerp.Tensor)
def lerp(a: Any, b: Any, weight: Any) -> Any:
    """``y = a + weight (b - a)``."""
    return a + (b - a) * weight
