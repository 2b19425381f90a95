"""Views: the same view of the coefficients' trailing dimensions, in the same storage, so that aliasing is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.series import lift
from lightning_sketch.jets.tensor import JetTensor, ViewCell, is_arranged, wrap

aten = torch.ops.aten


def _view(x: JetTensor, primal: Tensor, view: Callable[[Tensor], Tensor]) -> JetTensor:
    """Return the view whose primal is given; ``view`` makes that of the coefficients, now or once there are any."""
    if x.block is None:
        return wrap(primal, ViewCell(x, view), x.lead)
    block = view(x.block)
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
    return _view(x, primal, lambda block: block.view(*block.shape[:3], *primal.shape))


@jet_rule(aten.expand.default)
def expand(x: JetTensor, size: Sequence[int], *, implicit: bool = False) -> JetTensor:
    """Repeat without copying."""
    primal = x.primal.expand(size)
    return _view(x, primal, lambda block: lift(block, primal.ndim).expand(*block.shape[:3], *primal.shape))


@jet_rule(aten.permute.default)
def permute(x: JetTensor, dims: Sequence[int]) -> JetTensor:
    """Reorder dimensions."""
    order = (0, 1, 2, *(d % x.ndim + 3 for d in dims))
    return _view(x, aten.permute(x.primal, dims), lambda block: block.permute(order))


@jet_rule(aten.t.default)
def t(x: JetTensor) -> JetTensor:
    """Transpose a matrix; vectors are returned as they are."""
    return _view(x, x.primal.t(), lambda block: block.mT if block.ndim == 5 else block)


@jet_rule(aten.as_strided.default)
def as_strided(
    x: JetTensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> JetTensor:
    """Any strided view: strides and offset scaled by the common factor between coefficient and primal strides."""
    base = x.primal
    offset = base.storage_offset() if storage_offset is None else storage_offset

    def strided(block: Tensor) -> Tensor:
        pairs = zip(base.shape, block.stride()[3:], base.stride(), strict=True)
        factor = next((mine // other for n, mine, other in pairs if n > 1 and other > 0), 1)
        start = block.storage_offset() + factor * (offset - base.storage_offset())
        return block.as_strided((*block.shape[:3], *size), (*block.stride()[:3], *(factor * s for s in stride)), start)

    return _view(x, base.as_strided(size, stride, offset), strided)


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
            shape = (*x.lead, *primal.shape)
            return _view(x, primal, lambda b: op(b if added else b.unsqueeze(-1), *arguments).view(shape))
        if not isinstance(primal, (list, tuple)):
            return _view(x, primal, lambda block: op(block, *arguments))
        blocks = None if x.block is None else op(x.block, *arguments)

        def part(block: Tensor, i: int) -> Tensor:
            return (op(block, *arguments) if blocks is None else blocks)[i]

        return [_view(x, p, functools.partial(part, i=i)) for i, p in enumerate(primal)]


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
    return _view(x, primal, lambda block: block.squeeze(dims) if dims else block)
