"""Operators that choose entries by their size: piecewise linear, with the choice that the primal makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.linalg import of_primal
from lightning_sketch.jets.rules.views import from_end
from lightning_sketch.jets.tensor import JetTensor, jet, primal_of

aten = torch.ops.aten


def _selection(op: Any) -> None:
    """Register an operator that returns values and their indices along a dimension ``dim``, which it may drop."""
    position, argument = next((i, a) for i, a in enumerate(op._schema.arguments) if a.name == "dim")

    @jet_rule(op)
    def selection_rule(x: JetTensor, *args: Any, **kwargs: Any) -> tuple[JetTensor, Tensor]:
        values, indices = op(x.primal, *args, **kwargs)
        if not x.ndim:
            return jet(values, x.coefficients.clone(), x.lead), indices
        positional = not argument.kwarg_only and len(args) >= position
        dim = args[position - 1] if positional else kwargs.get("dim", argument.default_value)
        index = indices if indices.ndim == x.ndim else indices.unsqueeze(dim)
        block = x.coefficients.gather(from_end(dim, x.ndim), index.expand(*x.lead, *index.shape))
        return jet(values, block.reshape(*x.lead, *values.shape), x.lead), indices


for _op in (
    aten.max.dim,
    aten.min.dim,
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
    aten.kthvalue.default,
    aten.mode.default,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.cummax.default,
    aten.cummin.default,
):
    _selection(_op)


@jet_rule(aten.masked_select.default)
def masked_select(x: Any, mask: Tensor) -> Any:
    """The entries where the mask is set, in a vector."""
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    return x.expand(shape)[mask.expand(shape)]


@jet_rule(aten.masked_scatter.default)
def masked_scatter(x: Any, mask: Tensor, source: Any) -> Any:
    """Write the first entries of ``source`` where the mask is set."""
    primal = torch.masked_scatter(primal_of(x), mask, primal_of(source))
    if not source.numel():
        return x.expand(primal.shape).clone()
    where = mask.expand(primal.shape)
    taken = source.reshape(-1)[_count_before(where).clamp(max=source.numel() - 1)]
    return of_primal(primal, torch.where(where, taken, x))


@jet_rule(aten.masked_scatter_backward.default)
def masked_scatter_backward(grad: Any, mask: Tensor, sizes: Sequence[int]) -> Any:
    """The gradient of the source: the entries where the mask is set, then zeros."""
    size, where = math.prod(sizes), mask.expand(grad.shape)
    room = torch.zeros(size + 1, dtype=grad.dtype, device=grad.device)  # the last entry takes what is not set
    place = torch.where(where, _count_before(where).clamp(max=size), size)
    return torch.scatter(room, 0, place.reshape(-1), grad.reshape(-1))[:-1].view(*sizes)


def _count_before(where: Tensor) -> Tensor:
    """How many entries are set before each; nothing is read back."""
    return (where.reshape(-1).cumsum(0) - where.reshape(-1).long()).view(where.shape)
