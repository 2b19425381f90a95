"""Reading and writing by index: embeddings, gather, scatter, advanced indexing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, lead_of
from lightning_sketch.jets.rules.views import from_end
from lightning_sketch.jets.series import spread
from lightning_sketch.jets.tensor import JetTensor, block_of, jet, primal_of

aten = torch.ops.aten


@jet_rule(aten.embedding.default)
def embedding(
    weight: JetTensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> JetTensor:
    """Rows of a table."""
    primal = aten.embedding(weight.primal, indices)
    block = weight.coefficients.index_select(3, indices.reshape(-1))
    return jet(primal, block.view(*weight.lead, *primal.shape), weight.lead)


@jet_rule(aten.embedding_dense_backward.default)
def embedding_dense_backward(
    grad: JetTensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> JetTensor:
    """Sum of the gradients of each row's uses."""
    primal = aten.embedding_dense_backward(grad.primal, indices, num_weights, padding_idx, scale_grad_by_freq)
    flat, width = indices.reshape(-1), grad.shape[-1]
    rows = grad.coefficients.reshape(*grad.lead, flat.numel(), width)
    if padding_idx >= 0:
        rows = rows * (flat != padding_idx).unsqueeze(1)
    if scale_grad_by_freq:
        uses = flat.new_zeros(num_weights).index_add(0, flat, torch.ones_like(flat))  # `bincount` reads back
        rows = rows / uses[flat].unsqueeze(1)
    block = rows.new_zeros(*grad.lead, num_weights, width).index_add_(3, flat, rows)
    return jet(primal, block, grad.lead)


@jet_rule(aten.gather.default)
def gather(x: JetTensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> JetTensor:
    """Entries at ``index`` along a dimension."""
    primal = x.primal.gather(dim, index)
    if not x.ndim:
        return jet(primal, spread(x.coefficients, primal.shape), x.lead)
    return jet(primal, x.coefficients.gather(from_end(dim, x.ndim), index.expand(*x.lead, *index.shape)), x.lead)


def _scatter(x: Any, dim: int, index: Tensor, source: Any, add: bool) -> Any:
    if not x.ndim:
        return _scatter(x.view(1), 0, index.view(-1), source.view(-1), add).view(())
    if source.ndim == 0 and index.ndim:
        source = source.view(1)
    lead = lead_of((x, source))
    op = torch.scatter_add if add else torch.scatter
    primal = op(primal_of(x), dim, index, primal_of(source))
    zeros = primal.new_zeros(()).expand
    xc, sc = block_of(x), block_of(source)
    into = zeros(*lead, *primal.shape) if xc is None else xc
    values = zeros(*lead, *source.shape) if sc is None else sc
    return jet(primal, op(into, from_end(dim, primal.ndim), index.expand(*lead, *index.shape), values), lead)


@jet_rule(aten.scatter_add.default)
def scatter_add(x: Any, dim: int, index: Tensor, source: Any) -> Any:
    """Add at ``index`` along a dimension."""
    return _scatter(x, dim, index, source, add=True)


@jet_rule(aten.scatter.src)
def scatter(x: Any, dim: int, index: Tensor, source: Any) -> Any:
    """Write at ``index`` along a dimension."""
    return _scatter(x, dim, index, source, add=False)


@jet_rule(aten.scatter.value)
def scatter_value(x: JetTensor, dim: int, index: Tensor, value: float) -> Any:
    """Write a constant at ``index`` along a dimension."""
    return _scatter(x, dim, index, torch.full(index.shape, value, dtype=x.dtype, device=x.device), add=False)


def _indices(indices: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return tuple(slice(None) if i is None else primal_of(i) for i in indices)


def _positions(x: Any, indices: Sequence[Tensor | None]) -> Tensor:
    """The flat position in ``x`` of every entry that ``x[indices]`` reads, in the shape of that result."""
    return torch.arange(x.numel(), device=x.device).view(x.shape)[_indices(indices)]


@jet_rule(aten.index.Tensor)
def index(x: JetTensor, indices: Sequence[Tensor | None]) -> JetTensor:
    """Advanced indexing."""
    where = _positions(x, indices)
    block = x.coefficients.flatten(3) if x.ndim else x.coefficients.unsqueeze(3)
    return jet(
        x.primal[_indices(indices)], block.index_select(3, where.reshape(-1)).view(*x.lead, *where.shape), x.lead
    )


@jet_rule(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(x: Any, indices: Sequence[Tensor | None], values: Any, accumulate: bool = False) -> JetTensor:
    """Advanced assignment."""
    lead = lead_of((x, values))
    primal = aten.index_put(primal_of(x), indices, primal_of(values), accumulate)
    where = _positions(x, indices)
    xc, vc = block_of(x), block_of(values)
    out = primal.new_zeros(*lead, *primal.shape) if xc is None else spread(xc, primal.shape).contiguous()
    flat = out.view(*lead, -1)
    source = primal.new_zeros(()).expand(*lead, where.numel()) if vc is None else spread(vc, where.shape).flatten(3)
    if accumulate:
        flat.index_add_(3, where.reshape(-1), source.reshape(*lead, -1))
    else:
        flat[..., where.reshape(-1)] = source.reshape(*lead, -1)
    return jet(primal, out, lead)


@jet_rule(aten.take.default)
def take(x: Any, index: Tensor) -> Any:
    """Entries by position in the flattened tensor."""
    place = torch.where(index < 0, index + x.numel(), index)
    return x.reshape(-1).index_select(0, place.reshape(-1)).view(index.shape)


@jet_rule(aten.put.default)
def put(x: Any, index: Tensor, source: Any, accumulate: bool = False) -> Any:
    """Assignment by position in the flattened tensor."""
    flat = torch.index_put(x.reshape(-1), (index.reshape(-1),), source.reshape(-1), accumulate)
    return flat.reshape(x.shape)


@jet_rule(aten.index_add.default)
def index_add(x: Any, dim: int, index: Tensor, source: Any, *, alpha: float = 1) -> Any:
    """Add rows at ``index``."""
    if not x.ndim:
        return index_add(x.view(1), 0, index.view(-1), source.view(-1), alpha=alpha).view(())
    lead = lead_of((x, source))
    primal = torch.index_add(primal_of(x), dim, index, primal_of(source), alpha=alpha)
    xc, sc = block_of(x), block_of(source)
    out = primal.new_zeros(*lead, *primal.shape) if xc is None else spread(xc, primal.shape)
    if sc is not None:
        out.index_add_(from_end(dim, primal.ndim), index.view(-1), sc if source.ndim else sc.unsqueeze(-1), alpha=alpha)
    return jet(primal, out, lead)
