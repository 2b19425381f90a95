"""The jets of a whole run along one block of directions, advanced step by step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sketch.errors import InstabilityError, MemoryShortageError
from lightning_sketch.jets.tensor import JetTensor, Lead, coefficient_dtype, jet, wrap
from lightning_sketch.shadow import update
from lightning_sketch.shadow.checks import Readings, check_gradients, check_loss
from lightning_sketch.shadow.flat import Copies
from lightning_sketch.shadow.quiet import Start
from lightning_sketch.shadow.record import StepRecord, call_with_tensors, evaluate, replay
from lightning_sketch.shadow.scaling import MAX_EXPONENT, choose_shift, exponents_of, scale_orders
from lightning_sketch.shadow.update import OptimizerSnapshot, StateBlocks
from lightning_sketch.shadow.weighting import LossWeighting


class RunJets:
    """Taylor coefficients along ``k`` directions of the same kind (all real or all complex).

    Order ``r`` of direction ``k`` is carried as ``2^(r e_k)`` times its value; ``exponents`` holds ``e``, which follows
    the coefficients so that none leaves the range of the dtype.

    Args:
        indices: which rows of the sketch's directions these are, ``(k,)``.
        directions: the rows, complex ``(k, n)``; real if all their imaginary parts vanish.
        degree: highest order ``R``.
        dtype: dtype of the parameters.
        device: where they are kept.
        ranks: of how many processes micro-batches come, each with buffers of its own.
    """

    def __init__(
        self,
        indices: np.ndarray,
        directions: np.ndarray,
        degree: int,
        dtype: torch.dtype,
        device: torch.device,
        ranks: int = 1,
    ) -> None:
        real = not directions.imag.any()
        parts = directions.real[None] if real else np.stack([directions.real, directions.imag])
        self.indices = indices
        self.exponents = exponents_of(directions)
        psi = np.ldexp(parts, self.exponents[:, None])
        self.psi = torch.as_tensor(psi).to(device, coefficient_dtype(dtype))  # 2^e psi, (P, k, n)
        self.lead: Lead = (degree, len(parts), len(indices))
        self.params: dict[str, Tensor | None] = {}
        self.buffers: list[dict[str, Tensor | None]] = [{} for _ in range(ranks)]
        self.state: StateBlocks = {}
        self._carried: frozenset[str] = frozenset()

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes in training, as tensors and primitives; of the first process, as checkpoints are."""
        optimizer: dict[str, dict[str, Tensor | None]] = {}
        for (name, key), block in self.state.items():
            optimizer.setdefault(name, {})[key] = block
        return {
            "indices": self.indices.tolist(),
            "exponents": self.exponents.tolist(),
            "params": dict(self.params),
            "buffers": dict(self.buffers[0]),
            "optimizer": optimizer,
            "carried": sorted(self._carried),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave for the same directions."""

        def placed(blocks: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
            return {name: None if block is None else block.to(self.psi.device) for name, block in blocks.items()}

        self._shift(np.array(state["exponents"], dtype=np.int64) - self.exponents)
        self.params, self.buffers[0] = placed(state["params"]), placed(state["buffers"])
        self._synchronize_buffers()
        tensors = {name: placed(of_param) for name, of_param in state["optimizer"].items()}
        self.state = {(name, key): b for name, of_param in tensors.items() for key, b in of_param.items()}
        self._carried = frozenset(state["carried"])

    def weights(self, units: Tensor) -> JetTensor:
        """Weights ``w_i = 1 - x_u(i)`` along the directions, ``(B,)``: order 1 is ``-psi_u(i)``, the others vanish.

        ``units``, ``(B,)``, is on the device of the directions.
        """
        coefficients = torch.zeros(*self.lead, len(units), dtype=self.psi.dtype, device=self.psi.device)
        coefficients[0] = -self.psi[:, :, units] * (units >= 0)
        ones = torch.ones(len(units), dtype=self.psi.dtype, device=self.psi.device)
        return JetTensor(ones, coefficients)

    def advance(
        self,
        start: Start,
        module: Any,
        training_step: Callable[..., Any],
        weighting: LossWeighting,
        records: Sequence[StepRecord],
        snapshot: OptimizerSnapshot,
        clip: Callable[[Optimizer], None],
        step: int,
        readings: Readings,
    ) -> tuple[dict[str, JetTensor], Copies]:
        """Carry the coefficients through one optimizer step, checking order 0 against the user's run.

        Args:
            start: what :func:`quiet` yields.
            module: the user's LightningModule.
            training_step: its unwrapped training step.
            weighting: how weights enter the loss.
            records: the micro-batches of the step, in order, by rank within each.
            snapshot: the user's optimizer before the step.
            clip: the user's gradient clipping.
            step: number of the optimizer step.
            readings: to be read before the next step: raises :class:`FidelityError` if the re-run's loss or gradient is
                not the user's, :class:`InstabilityError` if loss or coefficients are not finite; and scales the latter.

        Returns:
            The parameters after the step, and the memory in which order 0 of their gradients was before it.

        Raises:
            torch.OutOfMemoryError: if nothing has changed, so that the step may be repeated.
            MemoryShortageError: if the coefficients are lost, since some have changed already.
        """
        with self._unchanged_without_memory():
            params = self._parameters(snapshot)
            gradients = self._gradients(start, module, training_step, weighting, records, params, step, readings)
            check_gradients(gradients, snapshot.gradients, step, readings)
            theirs, of_gradients = self._gradients_as_in_run(gradients, snapshot)
            update.reserve(snapshot, params, self.state, self.lead)

        def make_step() -> StateBlocks:
            return update.step(snapshot, params, theirs, self.state, self.lead, clip)

        with lost_without_memory(step):
            places = start(snapshot.random_state, snapshot.module_state)
            # An override of `configure_gradient_clipping` may clip the parameters of the module
            of_module = snapshot.module_state is not None
            self.state = call_with_tensors(places, dict(params), make_step) if of_module else make_step()
            first = not self.params
            self.params.update({name: p.block for name, p in params.items()})
            if first:
                self._drop_unused(theirs)
            self._watch(step, readings)
        return params, of_gradients

    def skip(
        self,
        start: Start,
        module: Any,
        training_step: Callable[..., Any],
        weighting: LossWeighting,
        records: Sequence[StepRecord],
        snapshot: OptimizerSnapshot,
    ) -> None:
        """Carry the coefficients through a step without an update, because a loss scaler found gradients not finite.

        Only those of buffers and attributes change. Nothing is compared with the user's run: neither loss nor gradients
        need be finite.

        Args:
            start: what :func:`quiet` yields.
            module: the user's LightningModule.
            training_step: its unwrapped training step.
            weighting: how weights enter the loss.
            records: the micro-batches of the step, in order, by rank within each.
            snapshot: the user's optimizer where its step would have been.

        Raises:
            torch.OutOfMemoryError: nothing has changed, so that the step may be repeated.
        """
        with self._unchanged_without_memory():
            params, unread = self._parameters(snapshot), Readings()
            self._gradients(start, module, training_step, weighting, records, params, 0, unread)

    @contextmanager
    def _unchanged_without_memory(self) -> Iterator[None]:
        """Within, blocks may be replaced but not changed: all are what they were where memory does not suffice."""
        before = self.params, self.buffers, self._carried
        self.params, self.buffers = dict(self.params), [dict(blocks) for blocks in self.buffers]
        try:
            yield
        except torch.OutOfMemoryError:
            self.params, self.buffers, self._carried = before
            raise

    def _parameters(self, snapshot: OptimizerSnapshot) -> dict[str, JetTensor]:
        """The parameters before the step; each in memory of its own, as the module's are, for `as_strided`."""
        self._hand_over(snapshot.copies.values.keys())
        found = {
            name: wrap(value.clone(), [self.params.get(name)], self.lead, requires_grad=name in snapshot.trainable)
            for name, value in snapshot.copies.values.items()
        }
        if not self.params:  # the first step: all that is trained varies, for operators without a rule to show
            for name in snapshot.trainable:
                _ = found[name].coefficients
        return found

    def _drop_unused(self, gradients: Mapping[str, JetTensor | None]) -> None:
        """Keep no coefficients of parameters that the first step did not reach."""
        for name, gradient in gradients.items():
            block = self.params[name]
            if gradient is None and block is not None and not block.any():
                self.params[name] = None

    def _gradients(
        self,
        start: Start,
        module: Any,
        training_step: Callable[..., Any],
        weighting: LossWeighting,
        records: Sequence[StepRecord],
        params: dict[str, JetTensor],
        step: int,
        readings: Readings,
    ) -> dict[str, JetTensor | None]:
        """The gradients of the step, of all its micro-batches; buffers advance with them."""
        self.buffers = [_copies(blocks) for blocks in self.buffers]  # which the step may change in place
        gradients: dict[str, JetTensor | None] = dict.fromkeys(params)
        for record in records:
            self._add_gradient(start, gradients, module, training_step, weighting, record, params, step, readings)
        scale = records[0].loss_scale
        if scale is not None:
            inverse = scale.double().reciprocal().float()  # as the scaler computes it
            for name, g in gradients.items():
                gradients[name] = None if g is None else g * inverse  # type: ignore[assignment]
        return gradients

    def split(self) -> tuple[RunJets, RunJets]:
        """Return the first and the second half of at least two directions, and keep nothing.

        No more than the coefficients of one tensor exist twice at a time.
        """
        middle = len(self.indices) // 2
        halves = copy.copy(self), copy.copy(self)
        chosen = slice(None, middle), slice(middle, None)
        for half, rows in zip(halves, chosen, strict=True):
            half.indices, half.exponents = self.indices[rows], self.exponents[rows]
            half.psi = self.psi[:, rows].clone()
            half.lead = (*self.lead[:2], len(half.indices))
            half.params, half.buffers, half.state = {}, [{} for _ in self.buffers], {}
        for mine, *theirs in zip(self._tracked(), *(half._tracked() for half in halves), strict=True):
            for name in list(mine):
                block = mine.pop(name)
                for blocks, rows in zip(theirs, chosen, strict=True):  # a clone keeps the memory order
                    blocks[name] = None if block is None else block[:, :, rows].clone()
        return halves

    def _tracked(self) -> tuple[dict[Any, Tensor | None], ...]:
        """Everything that has coefficients, by name."""
        return self.params, *self.buffers, self.state

    def _hand_over(self, held: Set[str]) -> None:
        """Follow parameters that enter the optimizer (a layer that is unfrozen) or leave it."""
        for name in held & self.buffers[0].keys():
            self.params[name] = self.buffers[0].pop(name)
            for others in self.buffers[1:]:
                others.pop(name, None)
        for name in self.params.keys() - held:
            self.buffers[0][name] = self.params.pop(name)
            for others in self.buffers[1:]:
                others[name] = _copied(self.buffers[0][name])

    def _synchronize_buffers(self) -> None:
        """Give all processes the buffers of the first."""
        for rank in range(1, len(self.buffers)):
            self.buffers[rank] = _copies(self.buffers[0])

    def _gradients_as_in_run(
        self, gradients: dict[str, JetTensor | None], snapshot: OptimizerSnapshot
    ) -> tuple[dict[str, JetTensor | None], Copies]:
        """Take the gradients, with order 0 as in the run, to the last bit, in memory of their own for the clipping."""
        found: dict[str, JetTensor | None] = {}
        values = snapshot.gradients.clone()
        for name in snapshot.copies.values:
            mine, of_run = gradients.pop(name), values.values.get(name)
            block = None if mine is None or mine.block is None else mine.block.clone()
            found[name] = None if of_run is None else jet(of_run, block, self.lead)
        return found, values

    def _add_gradient(
        self,
        start: Start,
        gradients: dict[str, JetTensor | None],
        module: Any,
        training_step: Callable[..., Any],
        weighting: LossWeighting,
        record: StepRecord,
        params: dict[str, JetTensor],
        step: int,
        readings: Readings,
    ) -> None:
        tensors: dict[str, Tensor] = dict(params)
        if record.synchronized and record.rank == 0:
            self._synchronize_buffers()
        buffers = self.buffers[record.rank]
        tensors.update(self._buffers(record, params.keys()))
        weights = self.weights(record.units)
        trained = {name: p for name, p in params.items() if p.requires_grad}

        def differentiate(loss: Tensor) -> tuple[Any, ...]:
            check_loss(loss, record.loss, step, readings)
            if record.accumulate != 1:
                loss = loss / record.accumulate
            if record.loss_scale is not None:
                loss = loss * record.loss_scale
            return torch.autograd.grad(loss, list(trained.values()), allow_unused=True)

        found, self._carried = replay(
            start,
            module,
            record,
            training_step,
            weighting,
            weights,
            tensors,
            differentiate,
            self._carried | record.foreign,
        )
        for name in [name for name in tensors if name not in params]:
            buffer = tensors[name]
            buffers[name] = buffer.block if type(buffer) is JetTensor else None
        for name, g in zip(trained, found, strict=True):
            if g is not None:
                before = gradients[name]
                gradients[name] = g if before is None else before + g

    def _buffers(self, record: StepRecord, params: Set[str]) -> dict[str, Tensor]:
        """The buffers before a micro-batch, for it to change; ``params`` may have entered the optimizer after it."""
        blocks = self.buffers[record.rank]
        values = {n: b if n in record.constant else b.clone() for n, b in record.buffers.items() if n not in params}
        return {
            name: wrap(value, [blocks.get(name)], self.lead) if value.dtype.is_floating_point else value
            for name, value in values.items()
        }

    def _watch(self, step: int, readings: Readings) -> None:
        """Have the largest coefficient of every order and direction looked at."""
        blocks = [b for b in self.params.values() if b is not None and b.numel()]
        largest = [torch.linalg.vector_norm(b, math.inf, [1, *range(3, b.ndim)]) for b in blocks]  # keeps NaN
        if largest:
            readings.ask(lambda largest: self._rescale(largest, step), torch.stack(largest).amax(0))

    def _rescale(self, largest: np.ndarray, step: int) -> None:
        """Move the exponents of directions whose coefficients, at most ``largest``, ``(R, k)``, leave a safe range."""
        if not np.isfinite(largest).all():
            raise InstabilityError(
                f"The Taylor coefficients of the parameters are not finite after optimizer step {step}: the run is not "
                "stable at this degree. Usual cures: a smaller learning rate, a lower `degree`, float64, smooth "
                "activations, and `StableAdamW` (eps inside the root) instead of Adam."
            )
        shift = choose_shift(largest, self.psi.dtype)
        if not shift.any():
            return
        shift = (self.exponents + shift).clip(-MAX_EXPONENT, MAX_EXPONENT) - self.exponents
        self._shift(shift)
        for blocks in self._tracked():
            for name, block in blocks.items():
                blocks[name] = None if block is None else scale_orders(block, shift)

    def _shift(self, shift: np.ndarray) -> None:
        """Change the exponents, and the directions with them."""
        self.exponents = self.exponents + shift
        self.psi = scale_orders(self.psi[None], shift)[0]

    def norms(self) -> dict[str, np.ndarray]:
        """Return ``log2`` of the norm of every parameter's coefficients, by name, ``(R, k)``; ``-inf`` of zeros."""
        varying = {name: b for name, b in self.params.items() if b is not None}
        if not varying:
            return {}
        squares = [b.double().square().sum([1, *range(3, b.ndim)]) for b in varying.values()]
        with np.errstate(divide="ignore"):
            logs = np.log2(torch.stack(squares).cpu().numpy()) / 2  # (names, R, k)
        return dict(zip(varying, logs - np.outer(np.arange(1, self.lead[0] + 1), self.exponents), strict=True))

    def evaluate(
        self,
        start: Start,
        module: Any,
        record: StepRecord,
        tensors: Mapping[str, Tensor],
        output: Callable[[Any, tuple[Any, ...]], Tensor],
    ) -> np.ndarray:
        """Return the coefficients of an output of the module as the jets have it now, ``(R, k, *out)`` complex128.

        Args:
            start: what :func:`quiet` yields.
            module: the user's LightningModule.
            record: a micro-batch, whose random state and attributes are taken up.
            tensors: the present values of parameters and buffers, by name.
            output: gets the module and the arguments that its training step had in ``record``.
        """
        found = {**self.buffers[record.rank], **self.params}
        jets = {
            name: wrap(t.clone(), [found.get(name)], self.lead) if t.dtype.is_floating_point else t.clone()
            for name, t in tensors.items()
        }
        value = evaluate(start, module, record, jets, output, self._carried)
        if type(value) is not JetTensor:
            parts = np.zeros((self.lead[0], 2, self.lead[2], *value.shape))
        else:
            parts = value.coefficients.detach().double().cpu().numpy()
        complex_ = parts[:, 0] + (1j * parts[:, 1] if parts.shape[1] == 2 else 0j)
        orders = np.arange(1, self.lead[0] + 1)
        scale = np.exp2(-np.outer(orders, self.exponents).astype(np.float64))
        coefficients: np.ndarray = complex_ * scale.reshape(*scale.shape, *[1] * (complex_.ndim - 2))
        return coefficients

    def coefficients(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the scaled coefficients of every parameter and buffer that varies, by name, ``(R, P, k, *S)``."""
        found = {**self.params, **self.buffers[0]}
        return {name: b.contiguous() for name, b in found.items() if b is not None and name in tensors}


@contextmanager
def lost_without_memory(step: int) -> Iterator[None]:
    """Within, optimizer step ``step`` cannot be repeated: where memory does not suffice, coefficients are lost.

    Raises:
        MemoryShortageError: instead of :class:`torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryShortageError(
            f"The device ran out of memory while the Taylor coefficients were changed at optimizer step {step}, which "
            "cannot be repeated: choose a smaller `directions_per_pass`, fewer `directions` or a lower `degree`."
        ) from error


def _copied(block: Tensor | None) -> Tensor | None:
    return None if block is None else block.clone()


def _copies(blocks: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: _copied(block) for name, block in blocks.items()}
