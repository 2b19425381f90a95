"""In-place operators: coefficients are written into the target's storage, never rebound, so that aliases see it."""

from __future__ import annotations

from typing import Any

import torch

from lightning_sketch.jets.registry import jet_rule, varies, write_back, write_block
from lightning_sketch.jets.series import lift
from lightning_sketch.jets.tensor import JetTensor, block_of, primal_of

aten = torch.ops.aten


@jet_rule(aten.copy_.default)
def copy_(target: Any, source: Any, non_blocking: bool = False) -> Any:
    """Overwrite with another tensor."""
    varies((target, source))  # checks that they agree
    if type(target) is not JetTensor:
        return write_back(aten.copy_.default, target, source)
    target.primal.copy_(primal_of(source))
    block = block_of(source)
    write_block(target, None if block is None else lift(block, target.ndim), fresh=False)
    return target


def _overwrite(op: Any) -> None:
    """Register an operator that replaces every entry by a constant or a random draw."""

    @jet_rule(op)
    def overwrite_rule(target: Any, *args: Any, **kwargs: Any) -> Any:
        op(primal_of(target), *(primal_of(a) for a in args), **kwargs)
        if type(target) is JetTensor:
            write_block(target, None, fresh=True)
        return target


for _op in (
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.bernoulli_.float,
    aten.bernoulli_.Tensor,
    aten.normal_.default,
    aten.uniform_.default,
    aten.exponential_.default,
    aten.random_.default,
    aten.random_.to,
    getattr(aten.random_, "from"),
    aten.cauchy_.default,
    aten.log_normal_.default,
    aten.geometric_.default,
):
    _overwrite(_op)


@jet_rule(aten.fill_.Tensor)
def fill_(target: Any, value: Any) -> Any:
    """Overwrite with one value, which may vary."""
    return copy_(target, value)


def _scale(op: Any) -> None:
    """Register ``mul_`` and ``div_``: by a constant in place, otherwise through the product rule."""
    functional = aten.mul.Tensor if op is aten.mul_.Tensor else aten.div.Tensor

    @jet_rule(op)
    def scale_rule(target: Any, factor: Any) -> Any:
        if type(target) is not JetTensor or varies((factor,)):
            return write_back(op, target, functional(target, factor))
        value = primal_of(factor)
        op(target.primal, value)
        if target.block is not None:
            op(target.block, value)
        return target


_scale(aten.mul_.Tensor)
_scale(aten.div_.Tensor)


def _shift(op: Any) -> None:
    """Register ``add_`` and ``sub_``: linear, so both parts are updated where they lie."""
    functional = aten.add.Tensor if op is aten.add_.Tensor else aten.sub.Tensor

    @jet_rule(op)
    def shift_rule(target: Any, other: Any, alpha: Any = 1) -> Any:
        varies((target, other))  # checks that they agree
        if type(target) is not JetTensor:
            return write_back(op, target, functional(target, other, alpha=alpha))
        op(target.primal, primal_of(other), alpha=alpha)
        block = block_of(other)
        if block is not None:
            op(target.coefficients, lift(block, target.ndim), alpha=alpha)
        return target


_shift(aten.add_.Tensor)
_shift(aten.sub_.Tensor)
