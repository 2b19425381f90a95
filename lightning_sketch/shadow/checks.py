"""Checks that our re-run is the user's run, made of numbers that are read from the device once per optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_sketch.errors import FidelityError, InstabilityError
from lightning_sketch.jets.tensor import JetTensor, primal_of

if TYPE_CHECKING:
    from lightning_sketch.shadow.update import OptimizerSnapshot

# How far a re-run in the same arithmetic may be from the run itself; another dropout mask or a forgotten term is off by
# 1e-2 or more
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


class Readings:
    """Numbers of a step that the host asks for, read at once when all work of the step is queued.

    Every read waits for the device, which then has nothing to do while the host queues the next operations.
    """

    def __init__(self) -> None:
        self._asked: list[tuple[Tensor, Callable[[np.ndarray], None]]] = []

    def ask(self, numbers: Tensor, use: Callable[[np.ndarray], None]) -> None:
        """Have ``use`` called by the next :meth:`read`.

        Args:
            numbers: real, on the device of the run.
            use: is given them as float64 of the same shape; may raise.
        """
        self._asked.append((numbers.detach(), use))

    def read(self) -> None:
        """Read all numbers asked for, and use them in the order of asking, up to the first that raises."""
        asked, self._asked = self._asked, []
        if not asked:
            return
        values = torch.cat([numbers.reshape(-1) for numbers, _ in asked]).cpu().numpy().astype(np.float64)
        start = 0
        for numbers, use in asked:
            stop = start + numbers.numel()
            use(values[start:stop].reshape(numbers.shape))
            start = stop


def check_loss(loss: Tensor, theirs: Tensor, step: int, readings: Readings) -> None:
    """Require the re-run's loss, at weight one, to be the user's.

    Args:
        loss: of the re-run.
        theirs: the user's, float64.
        step: number of the optimizer step.
        readings: which raises :class:`FidelityError` if it is not, :class:`InstabilityError` if it is not finite.
    """
    ours: Tensor = primal_of(loss)
    tolerance = TOLERANCE.get(ours.dtype, 1e-3)

    def judge(values: np.ndarray) -> None:
        ours, theirs = values.tolist()
        if not np.isfinite(theirs):
            raise InstabilityError(
                f"The training loss is {theirs} at optimizer step {step}: a sketch needs a finite run."
            )
        if not abs(ours - theirs) <= tolerance * (1 + abs(theirs)):
            raise FidelityError(
                f"Running `training_step` again at optimizer step {step} gives loss {ours:.8g}, but the run had "
                f"{theirs:.8g}: the step depends on something besides parameters, buffers, the batch, module "
                "attributes and random generators (a metric object used as the loss, a file, the rank of the process, "
                "an object changed in place), or `loss` is not the training loss."
            )

    readings.ask(torch.cat([ours.detach().double().reshape(1), theirs.reshape(1)]), judge)


def check_gradients(
    ours: Mapping[str, JetTensor | None], theirs: Mapping[str, Tensor | None], step: int, readings: Readings
) -> None:
    """Require order 0 of every gradient to be the user's ``p.grad``, up to rounding.

    Args:
        ours: gradients of the re-run, by name.
        theirs: the user's.
        step: number of the optimizer step.
        readings: which raises :class:`FidelityError` naming the parameter that differs.

    Raises:
        FidelityError: at once, if a parameter has a gradient in the re-run only.
    """
    overall = sum((g.double().square().sum() for g in theirs.values() if g is not None), torch.zeros(())).sqrt()
    excess = {}
    for name, g in theirs.items():
        mine = ours[name]
        if g is None:
            if mine is not None:
                raise FidelityError(
                    f"Parameter `{name}` has no gradient in the run at optimizer step {step}, but has one in the "
                    "re-run of `training_step`: does a hook set it to None?"
                )
            continue
        allowed = TOLERANCE.get(g.dtype, 1e-3) * (g.double().norm() + 1e-2 * overall)
        difference = (
            g if mine is None else mine.primal - g
        )  # without one a parameter may still have zeros, from an earlier step
        excess[name] = difference.double().norm() - allowed
    _require(
        excess,
        "The gradient of `{}` in the re-run of `training_step` is not the run's `p.grad` at optimizer step "
        f"{step} (or is not finite): a gradient hook, another dropout mask, or a kernel with a random state of its "
        "own changed it.",
        readings,
    )


def check_update(
    params: Mapping[str, JetTensor],
    snapshot: OptimizerSnapshot,
    names: Mapping[Tensor, str],
    step: int,
    readings: Readings,
) -> None:
    """Require gradients and parameters after our step of the optimizer to be the user's, up to rounding.

    Args:
        params: our parameters after the step; their ``grad`` is the clipped gradient.
        snapshot: the user's optimizer before the step.
        names: the user's parameters, after the step, and their names.
        step: number of the optimizer step.
        readings: which raises :class:`FidelityError` naming the parameter that differs.
    """
    gradients, values = {}, {}
    for p, name in names.items():
        if name not in params:
            continue
        mine, value, tolerance = params[name], p.detach(), TOLERANCE.get(p.dtype, 1e-3)
        if p.grad is not None and mine.grad is not None:
            clipped = mine.grad.primal  # type: ignore[attr-defined]
            gradients[name] = (clipped - p.grad).double().norm() - tolerance * p.grad.double().norm()
        # relative to the update, not to the parameter: one step changes little of it
        rounding = 8 * torch.finfo(p.dtype).eps * value.double().norm()
        moved = (value - snapshot.params[name]).double().norm()
        values[name] = (mine.primal - value).double().norm() - tolerance * moved - rounding
    _require(
        gradients,
        f"The gradient of `{{}}` was changed between the backward pass and optimizer step {step} by something else "
        "than `configure_gradient_clipping` (a hook such as `on_before_optimizer_step`): clip or scale it there.",
        readings,
    )
    _require(
        values,
        f"`{{}}` after optimizer step {step} is not what the optimizer class gives on the same gradient: a hook "
        "changes parameters or hyper-parameters around the step, or the optimizer keeps state outside "
        "`optimizer.state`.",
        readings,
    )


def _require(excess: Mapping[str, Tensor], message: str, readings: Readings) -> None:
    """Have an error raised, ``message`` with a name, unless every difference is within what is allowed."""
    if not excess:
        return
    names = list(excess)

    def judge(values: np.ndarray) -> None:
        if not (values <= 0).all():
            raise FidelityError(message.format(names[int(np.where(np.isnan(values), np.inf, values).argmax())]))

    readings.ask(torch.stack(list(excess.values())), judge)
