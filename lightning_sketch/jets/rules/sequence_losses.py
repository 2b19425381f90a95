"""Connectionist temporal classification, and the cross entropy of a linear layer."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, missing_rule
from lightning_sketch.jets.rules.linalg import of_primal, refused
from lightning_sketch.jets.tensor import primal_of

aten = torch.ops.aten

IMPOSSIBLE = -1e30  # a logarithm of zero whose multiples stay finite, so that its coefficients do


class _Lattice:
    """Which labels, between blanks, every example may emit: ``(N, S)``, ``S = 2 max(length) + 1`` as in the table."""

    def __init__(
        self, device: torch.device, targets: Tensor, input_lengths: Any, target_lengths: Any, blank: int, states: int
    ) -> None:
        self.steps = torch.as_tensor(input_lengths, device=device).long()
        self.lengths = torch.as_tensor(target_lengths, device=device).long()
        place = torch.arange(states // 2, device=device)
        if targets.ndim == 2:
            own = targets[:, : states // 2]
        else:  # one after the other
            starts = (self.lengths.cumsum(0) - self.lengths).unsqueeze(1)
            own = targets[(starts + place).clamp(max=len(targets) - 1)]
        self.labels = torch.full((len(self.lengths), states), blank, device=device)
        if states > 1:
            self.labels[:, 1::2] = torch.where(place < self.lengths.unsqueeze(1), own.to(device), blank)
        self.states = 2 * self.lengths + 1
        self.blank = blank

    def emissions(self, log_probs: Any) -> Any:
        """``log p_t(label_s)``, shape ``(T, N, S)``."""
        return log_probs.gather(2, self.labels.expand(log_probs.shape[0], *self.labels.shape))

    def scan(self, emissions: Any, labels: Tensor) -> Any:
        """``a_t(s) = e_t(s) + log(sum of exp a_{t-1}`` over ``s, s-1`` and, between different labels, ``s-2)``."""
        count, size = labels.shape
        floor = torch.full((count, 2), IMPOSSIBLE, dtype=emissions.dtype, device=labels.device)
        skips = torch.zeros_like(labels, dtype=torch.bool)
        skips[:, 2:] = (labels[:, 2:] != self.blank) & (labels[:, 2:] != labels[:, :-2])
        place = torch.arange(size, device=labels.device)
        results = [torch.where(place < 2, emissions[0], IMPOSSIBLE)]
        for e in emissions[1:].unbind(0):
            a = results[-1]
            padded = torch.cat([floor, a], 1)
            leap = torch.where(skips, padded[:, :size], IMPOSSIBLE)
            results.append(e + torch.logsumexp(torch.stack([a, padded[:, 1 : size + 1], leap]), 0))
        return torch.stack(results)

    def reverse(self, x: Any) -> Any:
        """Turn time and states of ``(T, N, S)`` around, in every example for itself."""
        t, n, s = x.shape
        time = (self.steps - 1 - torch.arange(t, device=x.device).unsqueeze(1)).clamp(min=0)
        x = x.gather(0, time.unsqueeze(2).expand(t, n, s))
        return x.gather(2, self.back(s).expand(t, n, s))

    def back(self, size: int) -> Tensor:
        """The states from the last to the first."""
        place = torch.arange(size, device=self.states.device)
        return (self.states.unsqueeze(1) - 1 - place).clamp(min=0)


@jet_rule(aten._ctc_loss.default, aten._ctc_loss.Tensor)
def ctc_loss(
    log_probs: Any,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Any, Any]:
    """``-log`` of the sum over alignments, by the forward recursion, and its table."""
    primal, table = aten._ctc_loss(
        primal_of(log_probs), targets, input_lengths, target_lengths, blank, zero_infinity
    )  # fmt: skip
    lattice = _Lattice(log_probs.device, targets, input_lengths, target_lengths, blank, table.shape[2])
    if bool((lattice.steps < 1).any()):
        raise refused(aten._ctc_loss.default, "an input of length zero")
    alpha = lattice.scan(lattice.emissions(log_probs), lattice.labels)
    count, size = lattice.labels.shape
    last = alpha.gather(0, (lattice.steps - 1).view(1, count, 1).expand(1, count, size))[0]
    ends = last.gather(1, (lattice.states.unsqueeze(1) - torch.tensor([1, 2], device=last.device)).clamp(min=0))
    final = torch.where(lattice.lengths > 0, torch.logaddexp(ends[:, 0], ends[:, 1]), ends[:, 0])
    possible = torch.isfinite(table)
    rows = alpha.transpose(0, 1)
    known = torch.where(possible, rows, 0.0) if rows.shape == table.shape else table
    return of_primal(primal, torch.where(torch.isfinite(primal), -final, 0.0)), of_primal(table, known)


@jet_rule(aten._use_cudnn_ctc_loss.default, aten._use_cudnn_ctc_loss.Tensor)
def use_cudnn_ctc_loss(*args: Any) -> bool:
    """Never: torch's own kernel keeps the table that the adjoint needs."""
    return False


