"""Checks of the first batch: the weighted loss is the user's loss, and every weight acts on its own example only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.shadow.jets_of_run import TOLERANCE, check_loss
from lightning_sketch.shadow.record import StepRecord, replay
from lightning_sketch.shadow.weighting import LossWeighting

_REMEDY = "give `loss=callable(module, batch) -> (B,) per-example losses whose mean is the training loss`"


def verify_weighting(
    module: Any, training_step: Callable[..., Any], weighting: LossWeighting, record: StepRecord, params: dict[str, Tensor]
) -> float:
    """Check on one recorded step how the weights act.

    Args:
        module: the user's LightningModule.
        training_step: its unwrapped training step.
        weighting: how weights enter the loss.
        record: the step.
        params: the parameters that the step saw, by name.

    Returns:
        The fraction of the loss that belongs to no example (regularisation terms), between 0 and 1.

    Raises:
        FidelityError: if the weighted loss at weight 1 is not the user's loss.
        ConfigurationError: if no part of the loss belongs to examples, or a weight acts on other examples.
    """
    plain = LossWeighting(weighting.loss, "batch")  # affine in the weights; what the other one divides by couples examples
    loss, per_weight = _weight_gradient(module, training_step, plain, record, params)
    check_loss(loss, record, 0)
    rest = float(loss.detach() - per_weight.sum())
    fraction = abs(rest) / max(abs(float(loss.detach())), torch.finfo(torch.float64).tiny)
    if fraction > 1 - 1e-6 and float(per_weight.abs().sum()) == 0:
        raise ConfigurationError(f"`loss`: no part of the training loss belongs to an example of the batch: {_REMEDY}.")
    if len(record.units) > 1:
        _verify_locality(module, training_step, plain, record, params, per_weight)
    return fraction


def _weight_gradient(
    module: Any, training_step: Callable[..., Any], weighting: LossWeighting, record: StepRecord, params: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    first = next(iter(params.values()))
    weights = torch.ones(len(record.units), dtype=first.dtype, device=first.device, requires_grad=True)
    tensors = {**params, **{name: b.clone() for name, b in record.buffers.items()}}
    loss = replay(module, record, training_step, weighting, weights, tensors)
    (gradient,) = torch.autograd.grad(loss, weights, allow_unused=True)
    return loss, torch.zeros_like(weights) if gradient is None else gradient


def _verify_locality(
    module: Any,
    training_step: Callable[..., Any],
    weighting: LossWeighting,
    record: StepRecord,
    params: dict[str, Tensor],
    before: Tensor,
) -> None:
    """Change example 0 in the batch: only the derivative by its own weight may change."""
    changed = replace(record, args=(_replace_first(record.args[0], len(record.units)), *record.args[1:]))
    # Batch statistics couple examples by design; what is checked is where the weights go.
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    if norms:
        changed = replace(changed, module_state=_in_evaluation(norms, record))
        before = _weight_gradient(module, training_step, weighting, replace(changed, args=record.args), params)[1]
    _, after = _weight_gradient(module, training_step, weighting, changed, params)
    tolerance = 10 * TOLERANCE.get(before.dtype, 1e-3) * float(before.abs().mean())
    others = (after - before).abs()[1:]
    if not bool((others <= tolerance).all()):
        example = int(others.argmax()) + 1
        raise ConfigurationError(
            f"`loss`: changing example 0 of the batch changes the loss share of example {example}, so weights do not act on "
            f"single examples (a time-first (T, B) loss, or a loss that compares examples of a batch?): {_REMEDY}."
        )


def _in_evaluation(norms: list[nn.Module], record: StepRecord) -> Any:
    """The module's state at entry, with these layers in evaluation mode."""
    wanted = {id(m.__dict__) for m in norms}
    entries = [
        (present, {**attributes, "training": False} if id(present) in wanted else attributes, containers)
        for present, attributes, containers in record.module_state.entries
    ]
    return replace(record.module_state, entries=entries)


def _replace_first(batch: Any, size: int) -> Any:
    """The batch with example 0 changed: its numbers scaled and shifted, its integers those of another example."""
    if isinstance(batch, Tensor):
        if batch.ndim == 0 or batch.shape[0] != size:
            return batch
        batch = batch.clone()
        batch[0] = batch[0] * 0.5 + 0.25 if batch.dtype.is_floating_point else batch[1]
        return batch
    if isinstance(batch, Mapping):
        return type(batch)({k: _replace_first(v, size) for k, v in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_replace_first(v, size) for v in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_replace_first(v, size) for v in batch)
    return batch
