"""Embedding bags, and the renormalisation of embedding rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, missing_rule, write_back
from lightning_sketch.jets.rules.linalg import of_primal
from lightning_sketch.jets.tensor import primal_of

aten = torch.ops.aten

SUM, MEAN, MAX = range(3)


def _bags(indices: Tensor, offsets: Tensor) -> Tensor:
    """The bag of every index; an empty bag starts where the next one does."""
    return torch.searchsorted(offsets, torch.arange(len(indices), device=offsets.device), right=True) - 1


def _sizes(bags: Tensor, kept: Tensor, count: int) -> Tensor:
    """How many indices are in every bag, as a column; nothing is read back."""
    return bags.new_zeros(count).index_add(0, bags, kept.to(bags.dtype)).unsqueeze(1)


def _forward(op: Any) -> None:
    """Register one of the two operators, which differ in what they keep for autograd."""

    @jet_rule(op)
    def embedding_bag(
        weight: Any, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False, mode: int = SUM,
        sparse: bool = False, per_sample_weights: Any = None, include_last_offset: bool = False, padding_idx: int = -1,
    ) -> tuple[Any, Tensor, Tensor, Tensor]:  # fmt: skip
        primal, *kept = op(
            primal_of(weight), indices, offsets, scale_grad_by_freq, mode, sparse, primal_of(per_sample_weights),
            include_last_offset, padding_idx,
        )  # fmt: skip
        starts = offsets[:-1] if include_last_offset else offsets
        y = _pooled(weight, indices, starts, mode, per_sample_weights, padding_idx, kept[-1])
        return of_primal(primal, y), kept[0], kept[1], kept[2]


def _pooled(
    weight: Any, indices: Tensor, starts: Tensor, mode: int, per_sample_weights: Any, padding_idx: int, maxima: Tensor
) -> Any:
    """Sums, means or maxima of the rows in every bag, without those of the padding."""
    bags = _bags(indices, starts)
    sizes = _sizes(bags, indices != padding_idx, len(starts))
    if mode == MAX:
        return torch.where(sizes > 0, weight.gather(0, maxima.long().clamp(min=0)), 0.0)
    rows = weight[indices]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(1)
    rows = torch.where((indices != padding_idx).unsqueeze(1), rows, 0.0)
    y = torch.index_add(rows.new_zeros(len(starts), weight.shape[1]), 0, bags, rows)
    return y / sizes.clamp(min=1) if mode == MEAN else y


_forward(aten._embedding_bag.default)
_forward(aten._embedding_bag_forward_only.default)


@jet_rule(aten._embedding_bag_backward.default)
def embedding_bag_adjoint(
    grad: Any, indices: Tensor, offsets: Tensor, offset2bag: Tensor, bag_size: Tensor, max_indices: Tensor,
    num_weights: int, scale_grad_by_freq: bool, mode: int, sparse: bool, per_sample_weights: Any, padding_idx: int = -1,
) -> Any:  # fmt: skip
    """The gradient of the weights; fused kernels keep no bags."""
    if sparse:
        raise missing_rule(aten._embedding_bag_backward.default)
    bags = offset2bag if len(offset2bag) else _bags(indices, offsets)
    return embedding_bag_backward(
        grad, indices, bags, bag_size, max_indices, num_weights, scale_grad_by_freq, mode, per_sample_weights,
        padding_idx,
    )  # fmt: skip


@jet_rule(aten._embedding_bag_dense_backward.default)
def embedding_bag_backward(
    grad: Any, indices: Tensor, offset2bag: Tensor, bag_size: Tensor, max_indices: Tensor, num_weights: int,
    scale_grad_by_freq: bool, mode: int, per_sample_weights: Any, padding_idx: int = -1,
) -> Any:  # fmt: skip
    """Sum of the gradients of each row's uses."""
    if scale_grad_by_freq:  # the CPU kernel of torch 2.13 divides by the counts of other rows
        raise missing_rule(aten._embedding_bag_dense_backward.default)
    bags, kept = offset2bag.long(), indices != padding_idx
    sizes = _sizes(bags, kept, len(grad))
    zeros = torch.zeros(num_weights, grad.shape[1], dtype=grad.dtype, device=grad.device)
    if mode == MAX:
        return torch.scatter_add(zeros, 0, max_indices.long().clamp(min=0), torch.where(sizes > 0, grad, 0.0))
    rows = (grad / sizes.clamp(min=1) if mode == MEAN else grad)[bags]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(1)
    return torch.index_add(zeros, 0, indices, torch.where(kept.unsqueeze(1), rows, 0.0))


@jet_rule(aten._embedding_bag_per_sample_weights_backward.default)
def per_sample_weights_backward(
    grad: Any, weight: Any, indices: Tensor, offsets: Tensor, offset2bag: Tensor, mode: int, padding_idx: int = -1
) -> Any:
    """``grad . row``, zero for the padding."""
    bags = offset2bag.long() if len(offset2bag) else _bags(indices, offsets)
    return torch.where(indices != padding_idx, (grad[bags] * weight[indices]).sum(1), 0.0)


@jet_rule(aten.embedding_renorm_.default)
def embedding_renorm_(weight: Any, indices: Tensor, max_norm: float, norm_type: float) -> Any:
    """Shrink the rows in use whose norm exceeds the maximum."""
    used = indices.unique()
    rows = weight[used]
    norms = torch.linalg.vector_norm(rows, norm_type, 1, True)
    shrunk = torch.where(primal_of(norms) > max_norm, rows * (max_norm / (norms + 1e-7)), rows)
    return write_back(aten.embedding_renorm_.default, weight, torch.index_put(weight, (used,), shrunk))