@jet_rule(aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor)
def ctc_loss_backward(
    grad: Any, log_probs: Any, targets: Tensor, input_lengths: Any, target_lengths: Any, loss: Any, table: Any,
    blank: int, zero_infinity: bool = False,
) -> Any:  # fmt: skip
    """``grad (p_t(c) - sum of the posteriors of the states that emit c)``, by the forward and backward recursions."""
    lattice = _Lattice(grad.device, targets, input_lengths, target_lengths, blank, table.shape[2])
    emissions = lattice.emissions(log_probs)
    alpha = lattice.scan(emissions, lattice.labels)
    backward = lattice.reverse(
        lattice.scan(lattice.reverse(emissions), lattice.labels.gather(1, lattice.back(lattice.labels.shape[1])))
    )
    steps, count, size = emissions.shape
    place = torch.arange(size, device=grad.device)
    finite = torch.isfinite(primal_of(loss))
    logs = alpha + backward - emissions + torch.where(finite, loss, 0.0).unsqueeze(1)
    posterior = torch.where(place < lattice.states.unsqueeze(1), logs.exp(), 0.0)
    zeros = torch.zeros(log_probs.shape, dtype=log_probs.dtype, device=grad.device)
    by_class = torch.scatter_add(zeros, 2, lattice.labels.expand(steps, count, size), posterior)
    result = (log_probs.exp() - by_class) * grad.unsqueeze(1)
    impossible = 0.0 if zero_infinity else torch.nan
    result = torch.where(finite.unsqueeze(1), result, impossible)
    inside = torch.arange(steps, device=grad.device).view(-1, 1, 1) < lattice.steps.unsqueeze(1)
    return torch.where(inside, result, 0.0)


def _weights(target: Tensor, classes: int, weight: Any, ignore_index: int, like: Tensor) -> Any:
    """``q`` for which the loss of an example is ``-sum_c q_c log p_c``."""
    kept = target != ignore_index
    own = torch.where(kept, 1.0 if weight is None else weight[torch.where(kept, target, 0)], 0.0).to(like.dtype)
    zeros = torch.zeros(len(target), classes, dtype=like.dtype, device=like.device)
    return torch.scatter_add(zeros, 1, torch.where(kept, target, 0).unsqueeze(1), own.unsqueeze(1))


def linear_cross_entropy(
    x: Any, linear_weight: Any, target: Tensor, bias: Any, weight: Any, reduction: str, ignore_index: int,
    label_smoothing: float, batch_chunk_size: int, acc_policy: str, acc_dtype: torch.dtype, allow_retain_graph: bool,
    *wanted: bool,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """The loss, and its gradients with respect to input, weight and bias, which the kernel computes ahead."""
    if label_smoothing:
        raise missing_rule(torch.ops.torch_nn._linear_cross_entropy_batch_chunked.default)
    values = torch.ops.torch_nn._linear_cross_entropy_batch_chunked(
        *(primal_of(a) for a in (x, linear_weight, target, bias, weight)), reduction, ignore_index, label_smoothing,
        batch_chunk_size, acc_policy, acc_dtype, allow_retain_graph, *wanted,
    )  # fmt: skip
    logits = x @ linear_weight.mT if bias is None else x @ linear_weight.mT + bias
    log_p = torch.log_softmax(logits, 1)
    q = _weights(target, logits.shape[1], weight, ignore_index, primal_of(logits))
    if reduction == "mean":
        q = q / q.sum()
    slope = log_p.exp() * q.sum(1, keepdim=True) - q
    parts = (-(q * log_p).sum(), slope @ linear_weight, slope.mT @ x, slope.sum(0))
    needed = (True, *wanted)
    return tuple(of_primal(v, y) if n else v for v, y, n in zip(values, parts, needed, strict=True))


def linear_cross_entropy_each(
    x: Any, linear_weight: Any, target: Tensor, bias: Any, weight: Any, ignore_index: int, *chunking: Any
) -> Any:
    """The losses of every example."""
    primal = torch.ops.torch_nn._linear_cross_entropy_batch_chunked_no_reduction(
        *(primal_of(a) for a in (x, linear_weight, target, bias, weight)), ignore_index, *chunking
    )
    logits = x @ linear_weight.mT if bias is None else x @ linear_weight.mT + bias
    q = _weights(target, logits.shape[1], weight, ignore_index, primal_of(logits))
    return of_primal(primal, -(q * torch.log_softmax(logits, 1)).sum(1))


# torch has these operators since 2.13, and registers them on first use
with contextlib.suppress(ImportError):
    importlib.import_module("torch.nn.modules.linear_cross_entropy")
for _name, _rule in (
    ("_linear_cross_entropy_batch_chunked", linear_cross_entropy),
    ("_linear_cross_entropy_batch_chunked_no_reduction", linear_cross_entropy_each),
):
    if hasattr(torch.ops.torch_nn, _name):
        jet_rule(getattr(torch.ops.torch_nn, _name).default)(_rule)
