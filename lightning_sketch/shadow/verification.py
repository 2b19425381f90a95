"""Checks of the first batch: the weighted loss is the user's loss, and every weight acts on its own example only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sketch.errors import ConfigurationError, LightningSketchError
from lightning_sketch.shadow.checks import TOLERANCE, Readings, check_loss
from lightning_sketch.shadow.example_ids import tensors_of
from lightning_sketch.shadow.quiet import quiet
from lightning_sketch.shadow.record import StepRecord, replay
from lightning_sketch.shadow.weighting import REMEDY, LossWeighting, WeightedReductions, refuse_unweighted


def verify_weighting(
    module: Any,
    training_step: Callable[..., Any],
    weighting: LossWeighting,
    record: StepRecord,
    params: Mapping[str, Tensor],
) -> float:
    """Check on one recorded step how the weights act.

    Args:
        module: the user's LightningModule.
        training_step: its unwrapped training step.
        weighting: how weights enter the loss.
        record: the step.
        params: the parameters that the step saw, by name.

    Returns:
        The fraction of the loss that belongs to no example (regularisation terms).

    Raises:
        FidelityError: if the weighted loss at weight 1 is not the user's loss.
        ConfigurationError: if no part of the loss belongs to examples, or the weights do not act as weights of single
            examples.
    """
    plain = LossWeighting(
        weighting.loss, "batch"
    )  # affine in the weights; what the other one divides by couples examples
    step = _Step(module, training_step, plain, record, params)
    shares = step.shares(record.args[0])
    readings = Readings()
    check_loss(shares.loss, record.loss, 0, readings)
    readings.read()
    if not bool(shares.of_example.any()):
        raise ConfigurationError(f"`loss`: no part of the training loss belongs to an example of the batch: {REMEDY}.")
    _verify_linear(step, shares)
    try:
        _verify_attribution(step, shares)
        _verify_locality(step, shares.of_example)
    except LightningSketchError:
        raise
    except Exception as error:
        rank_zero_warn(
            "`loss`: whether weights act on single examples could not be checked, since `training_step` fails on a "
            f"batch with changed values ({type(error).__name__}: {error})."
        )
    return abs(float(shares.rest)) / max(abs(float(shares.loss)), torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class _Shares:
    """A loss that is affine in the weights of its examples: ``loss = rest + sum_i of_example[i]``."""

    loss: Tensor
    of_example: Tensor
    terms: list[Tensor]

    @property
    def rest(self) -> Tensor:
        return self.loss - self.of_example.sum()

    @property
    def rounding(self) -> Tensor:
        return 10 * TOLERANCE.get(self.loss.dtype, 1e-3) * (self.loss.abs() + self.of_example.abs().sum())


@dataclass(frozen=True)
class _Step:
    """The recorded step, to be run with other weights and batches."""

    module: Any
    training_step: Callable[..., Any]
    weighting: LossWeighting
    record: StepRecord
    params: Mapping[str, Tensor]
    in_evaluation: tuple[nn.Module, ...] = ()

    @property
    def num_examples(self) -> int:
        return len(self.record.units)

    def shares(self, batch: Any, weights: Tensor | None = None) -> _Shares:
        """Run the step on a batch, with weights one unless given."""
        if weights is None:
            weights = self.record.ones_like(self.params)
        weights.requires_grad_()
        terms: list[Tensor] = []

        def weighted(module: Any, training_step: Callable[..., Any], args: tuple[Any, ...], weights: Tensor) -> Any:
            for m in self.in_evaluation:
                m.training = False  # quiet puts it back
            if self.weighting.per_example(module) is not None:
                return self.weighting(module, training_step, args, weights)
            with WeightedReductions(weights, "batch") as mode:
                outputs = training_step(*args)
            refuse_unweighted(mode, outputs)
            terms.extend(mode.terms)
            return outputs

        record = replace(self.record, args=(batch, *self.record.args[1:]))
        tensors = record.fresh_tensors(self.params)

        def differentiate(loss: Tensor) -> _Shares:
            gradient = torch.autograd.grad(loss, weights, allow_unused=True)[0] if loss.requires_grad else None
            return _Shares(loss.detach(), torch.zeros_like(weights) if gradient is None else gradient, terms)

        with quiet(record.module_state.places, record.random_state.device) as start, _RefuseCommunication():
            return replay(start, self.module, record, self.training_step, weighted, weights, tensors, differentiate)[0]


class _RefuseCommunication(TorchDispatchMode):
    """Within, no process may talk to another: a re-run is not made by all of them at a time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            raise ConfigurationError(
                f"`training_step` exchanges data between processes ({func.__name__}; `self.all_gather`?), so the loss "
                "of one depends on the batches of others: compute it from the batch of its own process."
            )
        return func(*args, **(kwargs or {}))


