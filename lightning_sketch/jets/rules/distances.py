"""Distances between all rows of two matrices, or of one."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.linalg import of_primal
from lightning_sketch.jets.tensor import primal_of

aten = torch.ops.aten


def _slopes(grad: Any, gap: Any, p: float, distance: Any) -> Any:
    """The gradient of ``|gap|_p`` over the last dimension, zero at zero, as in autograd."""
    if p == 0:
        return gap * 0
    if p == 1:
        return primal_of(gap).sign() * grad.unsqueeze(-1)
    distance, grad = distance.unsqueeze(-1), grad.unsqueeze(-1)
    if p == math.inf:
        return primal_of(gap).sign() * (primal_of(gap).abs() == primal_of(distance)) * grad
    away = primal_of(distance) != 0
    scale = grad / torch.where(away, distance, 1.0) ** (p - 1)
    size = gap if p == 2 else primal_of(gap).sign() * torch.where(primal_of(gap) == 0, 0.0, gap.abs() ** (p - 1))
    return torch.where(away, size * scale, 0.0)


@jet_rule(aten._cdist_forward.default)
def cdist(a: Any, b: Any, p: float, compute_mode: int | None) -> Any:
    """``|a_i - b_j|_p``."""
    primal = aten._cdist_forward(primal_of(a), primal_of(b), p, compute_mode)
    return of_primal(primal, torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1))


@jet_rule(aten._cdist_backward.default)
def cdist_backward(grad: Any, a: Any, b: Any, p: float, distance: Any) -> Any:
    """The adjoint, for the first matrix."""
    return _slopes(grad, a.unsqueeze(-2) - b.unsqueeze(-3), p, distance).sum(-2)


@jet_rule(aten._pdist_forward.default)
def pdist(x: Any, p: float = 2) -> Any:
    """``|x_i - x_j|_p`` for ``i < j``."""
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return of_primal(aten._pdist_forward(primal_of(x), p), torch.linalg.vector_norm(x[i] - x[j], p, -1))


@jet_rule(aten._pdist_backward.default)
def pdist_backward(grad: Any, x: Any, p: float, distance: Any) -> Any:
    """The adjoint: both rows of a pair move it, in opposite directions."""
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    slopes = _slopes(grad, x[i] - x[j], p, distance)
    zeros = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return torch.index_add(torch.index_add(zeros, 0, i, slopes), 0, j, -slopes)
