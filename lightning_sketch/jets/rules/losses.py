"""Losses, and adjoints of losses, that decompose wrongly or not at all.

Those of residuals decompose into squares of absolute values, which at a residual of exactly zero lose the second order.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.tensor import primal_of

aten = torch.ops.aten


def _reduce(loss: Any, reduction: int) -> Any:
    return {0: lambda: loss, 1: loss.mean, 2: loss.sum}[reduction]()


@jet_rule(aten.huber_loss.default)
def huber_loss(x: Any, target: Any, reduction: int = 1, delta: float = 1.0) -> Any:
    """``d^2 / 2`` where ``|d| <= delta``, else ``delta (|d| - delta / 2)``."""
    d = x - target
    size = d * primal_of(d).sign()  # the kink at zero is not reached
    return _reduce(torch.where(primal_of(size) <= delta, d * d / 2, delta * (size - delta / 2)), reduction)


@jet_rule(aten.smooth_l1_loss.default)
def smooth_l1_loss(x: Any, target: Any, reduction: int = 1, beta: float = 1.0) -> Any:
    """``d^2 / (2 beta)`` where ``|d| < beta``, else ``|d| - beta / 2``."""
    d = x - target
    if beta == 0:
        return _reduce(d.abs(), reduction)
    size = d * primal_of(d).sign()  # the kink at zero is not reached
    return _reduce(torch.where(primal_of(size) < beta, d * d / (2 * beta), size - beta / 2), reduction)


def _spread(grad: Any, reduction: int, examples: int) -> Any:
    """The gradient of each example's loss, as a column."""
    if reduction == 0:
        return grad.unsqueeze(-1)
    return grad / examples if reduction == 1 else grad


@jet_rule(aten.multi_margin_loss_backward.default)
def multi_margin_loss_backward(
    grad: Any, x: Any, target: Any, p: int, margin: float, weight: Any = None, reduction: int = 1
) -> Any:
    """Slopes of ``w_y max(0, margin - x_y + x_c)^p / C`` over the classes ``c != y``."""
    rows, own = x.reshape(-1, x.shape[-1] if x.ndim else 1), target.reshape(-1, 1)
    gap = margin - rows.gather(1, own) + rows
    active = (gap > 0).scatter(1, own, False)
    slope = torch.where(active, gap * 2 if p == 2 else torch.ones_like(gap), 0.0) / rows.shape[1]
    if weight is not None:
        slope = slope * weight[target].reshape(-1, 1)
    slope = slope.scatter_add(1, own, -slope.sum(1, keepdim=True))
    return (slope * _spread(grad, reduction, len(rows))).reshape(x.shape)


def _margins(x: Any, target: Any) -> tuple[Any, Any, Any]:
    """``1 - x_j + x_i`` for all pairs, how often ``j`` is a target and ``i`` is none, and the targets as 0 and 1.

    The list of targets ends at its first -1.
    """
    classes = x.shape[-1] if x.ndim else 1
    rows, labels = x.reshape(-1, classes), target.reshape(-1, classes)
    valid = (labels >= 0).long().cumprod(1)
    times = torch.zeros_like(labels).scatter_add(1, labels.clamp(min=0), valid)
    return 1 - rows.unsqueeze(2) + rows.unsqueeze(1), times.unsqueeze(2) * (times == 0).unsqueeze(1), times.clamp(max=1)


@jet_rule(aten.multilabel_margin_loss_forward.default)
def multilabel_margin_loss_forward(x: Any, target: Any, reduction: int) -> tuple[Any, Any]:
    """``sum_ij max(0, 1 - x_j + x_i) / C`` over the targets ``j`` and the others ``i``; and the targets as 0 and 1."""
    margins, times, is_target = _margins(x, target)
    loss = (margins * ((primal_of(margins) > 0) * times)).sum((1, 2)) / margins.shape[-1]
    return _reduce(loss if x.ndim == 2 else loss[0], reduction), is_target.to(x.dtype).reshape(target.shape)


@jet_rule(aten.multilabel_margin_loss_backward.default)
def multilabel_margin_loss_backward(grad: Any, x: Any, target: Any, reduction: int, is_target: Any) -> Any:
    """Slopes of the same."""
    margins, times, _ = _margins(primal_of(x), target)
    active = (margins > 0) * times
    slope = (active.sum(1) - active.sum(2)).to(x.dtype) / margins.shape[-1]
    return (_spread(grad, reduction, len(slope)) * slope).reshape(x.shape)
