"""Pooling and padding: linear once the primal has chosen its maxima; directions are folded into the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, run_constant
from lightning_sketch.jets.tensor import block_of, jet, primal_of

aten = torch.ops.aten


def _folded(op: Any, spatial: int) -> None:
    """Register a linear pooling operator, or its adjoint, whose first argument is the only one that varies linearly."""

    @jet_rule(op)
    def pooling_rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        if block_of(x) is None:  # an adjoint, whose input varies only in what it was applied to
            return run_constant(op, x, *args, **kwargs)
        primals = [primal_of(a) for a in args]
        primal = op(x.primal, *primals, **kwargs)
        block = x.coefficients.reshape(-1, *x.shape[-spatial - 1 :])
        copies = block.shape[0]
        # an adjoint takes the pooled tensor too, only for its shape
        others = [
            a.new_empty(()).expand(copies, *a.shape[-spatial - 1 :]) if isinstance(a, Tensor) else a for a in primals
        ]
        return jet(primal, op(block.contiguous(), *others, **kwargs).view(*x.lead, *primal.shape), x.lead)


for _op, _spatial in (
    (aten.avg_pool2d.default, 2),
    (aten.avg_pool2d_backward.default, 2),
    (aten.avg_pool3d.default, 3),
    (aten.avg_pool3d_backward.default, 3),
    (aten._adaptive_avg_pool2d.default, 2),
    (aten._adaptive_avg_pool2d_backward.default, 2),
    (aten._adaptive_avg_pool3d.default, 3),
    (aten._adaptive_avg_pool3d_backward.default, 3),
    (aten.replication_pad1d_backward.default, 1),
    (aten.replication_pad2d_backward.default, 2),
    (aten.replication_pad3d_backward.default, 3),
):
    _folded(_op, _spatial)


def _maxima(op: Any, spatial: int) -> None:
    """Register a max pooling that returns flat indices into the pooled dimensions."""

    @jet_rule(op)
    def max_pool_rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        if block_of(x) is None:
            return run_constant(op, x, *args, **kwargs)
        primal, indices = op(x.primal, *(primal_of(a) for a in args), **kwargs)
        flat = x.coefficients.flatten(-spatial)
        block = flat.gather(-1, indices.flatten(-spatial).expand(*flat.shape[:-1], -1))
        return jet(primal, block.view(*x.lead, *primal.shape), x.lead), indices


def _maxima_adjoint(op: Any, spatial: int) -> None:
    """Register the adjoint: add every gradient at the index of its maximum."""

    @jet_rule(op)
    def max_pool_adjoint(grad: Any, x: Any, *args: Any) -> Any:
        indices = args[-1]
        out = torch.zeros_like(grad).new_zeros((*x.shape[:-spatial], x.shape[-spatial:].numel()))
        return out.scatter_add(-1, indices.flatten(-spatial), grad.flatten(-spatial)).view(x.shape)


_maxima(aten.max_pool2d_with_indices.default, 2)
_maxima(aten.max_pool3d_with_indices.default, 3)
_maxima(aten.adaptive_max_pool2d.default, 2)
_maxima(aten.adaptive_max_pool3d.default, 3)
_maxima(aten.fractional_max_pool2d.default, 2)
_maxima(aten.fractional_max_pool3d.default, 3)
_maxima_adjoint(aten.max_pool2d_with_indices_backward.default, 2)
_maxima_adjoint(aten.max_pool3d_with_indices_backward.default, 3)
_maxima_adjoint(aten.adaptive_max_pool2d_backward.default, 2)
_maxima_adjoint(aten.adaptive_max_pool3d_backward.default, 3)
_maxima_adjoint(aten.fractional_max_pool2d_backward.default, 2)
_maxima_adjoint(aten.fractional_max_pool3d_backward.default, 3)
