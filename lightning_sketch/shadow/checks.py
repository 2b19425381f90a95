"""Checks that our re-run is the user's run, made of numbers that are read from the device once per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_sketch.errors import FidelityError, InstabilityError
from lightning_sketch.jets.tensor import JetTensor, primal_of
from lightning_sketch.shadow.flat import Copies, known_same_and_finite, read_at_once

if TYPE_CHECKING:
    from lightning_sketch.shadow.update import MadeStep, OptimizerSnapshot

# How far a re-run in the same arithmetic may be from the run itself; another dropout mask or a forgotten term is off by
# 1e-2 or more
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


class Readings:
    """Numbers of a step that the host asks for, read at once when all work of the step is queued.

    Every read waits for the device, which then has nothing to do while the host queues the next operations.
    """

    def __init__(self) -> None:
        self._asked: list[tuple[Callable[..., None], list[Tensor]]] = []

    def ask(self, use: Callable[..., None], *numbers: Tensor) -> None:
        """Have ``use`` called by the next :meth:`read`.

        Args:
            use: is given the numbers, float64 arrays of the same shapes; may raise.
            *numbers: real tensors on the device of the run.
        """
        self._asked.append((use, [t.detach() for t in numbers]))

    def mark(self) -> int:
        """Return a place for :meth:`go_back`."""
        return len(self._asked)

    def go_back(self, mark: int) -> None:
        """Forget what has been asked for since :meth:`mark` gave ``mark``."""
        del self._asked[mark:]

    def read(self) -> None:
        """Read all numbers asked for, and use them in the order of asking, up to the first that raises."""
        asked, self._asked = self._asked, []
        read = iter(read_at_once([t for _, numbers in asked for t in numbers]))
        for use, numbers in asked:
            use(*islice(read, len(numbers)))


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

    def judge(*losses: np.ndarray) -> None:
        ours, theirs = (loss.item() for loss in losses)
        if not math.isfinite(theirs):
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

    readings.ask(judge, ours, theirs)


def check_gradients(ours: Mapping[str, JetTensor | None], theirs: Copies, step: int, readings: Readings) -> None:
    """Require order 0 of every gradient to be the user's ``p.grad``, up to rounding.

    Args:
        ours: gradients of the re-run, by name.
        theirs: the user's, of parameters that have one.
        step: number of the optimizer step.
        readings: which raises :class:`FidelityError` naming the parameter that differs.

    Raises:
        FidelityError: at once, if a parameter has a gradient in the re-run only.
    """
    for name in ours if len(theirs.values) < len(ours) else ():
        if name not in theirs.values and ours[name] is not None:
            raise FidelityError(
                f"Parameter `{name}` has no gradient in the run at optimizer step {step}, but has one in the "
                "re-run of `training_step`: does a hook set it to None?"
            )
    # without a gradient of ours a parameter may still have zeros, from an earlier step
    joined = theirs.join(_primals(map(ours.__getitem__, theirs.values), theirs))
    if known_same_and_finite(theirs.joined, joined):
        return
    tolerance = _tolerances(theirs.dtypes)

    def excess(difference: np.ndarray, norm: np.ndarray) -> np.ndarray:
        return difference - tolerance * (norm + 1e-2 * np.sqrt((norm**2).sum()))

    _require(
        list(theirs.values),
        theirs.squares(lambda mine, g: [mine - g, g], joined),
        excess,
        "The gradient of `{}` in the re-run of `training_step` is not the run's `p.grad` at optimizer step "
        f"{step} (or is not finite): a gradient hook, another dropout mask, or a kernel with a random state of its "
        "own changed it.",
        readings,
    )


def check_update(
    params: Mapping[str, JetTensor],
    of_gradients: Copies,
    snapshot: OptimizerSnapshot,
    made: MadeStep,
    step: int,
    readings: Readings,
) -> None:
    """Require gradients and parameters after our step of the optimizer to be the user's, up to rounding.

    Args:
        params: our parameters after the step; their ``grad`` is the clipped gradient.
        of_gradients: where order 0 of the gradients was before the step, and is now unless it was replaced.
        snapshot: the user's optimizer before the step.
        made: what the user's step left.
        step: number of the optimizer step.
        readings: which raises :class:`FidelityError` naming the parameter that differs.
    """
    before = made.gradients
    # a gradient that is elsewhere by now gives other parameters, which are looked at below
    same = before is snapshot.gradients and known_same_and_finite(of_gradients.joined, made.clipped)
    if not same:
        ours = _primals((params[name].grad for name in before.values), before)
        of_gradient = _tolerances(before.dtypes)
        _require(
            list(before.values),
            before.squares(lambda mine, g, _: [mine - g, g], before.join(ours), made.clipped),
            lambda difference, norm: difference - of_gradient * norm,
            f"The gradient of `{{}}` was changed between the backward pass and optimizer step {step} by something else "
            "than `configure_gradient_clipping` (a hook such as `on_before_optimizer_step`): clip or scale it there.",
            readings,
        )
    copies = snapshot.copies
    joined = copies.join(_primals(params.values(), copies))
    if known_same_and_finite(joined, made.params):
        return
    tolerance, rounding = _tolerances(copies.dtypes), 8 * _eps(copies.dtypes)
    _require(
        list(params),
        copies.squares(
            lambda mine, value, before: [mine - value, value - before, value],
            joined,
            made.params,
        ),
        # relative to the update, not to the parameter: one step changes little of it
        lambda difference, moved, norm: difference - tolerance * moved - rounding * norm,
        f"`{{}}` after optimizer step {step} is not what the optimizer class gives on the same gradient: a hook "
        "changes parameters or hyper-parameters around the step, or the optimizer keeps state outside "
        "`optimizer.state`.",
        readings,
    )


def _primals(jets: Iterable[Any], like: Copies) -> list[Tensor]:
    """Order 0 of jets, zeros where there is none."""
    return [torch.zeros_like(t) if j is None else j.primal for j, t in zip(jets, like.values.values(), strict=True)]


@lru_cache(maxsize=32)
def _tolerances(dtypes: tuple[torch.dtype, ...]) -> np.ndarray:
    return np.array([TOLERANCE.get(dtype, 1e-3) for dtype in dtypes])


@lru_cache(maxsize=32)
def _eps(dtypes: tuple[torch.dtype, ...]) -> np.ndarray:
    return np.array([torch.finfo(dtype).eps for dtype in dtypes])


def _require(
    names: Sequence[str],
    squares: Tensor,
    excess: Callable[..., np.ndarray],
    message: str,
    readings: Readings,
) -> None:
    """Have an error raised, ``message`` with a name, unless ``excess`` of the roots is nowhere positive."""
    if not names:
        return

    def judge(values: np.ndarray) -> None:
        too_much = excess(*np.sqrt(values))
        if not (too_much <= 0).all():
            raise FidelityError(message.format(names[int(np.where(np.isnan(too_much), np.inf, too_much).argmax())]))

    readings.ask(judge, squares)
