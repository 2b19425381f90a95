"""What one call of the user's ``training_step`` saw, so that it can be run again exactly."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_sketch.errors import FidelityError
from lightning_sketch.shadow.carried import forbid_reading, varying_attributes
from lightning_sketch.shadow.checks import Readings
from lightning_sketch.shadow.example_ids import tensors_of
from lightning_sketch.shadow.flat import Copies, known_same
from lightning_sketch.shadow.places import Places
from lightning_sketch.shadow.quiet import ModuleState, Start
from lightning_sketch.shadow.random_state import RandomState
from lightning_sketch.shadow.ranks import Ranks
from lightning_sketch.shadow.weighting import training_loss

T = TypeVar("T")
# (module, training_step, its arguments, weights of the examples) -> what training_step returns, with the loss weighted
Weighting = Callable[[Any, Callable[..., Any], tuple[Any, ...], Tensor], Any]


@dataclass
class StepRecord:
    """One micro-batch of the user's run.

    Attributes:
        args: what ``training_step`` was called with; the batch first.
        units: unit of every example, int64 ``(B,)`` on the device of the module, -1 = not deletable.
        random_state: generators at entry.
        module_state: attributes at entry.
        buffers: buffers, and parameters that the optimizer does not hold, at entry, by name; copies.
        constant: names of those which the step left as they were, and whose copies a re-run may use themselves.
        accumulate: over how many micro-batches the gradient is averaged.
        loss: the user's loss, float64, before division by ``accumulate``.
        foreign: attributes that hold tensors which others than ``training_step`` left there since the step before.
        left: attributes in which it left tensors, as owner and name.
        rank: of the process that it was on.
        synchronized: whether the buffers of the first process had been given to all since the micro-batch before.
        loss_scale: what the loss is multiplied by for the backward pass, after division by ``accumulate``, and its
            gradients are divided by for the update; float32, ``()``, ``None`` without a loss scaler.
    """

    args: tuple[Any, ...]
    units: Tensor
    random_state: RandomState
    module_state: ModuleState
    buffers: dict[str, Tensor]
    accumulate: int
    loss: Tensor
    constant: frozenset[str] = frozenset()
    foreign: frozenset[str] = frozenset()
    left: Sequence[tuple[nn.Module, str]] = ()
    rank: int = 0
    synchronized: bool = False
    loss_scale: Tensor | None = None

    def ones_like(self, params: Mapping[str, Tensor]) -> Tensor:
        """Weights of one for every example, in the dtype and on the device of the parameters."""
        first = next(iter(params.values()))
        return torch.ones(len(self.units), dtype=first.dtype, device=first.device)

    def fresh_tensors(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a re-run on plain tensors starts from: leaves of its own for the parameters, and copied buffers."""
        leaves = {name: p.detach().requires_grad_(p.requires_grad) for name, p in params.items()}
        return {**leaves, **self.copied_buffers()}

    def copied_buffers(self) -> dict[str, Tensor]:
        """The buffers at entry, to be changed by a re-run."""
        return {name: b.clone() for name, b in self.buffers.items()}


def record_step(
    places: Places,
    training_step: Callable[..., Any],
    args: tuple[Any, ...],
    units: Tensor,
    buffers: dict[str, Tensor],
    accumulate: int,
) -> tuple[Any, StepRecord | None]:
    """Run the user's ``training_step`` and remember what it started from.

    Args:
        places: of the user's LightningModule, as they are now.
        training_step: its unwrapped training step.
        args: what the Trainer calls it with.
        units: unit of every example, ``(B,)``, on the device of the module.
        buffers: copies of what the step may change besides parameters of the optimizer, by name.
        accumulate: over how many micro-batches the gradient is averaged.

    Returns:
        What ``training_step`` returned, and the record; ``None`` if it returned no loss.

    Raises:
        ConfigurationError: if the step changes a tensor attribute in place.
        FidelityError: if the step changes its batch in place.
    """
    module: Any = places.module
    random_state, module_state = RandomState.capture(module.device), ModuleState(places)
    kept = _copy_containers(args)  # a step may pop keys of its batch
    versions = [(t, t._version) for t in tensors_of(args) if not t.is_inference()]
    outputs = training_step(*args)
    module_state.refuse_changed_tensors()
    if any(t._version != version for t, version in versions):
        raise FidelityError(
            "`training_step` changes its batch in place, so it cannot be run again on the same batch: make a new "
            "tensor instead (`x = x * 2`, not `x *= 2`)."
        )
    loss = training_loss(outputs)
    if loss is None:
        return outputs, None
    return outputs, StepRecord(kept, units, random_state, module_state, buffers, accumulate, loss.detach().double())