def _verify_linear(step: _Step, shares: _Shares) -> None:
    weights = torch.linspace(0.2, 0.9, step.num_examples, dtype=shares.of_example.dtype, device=shares.loss.device)
    loss = step.shares(step.record.args[0], weights).loss
    if not bool((loss - shares.rest - shares.of_example @ weights.detach()).abs() <= shares.rounding):
        raise ConfigurationError(
            "`loss`: the training loss is not a weighted sum over examples (a function of unreduced losses, such as a "
            f"focal loss or the hardest examples of a batch?): {REMEDY}."
        )


def _verify_attribution(step: _Step, shares: _Shares) -> None:
    """Change the whole batch: what belongs to examples must change, and what does not must not."""
    batch, found = _changed(step.record.args[0], step.num_examples, slice(None))
    if step.weighting.per_example(step.module) is not None:
        return
    if not found:
        raise ConfigurationError(
            f"`loss='auto'` cannot find the examples in the batch, a {type(batch).__name__} without a tensor whose "
            f"first dimension is {step.num_examples}: {REMEDY}."
        )
    if all(torch.equal(a, b) for a, b in zip(tensors_of(batch), tensors_of(step.record.args[0]), strict=True)):
        return  # one example of equal tokens
    changed = step.shares(batch)
    if not bool(changed.loss.isfinite()) or len(changed.terms) != len(shares.terms):
        return
    if not bool((changed.rest - shares.rest).abs() <= torch.maximum(changed.rounding, shares.rounding)):
        raise ConfigurationError(
            "`loss='auto'` finds only a part of the training loss: another part depends on the batch too, but is not "
            f"made by a torch.nn.functional loss with one entry per example: {REMEDY}."
        )
    for old, new in zip(shares.terms, changed.terms, strict=True):
        if old.shape == new.shape and torch.equal(old, new):
            raise ConfigurationError(
                f"`loss='auto'` would weight the {tuple(old.shape)} entries of a torch.nn.functional loss by examples, "
                "but they do not depend on the batch (a regulariser?): write it without torch.nn.functional, or "
                f"{REMEDY}."
            )


def _verify_locality(step: _Step, before: Tensor) -> None:
    """Change some examples of the batch: only the derivatives by their own weights may change."""
    # Batch statistics couple examples by design; what is checked is where the weights go.
    norms = tuple(m for m in step.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training)
    if norms:
        step = replace(step, in_evaluation=norms)
        before = step.shares(step.record.args[0]).of_example
    _verify_rows(step, before, [0])
    # A step that permutes its batch, and leaves example 0 where it is, moves another out of one of these sets.
    for bit in range((step.num_examples - 1).bit_length()):
        _verify_rows(step, before, [i for i in range(step.num_examples) if i >> bit & 1])


def _verify_rows(step: _Step, before: Tensor, rows: list[int]) -> None:
    """Change these examples; the loss shares of the others must stay, or keep their proportions."""
    after = step.shares(_changed(step.record.args[0], step.num_examples, rows)[0]).of_example
    tolerance = 10 * TOLERANCE.get(before.dtype, 1e-3) * float(before.abs().mean())
    stays = torch.ones(len(before), dtype=torch.bool, device=before.device)
    stays[rows] = False
    old, new = before[stays], after[stays]
    others = (new - old).abs()
    if len(others) > 1 and not bool((others <= tolerance).all()):
        # A mean over tokens or class weights divides by what the changed ones have of them: proportions are kept.
        others = (new - (new @ old) / (old @ old) * old).abs()
    if not bool((others <= tolerance).all()):
        example = int(stays.nonzero()[others.argmax()])
        raise ConfigurationError(
            f"`loss`: changing example {rows[0]} of the batch changes the loss share of example {example}, so "
            "weights do not act on single examples (a time-first (T, B) loss, or a loss that compares examples of a "
            f"batch?): {REMEDY}."
        )


def _changed(batch: Any, size: int, rows: slice | list[int]) -> tuple[Any, bool]:
    """The batch with some rows changed, and whether there were any.

    Numbers are scaled and shifted, rows of integers are reversed, single ones are those of the next example.
    """
    if isinstance(batch, Tensor):
        if batch.ndim == 0 or batch.shape[0] != size:
            return batch, False
        changed = batch.clone()
        if batch.dtype.is_floating_point:
            changed[rows] = batch[rows] * 0.5 + 0.25  # stays a probability if it was one
        elif batch.ndim > 1 and not torch.equal(batch.flip(-1)[rows], batch[rows]):
            changed[rows] = batch.flip(-1)[rows]  # as many tokens and as much padding as before
        elif size > 1:
            changed[rows] = torch.cat([batch[1:], batch[-1:]])[rows]  # stays sorted if it was
        else:
            changed = batch.roll(1, -1)  # a palindrome, when rolled, is none
        return changed, True
    if isinstance(batch, MutableMapping):
        found = {k: _changed(v, size, rows) for k, v in batch.items()}
        copied = copy.copy(batch)
        copied.update({k: v for k, (v, _) in found.items()})
        return copied, any(f for _, f in found.values())
    if isinstance(batch, (list, tuple)):
        parts = [_changed(v, size, rows) for v in batch]
        values = [v for v, _ in parts]
        new = type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
        return new, any(f for _, f in parts)
    return batch, False
