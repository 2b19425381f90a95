"""Operators whose result does not vary with the weights: comparisons, piecewise constants, factories, random draws."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from lightning_sketch.jets.registry import jet_rule, run_constant

aten = torch.ops.aten

_CONSTANT: list[OpOverload] = [
    # integers and truth values
    *(getattr(getattr(aten, name), kind) for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")),
    aten.isnan.default, aten.isinf.default, aten.isposinf.default, aten.isneginf.default, aten.signbit.default,
    aten.logical_not.default, aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default,
    aten.any.default, aten.any.dim, aten.all.default, aten.all.dim, aten.nonzero.default, aten.equal.default,
    aten.argmax.default, aten.argmin.default, aten.argsort.default, aten.argsort.stable, aten.count_nonzero.default,
    aten.bucketize.Tensor, aten.searchsorted.Tensor, aten.multinomial.default,
    # piecewise constant: the derivative is zero on the branch that the primal takes
    aten.sign.default, aten.sgn.default, aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default,
    aten.heaviside.default,
    # factories
    aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.new_empty.default, aten.new_empty_strided.default, aten.new_zeros.default, aten.new_ones.default,
    aten.new_full.default, aten.rand_like.default, aten.randn_like.default, aten.bernoulli.default, aten.bernoulli.p,
    aten.is_same_size.default,
]  # fmt: skip


def _make(op: OpOverload) -> None:
    @jet_rule(op)
    def constant_rule(*args: Any, **kwargs: Any) -> Any:
        return run_constant(op, *args, **kwargs)


for _op in _CONSTANT:
    _make(_op)
