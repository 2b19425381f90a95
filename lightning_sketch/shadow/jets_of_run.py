"""The jets of a whole run along one block of directions: parameters, buffers and optimizer state, advanced step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sketch.errors import FidelityError
from lightning_sketch.jets.tensor import JetTensor, Lead, wrap
from lightning_sketch.shadow import update
from lightning_sketch.shadow.record import StepRecord, replay
from lightning_sketch.shadow.update import OptimizerSnapshot, StateBlocks
from lightning_sketch.shadow.weighting import LossWeighting

# How far a re-run in the same arithmetic may be from the run itself; another dropout mask or a forgotten term is off by 1e-2 or more
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


class RunJets:
    """Taylor coefficients along ``k`` directions of the same kind (all real or all complex).

    Args:
        indices: which rows of the sketch's directions these are, ``(k,)``.
        directions: the rows, complex ``(k, n)``; real if all their imaginary parts vanish.
        degree: highest order ``R``.
        dtype: dtype of the coefficients.
        device: where they are kept.
    """

    def __init__(
        self, indices: np.ndarray, directions: np.ndarray, degree: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        real = not directions.imag.any()
        parts = directions.real[None] if real else np.stack([directions.real, directions.imag])
        self.indices = indices
        self.psi = torch.as_tensor(parts).to(device, dtype)  # (P, k, n)
        self.lead: Lead = (degree, len(parts), len(indices))
        self.params: dict[str, Tensor | None] = {}
        self.buffers: dict[str, Tensor | None] = {}
        self.state: StateBlocks = {}

    def weights(self, units: Tensor, dtype: torch.dtype) -> JetTensor:
        """Weights ``w_i = 1 - x_u(i)`` along the directions, shape ``(B,)``: order 1 is ``-psi_u(i)``, higher orders vanish."""
        units = units.to(self.psi.device)
        coefficients = torch.zeros(*self.lead, len(units), dtype=self.psi.dtype, device=self.psi.device)
        coefficients[0] = -self.psi[:, :, units.clamp(min=0)] * (units >= 0)
        ones = torch.ones(len(units), dtype=self.psi.dtype, device=self.psi.device)
        return JetTensor(ones, coefficients)

    def advance(
        self,
        module: Any,
        training_step: Callable[..., Any],
        weighting: LossWeighting,
        records: Sequence[StepRecord],
        snapshot: OptimizerSnapshot,
        clip: Callable[[Optimizer], None],
        step: int,
    ) -> dict[str, JetTensor]:
        """Carry the coefficients through one optimizer step, checking order 0 against the user's run.

        Returns:
            The parameters after the step.

        Raises:
            FidelityError: if the re-run's loss or gradient is not the user's, or anything is not finite.
        """
        params = {
            name: wrap(value.clone(), [self.params.get(name)], self.lead, requires_grad=True)
            for name, value in snapshot.params.items()
        }
        gradients: dict[str, JetTensor | None] = dict.fromkeys(params)
        for record in records:
            found = self._gradient(module, training_step, weighting, record, params, step)
            for name, g in zip(params, found, strict=True):
                if g is not None:
                    before = gradients[name]
                    gradients[name] = g if before is None else before + g  # type: ignore[assignment]
        check_gradients(gradients, snapshot.gradients, step)
        for p in params.values():
            p.requires_grad_(False)
        self.state = update.step(snapshot, params, gradients, self.state, self.lead, clip)
        self.params.update({name: p.block for name, p in params.items()})
        self._check_finite(step)
        return params

    def _gradient(
        self,
        module: Any,
        training_step: Callable[..., Any],
        weighting: LossWeighting,
        record: StepRecord,
        params: dict[str, JetTensor],
        step: int,
    ) -> tuple[Any, ...]:
        tensors: dict[str, Tensor] = dict(params)
        for name, value in record.buffers.items():
            value = value.clone()
            floating = value.dtype.is_floating_point
            tensors[name] = wrap(value, [self.buffers.get(name)], self.lead) if floating else value
        weights = self.weights(record.units, self.psi.dtype)
        loss = replay(module, record, training_step, weighting, weights, tensors)
        check_loss(loss, record, step)
        for name in record.buffers:
            buffer = tensors[name]
            self.buffers[name] = buffer.block if type(buffer) is JetTensor else None
        if record.accumulate != 1:
            loss = loss / record.accumulate
        return torch.autograd.grad(loss, list(params.values()), allow_unused=True)

    def _check_finite(self, step: int) -> None:
        total = sum(b.sum() for b in self.params.values() if b is not None)
        if isinstance(total, Tensor) and not bool(total.isfinite()):
            raise FidelityError(
                f"The Taylor coefficients of the parameters are not finite after optimizer step {step}: the run is not stable "
                "at this degree; use `StableAdamW` (eps inside the root) or SGD, a lower `degree`, or a smaller learning rate."
            )

    def coefficients(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the coefficients of every parameter and buffer that varies, by name, ``(R, P, k, *S)``."""
        found = {**self.params, **self.buffers}
        return {name: b.contiguous() for name, b in found.items() if b is not None and name in tensors}


