"""Operators whose result does not vary with the weights: comparisons, piecewise constants, factories, random draws."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload

from lightning_sketch.errors import UnsupportedOperatorError
from lightning_sketch.jets.registry import jet_rule, run_constant
from lightning_sketch.jets.tensor import JetTensor

aten = torch.ops.aten

_CONSTANT: list[OpOverload] = [
    # integers and truth values
    *(getattr(getattr(aten, n), kind) for n in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")),
    aten.isnan.default, aten.isinf.default, aten.isposinf.default, aten.isneginf.default, aten.signbit.default,
    aten.logical_not.default, aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default,
    aten.any.default, aten.any.dim, aten.all.default, aten.all.dim, aten.nonzero.default, aten.equal.default,
    aten.argmax.default, aten.argmin.default, aten.count_nonzero.default,
    aten.bucketize.Tensor, aten.searchsorted.Tensor, aten.multinomial.default,
    # piecewise constant: the derivative is zero on the branch that the primal takes
    aten.sign.default, aten.sgn.default, aten.floor.default, aten.ceil.default, aten.round.default,
    aten.round.decimals, aten.trunc.default,
    aten.heaviside.default, aten.angle.default, aten.floor_divide.default, aten.floor_divide.Scalar,
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


@functools.cache
def _warn_of_numbers() -> None:
    warnings.warn(
        "A number was taken out of a value that depends on the weights (`.item()`, `float()`, or a Python condition): "
        "it is treated as constant, so its influence on what follows is not in the Taylor coefficients.",
        stacklevel=2,
    )


_refusal: str | None = None  # why no number may be taken at present


@contextmanager
def refuse_numbers(message: str) -> Iterator[None]:
    """Within, taking a number out of a value that varies is an error and not a warning.

    Raises:
        UnsupportedOperatorError: with ``message``, by what takes one.
    """
    global _refusal
    before, _refusal = _refusal, message
    try:
        yield
    finally:
        _refusal = before


@jet_rule(aten._local_scalar_dense.default)
def local_scalar_dense(x: JetTensor) -> Any:
    """``.item()``: the primal's number, constant; said once in a process."""
    if _refusal is not None:
        raise UnsupportedOperatorError(_refusal)
    _warn_of_numbers()
    return x.primal.item()


for _op in _CONSTANT:
    _make(_op)