def share_records(records: Sequence[StepRecord], changed: Set[str], ranks: Ranks) -> list[StepRecord]:
    """Return the micro-batches of all processes, in the order of the run, by rank within each.

    Attributes of the module are taken to be the same everywhere; where they are not, the check of the loss tells.

    Args:
        records: of this process.
        changed: names of the buffers that changed since the processes began with the same ones.
        ranks: the processes.
    """
    sent = [
        replace(r, module_state=None, left=(), buffers={name: b for name, b in r.buffers.items() if name in changed})  # type: ignore[arg-type]
        for r in records
    ]
    return [
        replace(
            theirs,
            rank=rank,
            module_state=own.module_state,
            left=own.left,
            random_state=replace(theirs.random_state, device=own.random_state.device),
            buffers={**own.buffers, **theirs.buffers},
        )
        for own, *of_ranks in zip(records, *ranks.share(sent), strict=True)
        for rank, theirs in enumerate(of_ranks)
    ]


def _copy_containers(value: Any) -> Any:
    """Copy mappings and sequences, but not the tensors in them."""
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)
        for k, v in value.items():
            copied[k] = _copy_containers(v)
        return copied
    if isinstance(value, tuple):
        parts = [_copy_containers(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return [_copy_containers(v) for v in value] if isinstance(value, list) else value


class TrackedTensors:
    """Parameters and buffers as the last tracked operation left them.

    Coefficients follow tensors through ``training_step`` and the optimizer; a tensor that anyone else changes would
    keep stale ones.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._copies: dict[tuple[str, ...], Copies] = {}  # of tensors that are looked at together, by their names

    def note(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what a tracked operation has just left, over what was there."""
        if not tensors:
            return
        copies, present = self._copies.get(tuple(tensors)), list(tensors.values())
        if copies is not None and copies.like(present):
            copies.overwrite(copies.join(present))
        else:
            self._keep(tensors)

    def note_changed(self, tensors: Mapping[str, Tensor]) -> frozenset[str]:
        """Copy what a tracked operation has left, if it has changed any of it, beside what was there.

        Args:
            tensors: of which a copy is known, and which rarely change.

        Returns:
            The names of those that have not changed.
        """
        if not tensors:
            return frozenset()
        copies = self.copies_of(tensors)
        changed = copies.squares(_differs, copies.join(list(tensors.values())))[0].tolist()
        if any(changed):
            self._keep(tensors)
        return frozenset(name for name, count in zip(tensors, changed, strict=True) if not count)

    def copies_of(self, names: Iterable[str]) -> Copies:
        """Return the copies of some, laid side by side."""
        copies = self._copies.get(tuple(names))
        return self._keep({name: self.values[name] for name in names}) if copies is None else copies

    def _keep(self, tensors: Mapping[str, Tensor]) -> Copies:
        self._copies = {names: copies for names, copies in self._copies.items() if tensors.keys().isdisjoint(names)}
        copies = self._copies[tuple(tensors)] = Copies(tensors)
        self.values.update(copies.values)
        return copies

    def refuse_new(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Require that no tensor has been registered outside ``training_step`` since the first optimizer step.

        Raises:
            FidelityError: naming one.
        """
        if not tensors.keys() <= self.values.keys():
            new = next(name for name in tensors if name not in self.values)
            raise FidelityError(
                f"`{new}` was registered before optimizer step {step} outside `training_step`, so its Taylor "
                "coefficients are not known: register it in `__init__`, and change it inside a `training_step` with a "
                "loss."
            )

    def check(self, tensors: Mapping[str, Tensor], step: int, readings: Readings) -> None:
        """Require the tensors to be as they were left.

        Args:
            tensors: as they are now, by name.
            step: number of the optimizer step to come.
            readings: which raises :class:`FidelityError` naming one that was changed.
        """
        copies = self._copies.get(tuple(tensors))
        if copies is None:
            tensors = {name: t for name, t in tensors.items() if name in self.values}
            if not tensors:
                return
            copies = self.copies_of(tensors)
        present = copies.join([*tensors.values()])
        if known_same(copies.joined, present):
            return
        changed = copies.squares(_differs, present)

        def judge(changed: np.ndarray) -> None:
            if not changed.any():
                return
            name = [*tensors][int(changed[0].argmax())]
            raise FidelityError(
                f"`{name}` was changed before optimizer step {step} by something else than "
                "the optimizer and a `training_step` with a loss (a hook, another callback, a step that returned "
                "None), so its Taylor coefficients are lost: change it inside such a step, or keep a value that does "
                "not depend on the data as a Python number."
            )

        readings.ask(judge, changed)


def _differs(a: Tensor, b: Tensor) -> list[Tensor]:
    return [(a != b) & ((a == a) | (b == b))]  # a NaN that stays one does not


def call_with_tensors(places: Places, tensors: dict[str, Tensor], function: Callable[[], Any]) -> Any:
    """Run ``function()`` while parameters and buffers of a module are replaced.

    Args:
        places: of the module, as they are now.
        tensors: parameters and buffers by name. Buffers that ``function`` reassigns, also ones that were ``None``
            before, are written back here.
        function: what to run.

    Returns:
        What ``function`` returns.
    """
    try:
        places.put(tensors)
        others = places.others()
        result = function()
        if places.reassigned(others):
            tensors.update(places.module.named_buffers())
        return result
    finally:
        places.put_back()


class _LayersOfCells(TorchFunctionMode):
    """While active, an LSTM runs cell by cell, and not as MKL-DNN's layer of float32, whose operator has no rule."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.lstm:
            return func(*args, **(kwargs or {}))
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)  # `torch.backends.mkldnn.flags` would set the precision too, and warn
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch._C._set_mkldnn_enabled(enabled)


# Whether kernels of attention may be chosen, and how that is set: `sdpa_kernel` takes three times as long
_KERNELS: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
)
_WANTED = False, False, False, False, True


@contextmanager
def differentiable_kernels(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Choose kernels made of operators with rules for these modules: attention by matrix products, nothing fused."""
    cells = _LayersOfCells() if any(isinstance(m, nn.LSTM) for m in modules) else nullcontext()
    before = [enabled() for enabled, _ in _KERNELS]
    try:
        for (_, enable), wanted in zip(_KERNELS, _WANTED, strict=True):
            enable(wanted)
        # slow to import, and nothing is compiled without it
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext(), cells:
            yield
    finally:
        for (_, enable), enabled in zip(_KERNELS, before, strict=True):
            enable(enabled)


def _precision_of(module: Any) -> AbstractContextManager[None]:
    """Autocast or the default dtype, as the Trainer has them around ``training_step``, not around the backward pass."""
    try:
        trainer = module.trainer
    except RuntimeError:  # attached to none
        return nullcontext()
    context: AbstractContextManager[None] = trainer.precision_plugin.train_step_context()
    return context


def replay(
    start: Start,
    module: Any,
    record: StepRecord,
    training_step: Callable[..., Any],
    weighting: Weighting,
    weights: Tensor,
    tensors: dict[str, Tensor],
    use: Callable[[Tensor], T],
    carried: frozenset[str] = frozenset(),
) -> tuple[T, frozenset[str]]:
    """Run the recorded step again with weighted examples and replaced tensors.

    Args:
        start: what :func:`quiet` yields, which leaves no trace of it.
        module: the user's LightningModule.
        record: the step.
        training_step: the module's unwrapped training step.
        weighting: how weights enter the loss.
        weights: shape ``(B,)``.
        tensors: parameters and buffers by name; buffers that the step reassigns are written back here.
        use: what is done with the loss, before division by ``record.accumulate``. A backward pass belongs here: it may
            run code of the module again (hooks, activation checkpoints).
        carried: attributes in which earlier steps left tensors whose coefficients are not known.

    Returns:
        What ``use`` returns, and ``carried`` for the next step.

    Raises:
        ConfigurationError: if the step reads a tensor in one of the attributes ``carried``.
    """
    args = _copy_containers(record.args)

    def run() -> T:
        with _precision_of(module):
            loss = training_loss(weighting(module, training_step, args, weights))
        assert loss is not None, "a step whose training_step returned None is not recorded"
        return use(loss)

    places = start(record.random_state, record.module_state)
    with differentiable_kernels(places.of_each_type), torch.enable_grad():
        forbid_reading(module, carried)
        result = call_with_tensors(places, tensors, run)
        return result, varying_attributes(module, record.left)


def evaluate(
    start: Start,
    module: Any,
    record: StepRecord,
    tensors: dict[str, Tensor],
    output: Callable[[Any, tuple[Any, ...]], Tensor],
    carried: frozenset[str] = frozenset(),
) -> Tensor:
    """Return ``output(module, args)`` for the arguments of a recorded step, with replaced tensors, without a graph.

    Args:
        start: what :func:`quiet` yields, which leaves no trace of it.
        module: the user's LightningModule.
        record: the step, whose random state and attributes are taken up.
        tensors: parameters and buffers by name.
        output: what is evaluated.
        carried: as in :func:`replay`.
    """
    args = _copy_containers(record.args)

    def run() -> Tensor:
        with _precision_of(module):
            return output(module, args)

    places = start(record.random_state, record.module_state)
    with differentiable_kernels(places.of_each_type), torch.no_grad():
        forbid_reading(module, carried)
        value: Tensor = call_with_tensors(places, tensors, run)
        return value