def _primal(x: Tensor) -> Tensor:
    return x.primal if type(x) is JetTensor else x


def check_loss(loss: Tensor, record: StepRecord, step: int) -> None:
    """Require the re-run's loss, at weight one, to be the user's.

    Raises:
        FidelityError: if it is not, or is not finite.
    """
    ours, theirs = _primal(loss).detach().double(), record.loss
    assert theirs is not None
    if not bool(theirs.isfinite()):
        raise FidelityError(f"The training loss is {theirs.item()} at optimizer step {step}: a sketch needs a finite run.")
    tolerance = TOLERANCE.get(_primal(loss).dtype, 1e-3)
    if not bool((ours - theirs).abs() <= tolerance * (1 + theirs.abs())):
        raise FidelityError(
            f"Running `training_step` again at optimizer step {step} gives loss {ours.item():.8g}, but the run had "
            f"{theirs.item():.8g}: the step depends on something besides parameters, buffers, the batch, module attributes and "
            "random generators (a metric object used as the loss, a file, an object changed in place), or `loss` is not the "
            "training loss."
        )


def check_gradients(ours: dict[str, JetTensor | None], theirs: dict[str, Tensor | None], step: int) -> None:
    """Require order 0 of every gradient to be the user's ``p.grad``, up to rounding.

    Raises:
        FidelityError: naming the parameter that differs.
    """
    overall = sum((g.double().square().sum() for g in theirs.values() if g is not None), torch.zeros(())).sqrt()
    excess, names = [], []
    for name, g in theirs.items():
        mine = ours[name]
        if (g is None) != (mine is None):
            which = "has no gradient in the run" if g is None else "has a gradient in the run"
            raise FidelityError(f"Parameter `{name}` {which} at optimizer step {step}, but not in the re-run of `training_step`.")
        if g is None or mine is None:
            continue
        allowed = TOLERANCE.get(g.dtype, 1e-3) * (g.double().norm() + 1e-2 * overall)
        excess.append((mine.primal - g).double().norm() - allowed)
        names.append(name)
    if not names:
        return
    worst = torch.stack(excess)
    if not bool((worst <= 0).all()):  # also where it is NaN
        name = names[int(worst.nan_to_num(float("inf")).argmax())]
        raise FidelityError(
            f"The gradient of `{name}` in the re-run of `training_step` is not the run's `p.grad` at optimizer step {step} "
            f"(or is not finite): a gradient hook, another dropout mask, or a kernel with a random state of its own changed it."
        )


def check_update(params: dict[str, JetTensor], names: dict[Tensor, str], step: int) -> None:
    """Require the parameters after our step of the optimizer to be the user's, up to rounding.

    Raises:
        FidelityError: naming the parameter that differs.
    """
    excess, order = [], []
    for p, name in names.items():
        if name in params:
            value = p.detach()
            scale = value.double().norm() + 1e-3
            excess.append((params[name].primal - value).double().norm() - TOLERANCE.get(p.dtype, 1e-3) * scale)
            order.append(name)
    worst = torch.stack(excess)
    if not bool((worst <= 0).all()):
        name = order[int(worst.nan_to_num(float("inf")).argmax())]
        raise FidelityError(
            f"`{name}` after optimizer step {step} is not what the optimizer class gives on the same gradient: a hook changes "
            "gradients or parameters after the backward pass, or the optimizer keeps state outside `optimizer.state`."
        )


