"""Reductions into given places: sums, means, products and extrema by index or by segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.linalg import of_primal
from lightning_sketch.jets.tensor import primal_of

aten = torch.ops.aten


@jet_rule(aten.scatter_reduce.two)
def scatter_reduce(x: Any, dim: int, index: Tensor, source: Any, reduce: str, *, include_self: bool = True) -> Any:
    """Reduce at ``index`` along a dimension; equal extrema share, as in autograd."""
    primal = torch.scatter_reduce(primal_of(x), dim, index, primal_of(source), reduce=reduce, include_self=include_self)
    if not x.ndim:
        y = scatter_reduce(x.view(1), 0, index.view(-1), source.view(-1), reduce, include_self=include_self).view(())
        return of_primal(primal, y)
    source = source[tuple(slice(n) for n in index.shape)]
    ones = torch.ones(index.shape, dtype=x.dtype, device=x.device)
    own = torch.ones(x.shape, dtype=x.dtype, device=x.device)
    if reduce in ("sum", "mean"):
        total = torch.scatter_add(x if include_self else x.scatter(dim, index, 0.0), dim, index, source)
        if reduce == "mean":
            counts = own if include_self else own.scatter(dim, index, 0.0)
            total = total / counts.scatter_add(dim, index, ones).clamp(min=1)
        return of_primal(primal, total)
    if reduce == "prod":
        return of_primal(primal, _products_at(x if include_self else x.scatter(dim, index, 1.0), dim, index, source))
    # where nothing is written, the entry itself is the extremum
    chosen = (primal_of(x) == primal).to(x.dtype)
    chosen = chosen if include_self else chosen.scatter(dim, index, 0.0)
    winners = (primal_of(source) == primal.gather(dim, index)).to(x.dtype)
    total = torch.scatter_add(x * chosen, dim, index, source * winners)
    return of_primal(primal, total / torch.scatter_add(chosen, dim, index, winners))


def _products_at(x: Any, dim: int, index: Tensor, source: Any) -> Any:
    """Multiply into each place: factors sorted by place, then products over 2, 4, 8 ... neighbours of one place."""
    count = index.numel()
    places = torch.arange(x.numel(), device=x.device).view(x.shape).gather(dim, index).reshape(-1)
    order = torch.argsort(places, stable=True)
    places, products = places[order], source.reshape(-1)[order]
    ahead = torch.arange(count, device=x.device) - torch.searchsorted(places, places)
    span = 1
    while span < count:
        products = torch.where(ahead >= span, products * products.roll(span), products)
        span *= 2
    last = torch.searchsorted(places, places, right=True) - 1 == torch.arange(count, device=x.device)
    room = torch.ones(x.numel() + 1, dtype=x.dtype, device=x.device)  # the last entry takes what is not the last
    total: Any = torch.scatter(room, 0, torch.where(last, places, x.numel()), products)
    return x * total[:-1].view(x.shape)


@jet_rule(aten.index_reduce.default)
def index_reduce(x: Any, dim: int, index: Tensor, source: Any, reduce: str, *, include_self: bool = True) -> Any:
    """Reduce rows at ``index``."""
    primal = torch.index_reduce(primal_of(x), dim, index, primal_of(source), reduce, include_self=include_self)
    if not x.ndim:
        y = index_reduce(x.view(1), 0, index.view(-1), source.view(-1), reduce, include_self=include_self).view(())
        return of_primal(primal, y)
    shape = [1] * x.ndim
    shape[dim] = -1
    where = index.reshape(shape).expand(source.shape)
    return of_primal(primal, scatter_reduce(x, dim, where, source, reduce, include_self=include_self))


@jet_rule(aten.scatter.reduce)
def scatter_with(x: Any, dim: int, index: Tensor, source: Any, *, reduce: str) -> Any:
    """Add or multiply at ``index`` along a dimension."""
    return scatter_reduce(x, dim, index, source, {"add": "sum", "multiply": "prod"}[reduce])


@jet_rule(aten.scatter.value_reduce)
def scatter_value_with(x: Any, dim: int, index: Tensor, value: float, *, reduce: str) -> Any:
    """Add or multiply one number at ``index`` along a dimension."""
    source = torch.full(index.shape, value, dtype=x.dtype, device=x.device)
    return scatter_with(x, dim, index, source, reduce=reduce)


@jet_rule(aten.segment_reduce.default)
def segment_reduce(
    data: Any, reduce: str, *, lengths: Any = None, indices: Any = None, offsets: Any = None, axis: int = 0,
    unsafe: bool = False, initial: Any = None,
) -> Any:  # fmt: skip
    """Reduce consecutive entries along a dimension; what lies behind the last segment is dropped."""
    primal = aten.segment_reduce(
        primal_of(data), reduce, lengths=lengths, indices=indices, offsets=offsets, axis=axis, unsafe=unsafe,
        initial=initial,
    )  # fmt: skip
    lengths = offsets.diff(dim=-1) if lengths is None else lengths
    n, segments = data.shape[axis], lengths.shape[-1]
    entries = torch.arange(n, device=data.device).expand(*lengths.shape[:-1], n).contiguous()
    index = torch.searchsorted(lengths.cumsum(-1), entries, right=True)
    rest = data.shape[lengths.ndim :]
    index = index.reshape(*index.shape, *[1] * len(rest)).expand(data.shape)
    start = {"prod": 1.0, "max": -torch.inf, "min": torch.inf}.get(reduce, 0.0) if initial is None else initial
    base = torch.full((*data.shape[:axis], segments + 1, *rest), start, dtype=data.dtype, device=data.device)
    kind = {"max": "amax", "min": "amin", "mean": "sum"}.get(reduce, reduce)
    y = scatter_reduce(base, axis, index, data, kind).narrow(axis, 0, segments)
    if reduce == "mean":
        y = y / lengths.clamp(min=1).reshape(*lengths.shape, *[1] * len(rest))
    return of_primal(primal, y)
