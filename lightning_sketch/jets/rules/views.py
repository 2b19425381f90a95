"""Views: the same view of the coefficients' trailing dimensions, in the same storage, so that aliasing is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.tensor import JetTensor, is_arranged, wrap

aten = torch.ops.aten


def _view(x: JetTensor, primal: Tensor, block: Tensor) -> JetTensor:
    assert is_arranged(block, primal), "a view of arranged coefficients is arranged"
    assert block.shape[3:] == primal.shape, "the same view of both"
    return wrap(primal, [block], x.lead)


def from_end(dim: int, ndim: int) -> int:
    """Count a dimension from the end, where primal and coefficients agree."""
    return dim - ndim if dim >= 0 else dim


@jet_rule(aten.alias.default, aten.detach.default, aten.lift_fresh.default)
def alias(x: JetTensor) -> JetTensor:
    """The whole tensor again: shares the cell, so that coefficients allocated later are shared too."""
    return wrap(x.primal, x._cell, x.lead)


@jet_rule(aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default)
def view(x: JetTensor, size: Sequence[int], stride: Sequence[int] | None = None) -> JetTensor:
    """Reshape without copying."""
    primal = x.primal.view(size)
    return _view(x, primal, x.coefficients.view(*x.lead, *primal.shape))


@jet_rule(aten.expand.default)
def expand(x: JetTensor, size: Sequence[int], *, implicit: bool = False) -> JetTensor:
    """Repeat without copying."""
    primal = x.primal.expand(size)
    block = x.coefficients
    for _ in range(primal.ndim - x.ndim):
        block = block.unsqueeze(3)
    return _view(x, primal, block.expand(*x.lead, *primal.shape))


@jet_rule(aten.permute.default)
def permute(x: JetTensor, dims: Sequence[int]) -> JetTensor:
    """Reorder dimensions."""
    return _view(x, aten.permute(x.primal, dims), x.coefficients.permute(0, 1, 2, *(d % x.ndim + 3 for d in dims)))


@jet_rule(aten.t.default)
def t(x: JetTensor) -> JetTensor:
    """Transpose a matrix; vectors are returned as they are."""
    return _view(x, x.primal.t(), x.coefficients.mT if x.ndim == 2 else x.coefficients)


@jet_rule(aten.as_strided.default)
def as_strided(
    x: JetTensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> JetTensor:
    """Any strided view: strides and offset scaled by the common factor between coefficient and primal strides."""
    offset = x.primal.storage_offset() if storage_offset is None else storage_offset
    primal = x.primal.as_strided(size, stride, offset)
    block = x.coefficients
    pairs = zip(x.primal.shape, block.stride()[3:], x.primal.stride(), strict=True)
    factor = next((mine // other for n, mine, other in pairs if n > 1 and other > 0), 1)
    start = block.storage_offset() + factor * (offset - x.primal.storage_offset())
    strides = (*block.stride()[:3], *(factor * s for s in stride))
    return _view(x, primal, block.as_strided((*x.lead, *size), strides, start))


def _by_dim(op: Any, *positions: int, added: int = 0) -> None:
    """Register views whose dimension arguments (at ``positions``) only need to be counted from the end."""

    @jet_rule(op)
    def dim_view(x: JetTensor, *args: Any, **kwargs: Any) -> Any:
        arguments = _with_defaults(op, args, kwargs)
        primal = op(x.primal, *arguments)
        for p in positions:
            d = arguments[p]
            ndim = max(x.ndim + added, 1)
            arguments[p] = [from_end(i, ndim) for i in d] if isinstance(d, (list, tuple)) else from_end(d, ndim)
        if not x.ndim:  # a number counts as a vector of one entry
            block = op(x.coefficients if added else x.coefficients.unsqueeze(-1), *arguments)
            return _view(x, primal, block.view(*x.lead, *primal.shape))
        block = op(x.coefficients, *arguments)
        if isinstance(primal, (list, tuple)):
            return [_view(x, p, b) for p, b in zip(primal, block, strict=True)]
        return _view(x, primal, block)


def _with_defaults(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    rest = op._schema.arguments[1:]
    return [args[i] if i < len(args) else kwargs.get(a.name, a.default_value) for i, a in enumerate(rest)]


_by_dim(aten.transpose.int, 0, 1)
_by_dim(aten.select.int, 0)
_by_dim(aten.slice.Tensor, 0)
_by_dim(aten.unsqueeze.default, 0, added=1)
_by_dim(aten.squeeze.dim, 0)
_by_dim(aten.squeeze.dims, 0)
_by_dim(aten.diagonal.default, 1, 2)
_by_dim(aten.unfold.default, 0)
_by_dim(aten.split.Tensor, 1)
_by_dim(aten.split_with_sizes.default, 1)
_by_dim(aten.unbind.int, 0)


@jet_rule(aten.squeeze.default)
def squeeze(x: JetTensor) -> JetTensor:
    """Drop every dimension of size one."""
    primal = x.primal.squeeze()
    dims = [d - x.ndim for d, n in enumerate(x.shape) if n == 1]
    return _view(x, primal, x.coefficients.squeeze(dims) if dims else x.coefficients)
