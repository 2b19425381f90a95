"""The jets of a whole run along one block of directions, advanced step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sketch.errors import FidelityError
from lightning_sketch.jets.tensor import JetTensor, Lead, jet, wrap
from lightning_sketch.shadow import update
from lightning_sketch.shadow.quiet import quiet
from lightning_sketch.shadow.record import StepRecord, call_with_tensors, replay
from lightning_sketch.shadow.update import OptimizerSnapshot, StateBlocks
from lightning_sketch.shadow.weighting import LossWeighting

# How far a re-run in the same arithmetic may be from the run itself; another dropout mask or a forgotten term is off by
# 1e-2 or more
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
        self._carried: frozenset[str] = frozenset()

    def weights(self, units: Tensor) -> JetTensor:
        """Weights ``w_i = 1 - x_u(i)`` along the directions, ``(B,)``: order 1 is ``-psi_u(i)``, the others vanish."""
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
            name: wrap(value.clone(), [self.params.get(name)], self.lead, requires_grad=name in snapshot.trainable)
            for name, value in snapshot.params.items()
        }
        gradients: dict[str, JetTensor | None] = dict.fromkeys(params)
        for record in records:
            found = self._gradient(module, training_step, weighting, record, params, step)
            for name, g in found.items():
                if g is not None:
                    before = gradients[name]
                    gradients[name] = g if before is None else before + g
        check_gradients(gradients, snapshot.gradients, step)
        with quiet(module, snapshot.random_state, snapshot.module_state):
            theirs = {name: self._as_in_run(gradients[name], g) for name, g in snapshot.gradients.items()}
            # An override of `configure_gradient_clipping` may clip the parameters of the module
            self.state = call_with_tensors(
                module, dict(params), lambda: update.step(snapshot, params, theirs, self.state, self.lead, clip)
            )
        self.params.update({name: p.block for name, p in params.items()})
        self._check_finite(step)
        return params

    def _as_in_run(self, gradient: JetTensor | None, of_run: Tensor | None) -> JetTensor | None:
        """The gradient with order 0 as in the run, to the last bit, in memory of its own: clipping works in place."""
        if of_run is None:
            return None
        block = None if gradient is None else gradient.block
        return jet(of_run.clone(), None if block is None else block.clone(), self.lead)

    def _gradient(
        self,
        module: Any,
        training_step: Callable[..., Any],
        weighting: LossWeighting,
        record: StepRecord,
        params: dict[str, JetTensor],
        step: int,
    ) -> dict[str, Any]:
        tensors: dict[str, Tensor] = dict(params)
        for name, value in record.copied_buffers().items():
            floating = value.dtype.is_floating_point
            tensors[name] = wrap(value, [self.buffers.get(name)], self.lead) if floating else value
        weights = self.weights(record.units)
        trained = {name: p for name, p in params.items() if p.requires_grad}

        def differentiate(loss: Tensor) -> tuple[Any, ...]:
            check_loss(loss, record, step)
            if record.accumulate != 1:
                loss = loss / record.accumulate
            return torch.autograd.grad(loss, list(trained.values()), allow_unused=True)

        found, self._carried = replay(
            module, record, training_step, weighting, weights, tensors, differentiate, self._carried
        )
        for name, buffer in tensors.items():
            if name not in params:
                self.buffers[name] = buffer.block if type(buffer) is JetTensor else None
        return dict(zip(trained, found, strict=True))

    def _check_finite(self, step: int) -> None:
        total = sum(b.sum() for b in self.params.values() if b is not None)
        if isinstance(total, Tensor) and not bool(total.isfinite()):
            raise FidelityError(
                f"The Taylor coefficients of the parameters are not finite after optimizer step {step}: the run is not "
                "stable at this degree. Usual cures: a smaller learning rate, a lower `degree`, float64, smooth "
                "activations, and `StableAdamW` (eps inside the root) instead of Adam."
            )

    def growth(self) -> float:
        """Norm of the parameters' coefficients of the last order over that of the first, the median over directions."""
        squares = [b.double().square().sum([1, *range(3, b.ndim)]) for b in self.params.values() if b is not None]
        if self.lead[0] == 1 or not squares:
            return 0.0
        norms = torch.stack(squares).sum(0).sqrt()  # (R, k)
        return float((norms[-1] / norms[0]).nan_to_num(0.0).median())

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
        raise FidelityError(
            f"The training loss is {theirs.item()} at optimizer step {step}: a sketch needs a finite run."
        )
    tolerance = TOLERANCE.get(_primal(loss).dtype, 1e-3)
    if not bool((ours - theirs).abs() <= tolerance * (1 + theirs.abs())):
        raise FidelityError(
            f"Running `training_step` again at optimizer step {step} gives loss {ours.item():.8g}, but the run had "
            f"{theirs.item():.8g}: the step depends on something besides parameters, buffers, the batch, module "
            "attributes and random generators (a metric object used as the loss, a file, an object changed in place), "
            "or `loss` is not the training loss."
        )


def check_gradients(ours: dict[str, JetTensor | None], theirs: dict[str, Tensor | None], step: int) -> None:
    """Require order 0 of every gradient to be the user's ``p.grad``, up to rounding.

    Raises:
        FidelityError: naming the parameter that differs.
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
    worst = _worst(excess)
    if worst is not None:
        raise FidelityError(
            f"The gradient of `{worst}` in the re-run of `training_step` is not the run's `p.grad` at optimizer step "
            f"{step} (or is not finite): a gradient hook, another dropout mask, or a kernel with a random state of its "
            "own changed it."
        )


def check_update(
    params: dict[str, JetTensor], snapshot: OptimizerSnapshot, names: Mapping[Tensor, str], step: int
) -> None:
    """Require gradients and parameters after our step of the optimizer to be the user's, up to rounding.

    Args:
        params: our parameters after the step; their ``grad`` is the clipped gradient.
        snapshot: the user's optimizer before the step.
        names: the user's parameters, after the step, and their names.
        step: number of the optimizer step.

    Raises:
        FidelityError: naming the parameter that differs.
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
    worst = _worst(gradients)
    if worst is not None:
        raise FidelityError(
            f"The gradient of `{worst}` was changed between the backward pass and optimizer step {step} by something "
            "else than `configure_gradient_clipping` (a hook such as `on_before_optimizer_step`): clip or scale it "
            "there."
        )
    worst = _worst(values)
    if worst is not None:
        raise FidelityError(
            f"`{worst}` after optimizer step {step} is not what the optimizer class gives on the same gradient: a hook "
            "changes parameters or hyper-parameters around the step, or the optimizer keeps state outside "
            "`optimizer.state`."
        )


def _worst(excess: dict[str, Tensor]) -> str | None:
    """The name whose difference exceeds what is allowed by most, also where it is NaN; ``None`` if all are fine."""
    if not excess:
        return None
    each = torch.stack(list(excess.values()))  # one synchronisation with the device, whatever the number of parameters
    return None if bool((each <= 0).all()) else list(excess)[int(each.nan_to_num(float("inf")).argmax())]
