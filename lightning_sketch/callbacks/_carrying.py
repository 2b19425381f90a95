"""What every callback that carries Taylor coefficients along a run does: record each step, and run it again on jets."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sketch.callbacks._examples import AroundTrainingStep, joint_order
from lightning_sketch.directions import Directions, units_checksum
from lightning_sketch.errors import ConfigurationError, InstabilityError, MemoryShortageError, check_count
from lightning_sketch.jets.memory import collect_garbage, give_back_freed_memory
from lightning_sketch.shadow.carried import AttributeWatch
from lightning_sketch.shadow.checks import Readings, check_update
from lightning_sketch.shadow.jets_of_run import RunJets, lost_without_memory
from lightning_sketch.shadow.places import Places
from lightning_sketch.shadow.planning import StepSize, check_memory, directions_per_pass, measure_step
from lightning_sketch.shadow.quiet import Start, quiet
from lightning_sketch.shadow.ranks import BufferSync, Ranks
from lightning_sketch.shadow.record import StepRecord, TrackedTensors, record_step, share_records
from lightning_sketch.shadow.update import (
    Counts,
    Held,
    MadeStep,
    OptimizerSnapshot,
    ask_counts,
    count_state_tensors,
)
from lightning_sketch.shadow.verification import verify_weighting
from lightning_sketch.shadow.weighting import LossWeighting, Normalization, PerExampleLoss
from lightning_sketch.shadow.wrapping import check_optimizers, check_start, check_trainer, refuse_averaging


class CarriesJets(AroundTrainingStep):
    """Follows the optimizer steps of a run, and carries Taylor coefficients through each.

    Args:
        units: unit of every example of the train dataset, ``-1`` = not deletable; ``None`` = one unit per example.
        ids: ``"auto"``, a key of the batch, or ``callable(batch) -> (B,)`` rows of the dataset.
        degree: highest order of the coefficients.
        loss: ``"auto"``, or ``callable(module, batch) -> (B,)`` per-example losses whose mean is the training loss.
        normalization: ``"batch"`` or ``"remaining"``.
        directions_per_pass: how many directions one re-run of the step carries.
        on_instability: ``"warn"`` gives up and lets training go on, ``"stop"`` raises.
    """

    def __init__(
        self,
        units: Sequence[int] | np.ndarray | None,
        ids: Callable[[Any], Any] | str,
        *,
        degree: int,
        loss: Literal["auto"] | PerExampleLoss,
        normalization: Normalization,
        directions_per_pass: int | Literal["auto"] = "auto",
        on_instability: Literal["warn", "stop"] = "warn",
    ) -> None:
        super().__init__(units, ids)
        if on_instability not in ("warn", "stop"):
            raise ConfigurationError(f"`on_instability` must be 'warn' or 'stop' but is {on_instability!r}.")
        check_count("degree", degree)
        if directions_per_pass != "auto":
            check_count("directions_per_pass", directions_per_pass)
        self.degree = degree
        self.directions_per_pass = directions_per_pass
        self.on_instability = on_instability
        self.weighting = LossWeighting(loss, normalization)
        self._name = type(self).__name__
        self._hooks: list[Any] = []
        self._sync = BufferSync(None)
        self._ended = False  # a training that was followed
        self._forget()

    def _forget(self) -> None:
        self._ranks = Ranks()
        self._drawn: Directions | None = None
        self._blocks: list[RunJets] = []  # of this process
        self._verified = False
        self._size: StepSize | None = None
        self._first: dict[str, tuple[Any, int]] = {}  # tensors with which all processes began, and their versions
        self._params: Mapping[str, Tensor] = {}  # with which training began
        self._names: dict[int, str] = {}  # of these, by `id`
        self._places: Places | None = None
        self._records: list[StepRecord] = []
        self._pending: StepRecord | None = None
        self._snapshot: OptimizerSnapshot | None = None
        self._tracked = TrackedTensors()
        self._gradients = TrackedTensors()
        self._attributes = AttributeWatch()
        self._readings = Readings()
        self._counts: Counts = {}
        self._state_tensors = 0
        self._optimizer: Optimizer | None = None
        self._held: Held | None = None  # by it
        self._depth = 0  # of calls of its `step`
        self._following = False
        self._first_step = 0  # the optimizer step that jets are carried from
        self._steps = 0  # the one that comes next
        self._last: StepRecord | None = None  # the first process's last micro-batch in the step that was carried last
        self._given_up = False
        self._loaded: dict[str, Any] | None = None  # from a checkpoint, until training starts

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before dataloaders are built: refuses what cannot be right, and starts to trace the batches."""
        if stage == "fit":
            check_trainer(trainer, pl_module, self._name)
            refuse_averaging(trainer, self._name)
            self._ended = False
            self._ranks = Ranks.of(trainer)
            self._units.ids.install(trainer)

    def _together(self, action: Callable[[], Any]) -> None:
        """Do something that may fail on one process only, and then raise on all."""
        error = None
        try:
            action()
        except Exception as e:
            error = e
        self._ranks.agree(error)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when optimizer and data exist: draws the directions, says the cost, begins to follow the run."""
        if self._loaded is None:
            check_start(
                trainer,
                self._name,
                "resume a checkpoint that was saved with this callback during training, after a step (at the end of "
                "`fit` it lets go of the coefficients), or ",
            )
        self._join(trainer, pl_module)
        self._following = True
        if self._loaded is not None:
            self._resume(pl_module, self._loaded)
        if self._given_up:
            self._give_step_back(pl_module)

    def _join(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stand between the Trainer and the user's step and optimizer; nothing is followed yet."""
        optimizer = check_optimizers(trainer.optimizers, module, self._name, _scaler(trainer))
        self._units.start(trainer)
        self._places = Places(module)
        self._params = self._places.params
        self._names = {id(p): name for name, p in self._params.items()}
        self._drawn = self._draw(trainer, module)
        self._state_tensors = count_state_tensors(optimizer)
        self._announce(trainer, module)
        self._optimizer = optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._enter_step()),
            optimizer.register_step_post_hook(lambda *_: self._leave_step(trainer, module)),
        ]
        self._sync = BufferSync(trainer.strategy.model)
        self._first = {name: (weakref.ref(t), t._version) for name, t in self._places.tensors.items()}
        self._take_step(module, lambda step, args: self._recorded(trainer, module, step, args))

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> Directions:
        """Return the directions; the number of units is known."""
        raise NotImplementedError

    def _announce(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Say what the directions that were drawn will cost."""
        raise NotImplementedError

    def _announce_memory(self, needed: int, passes: int) -> None:
        """Say what the first batch has shown: bytes at the peak, and passes a step, of this process."""

    def _after_step(self, module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Called when the jets have been carried through a step."""

    def _lost(self) -> str:
        """What becomes of the callback's purpose where the jets are given up: the end of a sentence."""
        raise NotImplementedError

    @override
    def state_dict(self) -> dict[str, Any]:
        """Called where a checkpoint is saved, on all processes: the coefficients so far, as tensors and primitives.

        Those of all processes are in that of the first, which Lightning writes. Empty inside an optimizer step, where
        an interruption leaves parameters and coefficients that are not of one moment, and after ``fit``.
        """
        if self._ended:
            rank_zero_info(
                f"{self._name}: training has ended and its coefficients are not in this checkpoint, so that it cannot "
                "be resumed with the callback: resume one that was saved during training (by `ModelCheckpoint`)."
            )
        if self._depth or self._pending is not None or (not self._verified and not self._given_up):
            return {}
        return {
            "version": 1,
            "run": self._run(),
            "steps": self._steps,
            "given_up": self._given_up,
            "data_order": self._ranks.share(self._units.order),
            "blocks": list(self._ranks.collect(block.state_dict() for block in self._without_gradients())),
        }

    def _without_gradients(self) -> list[RunJets]:
        """What a resumed run goes on from: gradients of an unfinished step are lost, what it left in buffers is not."""
        if not self._records:
            return self._blocks
        optimizer, places = self._optimizer, self._look()
        module: Any = places.module
        assert self._original is not None
        assert optimizer is not None
        records = self._shared(self._records)
        of_run = TrackedTensors()
        held = self._look_at(optimizer)
        snapshot = OptimizerSnapshot.capture(
            optimizer, held, self._names, self._tracked, of_run, places, self._counts, records[-1].buffers
        )
        blocks = [copy.copy(block) for block in self._blocks]
        with quiet(places, module.device) as start:
            for block in blocks:
                block.skip(start, module, self._original, self.weighting, records, snapshot)
        return blocks

    def _look(self) -> Places:
        """Where the module keeps what it has, now."""
        assert self._places is not None
        self._places = self._places.now()
        return self._places

    def _look_at(self, optimizer: Optimizer) -> Held:
        """What the optimizer holds, now."""
        self._held = Held(optimizer) if self._held is None else self._held.now(optimizer)
        return self._held

    def _shared(self, records: list[StepRecord]) -> list[StepRecord]:
        return records if self._ranks.size == 1 else share_records(records, self._changed(), self._ranks)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before training is resumed, when there is no optimizer yet."""
        self._loaded = state_dict or None

    def _run(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        assert self._drawn is not None
        directions = dict(self._drawn.recipe)
        if not {"explicit", "gradient"}.isdisjoint(directions["design"].split("+")):  # the recipe does not say all
            directions["checksum"] = self._drawn.checksum()
        return {
            "degree": self.degree,
            "directions": directions,
            "units": units_checksum(self._units.of_example),
            "normalization": self.weighting.normalization,
            "loss": self.weighting.name,
        }

    def _resume(self, module: pl.LightningModule, state: dict[str, Any]) -> None:
        """Take up the coefficients of a checkpoint.

        Raises:
            ConfigurationError: naming the argument that is not that of the run so far.
        """
        assert self._drawn is not None
        ours, theirs = self._run(), state["run"] if state.get("version") == 1 else {}
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ConfigurationError(
                    f"{self._name}: `{name}` is {value}, but the checkpoint was saved with {theirs.get(name)}: give "
                    "the arguments that training began with, or train from the beginning, without `ckpt_path`."
                )
        for saved in state["blocks"][self._ranks.rank :: self._ranks.size]:
            block = self._make_block(np.array(saved["indices"], dtype=np.int64), module)
            block.load_state_dict(saved)
            self._blocks.append(block)
        orders = state["data_order"]
        self._units.order = orders[self._ranks.rank] if len(orders) == self._ranks.size else joint_order(orders)
        self._steps, self._given_up, self._loaded = state["steps"], state["given_up"], None
        self._verified = bool(state["blocks"])
        self._tracked.note(self._look().tensors)

    def _make_blocks(self, step: StepSize, module: pl.LightningModule) -> Iterator[RunJets]:
        """This process's share of the directions; of one kind each, so that real ones cost half."""
        assert self._drawn is not None
        ranks = self._ranks
        real = self._drawn.real
        mine = np.argsort(real, kind="stable")[ranks.rank :: ranks.size]  # complex ones first, which cost most
        rows = {parts: mine[real[mine] == (parts == 1)] for parts in (1, 2)}
        measurements = sum(parts * len(r) for parts, r in rows.items())
        kept = step.state(measurements, self.degree)
        sizes = {
            parts: directions_per_pass(step, parts, self.degree, module.device, kept, ranks.on_device)
            if self.directions_per_pass == "auto"
            else int(self.directions_per_pass)
            for parts in rows
        }
        counts = {parts: len(r) for parts, r in rows.items()}
        needed = check_memory(step, counts, sizes, self.degree, module.device, self._units.num_units, ranks.on_device)
        self._announce_memory(needed, sum(-(-count // sizes[parts]) for parts, count in counts.items()))
        for parts, size in sizes.items():
            for start in range(0, len(rows[parts]), size):
                yield self._make_block(rows[parts][start : start + size], module)

    def _make_block(self, indices: np.ndarray, module: pl.LightningModule) -> RunJets:
        assert self._drawn is not None
        dtype = next(p.dtype for p in module.parameters() if p.requires_grad)
        return RunJets(indices, self._drawn.array[indices], self.degree, dtype, module.device, self._ranks.size)

    def _recorded(
        self, trainer: pl.Trainer, module: pl.LightningModule, step: Callable[..., Any], args: tuple[Any, ...]
    ) -> Any:
        """Run the user's ``training_step``, remembering what it starts from."""
        if not self._following:
            return step(*args)
        places = self._look()
        tensors = places.tensors
        if self._steps > self._first_step:
            self._tracked.refuse_new(tensors, self._steps)
        else:
            self._tracked.note({name: t for name, t in tensors.items() if name not in self._tracked.values})
        synchronized = self._sync.happened()
        if synchronized and not self._ranks.is_first:
            self._tracked.note(places.buffers)  # which the first process has checked
        held, frozen, rest = self._look_at(trainer.optimizers[0]).divide(places)
        for part in (held, frozen, rest):
            self._tracked.check(part, self._steps, self._readings)
        buffers = {name: self._tracked.values[name] for name in frozen}
        if rest:
            buffers |= self._tracked.copies_of(rest).clone().values
        units = self._units.of_batch(args[0]).to(module.device, non_blocking=True)
        micro_batches = trainer.accumulate_grad_batches * self._ranks.size
        outputs, self._pending = record_step(places, step, args, units, buffers, micro_batches)
        if self._pending is not None:  # what a step without a loss leaves there has no coefficients
            self._pending.foreign = self._attributes.changed(self._pending.module_state)
            self._pending.synchronized = synchronized
            self._pending.constant = frozenset(frozen)
            self._pending.left = self._attributes.note(self._look())
        return outputs

    @override
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Called where a new gradient begins: it has nothing of the micro-batches before."""
        self._records = []

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after every micro-batch, while the parameters are those that it saw."""
        if self._pending is None:
            return
        places = self._places
        assert places is not None
        others: Mapping[str, Tensor] = self._pending.buffers
        if places is not self._pending.module_state.places:
            _, not_trained, rest = self._look_at(trainer.optimizers[0]).divide(places)
            others = {**not_trained, **rest}
        present, frozen = places.read(others), self._pending.constant
        self._tracked.note({name: t for name, t in present.items() if name not in frozen})
        self._pending.constant = self._tracked.note_changed(
            {n: present[n] for n in others if n in frozen and n in present}
        )
        scaler = _scaler(trainer)
        if scaler is not None:  # a gradient is the mean over processes, as ours is by division of the loss
            count = torch.full((), self._ranks.size, dtype=torch.float32, device=pl_module.device)
            self._pending.loss_scale = scaler.scale(count)
        self._records.append(self._pending)
        if not self._verified:  # the first batch
            record = self._pending
            self._together(lambda: self._verify(pl_module, record))
            self._verified = True
        self._pending = None

    def _verify(self, module: pl.LightningModule, record: StepRecord) -> None:
        assert self._original is not None
        self._readings.read()
        params = dict(module.named_parameters())
        fraction = verify_weighting(module, self._original, self.weighting, record, params)
        self._size = measure_step(module, self._original, self.weighting, record, params, self._state_tensors)
        self._blocks = list(self._make_blocks(self._size, module))
        if fraction > 1e-6:
            rank_zero_info(
                f"{self._name}: {100 * fraction:.2g} % of the first batch's loss belongs to no example "
                "(regularisation?) and is kept in every counterfactual."
            )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Called before clipping and the update: copies what the update is a function of."""
        if self._records and optimizer is not self._optimizer:
            raise ConfigurationError(
                f"{self._name}: another optimizer (a {type(optimizer).__name__}) was put into `trainer.optimizers` "
                f"before optimizer step {self._steps}, and the Taylor coefficients are of the first one's state: keep "
                "it and change its `param_groups` (`lr`, `momentum`, `add_param_group`)."
            )
        if self._snapshot is not None:
            raise ConfigurationError(
                f"{self._name} does not support {type(optimizer).__name__}, whose steps evaluate the loss more than "
                "once: use StableAdamW or SGD."
            )
        if self._records:
            assert self._places is not None
            assert self._held is not None
            self._tracked.check(_state(optimizer, self._names), self._steps, self._readings)
            self._held = self._held.at_step(optimizer)
            self._snapshot = OptimizerSnapshot.capture(
                optimizer,
                self._held,
                self._names,
                self._tracked,
                self._gradients,
                self._places,
                self._counts,
                self._records[-1].buffers,
            )

    def _enter_step(self) -> None:
        self._depth += 1

    def _leave_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Called after a step has really happened, while ``global_step`` is still that of the step."""
        if self._depth == 1:  # an optimizer's `super().step()` has hooks too
            self._advance(trainer, module)
        self._depth -= 1

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called when a batch is done: follows a step that was announced but, by a loss scaler, not made."""
        if self._snapshot is not None and _scaler(trainer) is not None:
            self._follow(pl_module, lambda snapshot, records: self._skip(pl_module, snapshot, records))

    def _advance(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Follow the step that has just been made."""
        self._counts = {}
        snapshot = self._follow(module, lambda snapshot, records: self._carry(trainer, module, snapshot, records))
        if snapshot is None:
            return
        self._tracked.note(_state(snapshot.optimizer, self._names))
        self._steps += 1
        self._after_step(module, snapshot.optimizer)

    def _follow(
        self, module: pl.LightningModule, carry: Callable[[OptimizerSnapshot, list[StepRecord]], None]
    ) -> OptimizerSnapshot | None:
        """Give ``carry`` what was recorded of the step; return it if there is any, and a sketch still."""
        snapshot, records = self._snapshot, self._records
        self._snapshot, self._records = None, []
        if snapshot is None:
            return None
        try:
            records = self._shared(records)
            self._together(lambda: carry(snapshot, records))
            self._last = records[-self._ranks.size]
        except (InstabilityError, MemoryShortageError) as error:
            if self.on_instability == "stop":
                raise
            self._give_up(module, error)
        if self._given_up:
            collect_garbage()
            return None
        return snapshot

    def _changed(self) -> set[str]:
        """Names of the tensors that are not as all processes began with them."""
        tensors, first = self._look().tensors, self._first
        return {n for n, t in tensors.items() if n not in first or first[n][0]() is not t or first[n][1] != t._version}

    def _carry(
        self, trainer: pl.Trainer, module: pl.LightningModule, snapshot: OptimizerSnapshot, records: list[StepRecord]
    ) -> None:
        """Carry the coefficients through one step."""
        original, readings, step = self._original, self._readings, self._steps
        assert original is not None
        with lost_without_memory(step):
            made = MadeStep.capture(snapshot)

        def clip(twin: Optimizer) -> None:
            value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            module.configure_gradient_clipping(twin, gradient_clip_val=value, gradient_clip_algorithm=algorithm)

        def advance(block: RunJets, start: Start) -> None:
            found = block.advance(start, module, original, self.weighting, records, snapshot, clip, step, readings)
            with lost_without_memory(step):
                check_update(*found, snapshot, made, step, readings)

        self._counts = ask_counts(snapshot.optimizer, self._names, readings)
        self._in_passes(module, advance)
        if made.like_before:
            snapshot.copies.overwrite(made.params)
        else:
            self._tracked.note(dict(zip(snapshot.copies.values, snapshot.held, strict=True)))

    def _skip(self, module: pl.LightningModule, snapshot: OptimizerSnapshot, records: list[StepRecord]) -> None:
        """Carry the coefficients through a step without an update."""
        original = self._original
        assert original is not None
        self._tracked.check(self._look().params, self._steps, self._readings)
        self._in_passes(
            module, lambda block, start: block.skip(start, module, original, self.weighting, records, snapshot)
        )

    def _in_passes(self, module: pl.LightningModule, carry: Callable[[RunJets, Start], None]) -> None:
        """Call ``carry`` for every block, with fewer directions where memory does not suffice; read what was asked."""
        readings, done, places = self._readings, 0, self._places
        assert places is not None

        def fits(block: RunJets, start: Start) -> bool:
            """Whether there was memory for it; by returning, its gradients are let go of, or those of a failed pass."""
            mark = readings.mark()
            try:
                carry(block, start)
            except torch.OutOfMemoryError:
                readings.go_back(mark)
                return False
            return True

        with lost_without_memory(self._steps):
            try:
                with quiet(places, module.device) as start:
                    while done < len(self._blocks):
                        if fits(self._blocks[done], start):
                            done += 1
                        else:
                            self._halve(done)
            except Exception:
                readings.read()  # whose errors come first: this one may only follow from them
                raise
            readings.read()

    def _halve(self, first: int) -> None:
        """Split the block ``first``, for which memory does not suffice, and those after it that need as much.

        Raises:
            MemoryShortageError: if it is of one direction.
        """
        collect_garbage()
        _, parts, count = self._blocks[first].lead
        if count == 1:
            raise MemoryShortageError(
                f"The memory of the device does not suffice to carry one direction through optimizer step "
                f"{self._steps}: choose a lower `degree`, fewer `directions` (the coefficients of all of them stay on "
                "the device) or a smaller batch."
            )
        warnings.warn(
            f"{self._name}: the memory of the device does not suffice to carry {count} directions through optimizer "
            f"step {self._steps}, so they are carried in two passes from here on, which takes longer. "
            f"`directions_per_pass={(count + 1) // 2}` would begin with that.",
            stacklevel=2,
        )
        for i in reversed(range(first, len(self._blocks))):
            _, *size = self._blocks[i].lead
            if size[1] > 1 and size[0] * size[1] >= parts * count:
                self._blocks[i : i + 1] = self._blocks[i].split()

    def measure(
        self, module: pl.LightningModule, output: Callable[[Any, tuple[Any, ...]], Tensor]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Return what the jets say after the step that was carried last; called on all processes.

        Args:
            module: the user's LightningModule.
            output: gets the module and the arguments of the training step's last micro-batch (of the first process).

        Returns:
            The coefficients of the output, ``(R, K, *out)`` complex128; the directions, ``(K, n)`` complex128; and
            ``log2`` norms of the coefficients of every parameter, by name, ``(R, K)`` float64.
        """
        assert self._drawn is not None
        assert self._last is not None
        record, values = self._last, self._tracked.values
        tensors = {name: values[name] for name in self._look().tensors if name in values}
        found: list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]] = []

        def evaluate() -> None:
            with quiet(self._look(), module.device) as start:
                for block in self._blocks:
                    coefficients = block.evaluate(start, module, record, tensors, output)
                    found.append((block.indices, coefficients, block.norms()))

        self._together(evaluate)
        parts = [part for of_rank in self._ranks.share(found) for part in of_rank]
        order = np.argsort(np.concatenate([indices for indices, _, _ in parts]))
        names = {name for _, _, norms in parts for name in norms}
        unknown = {name: np.full((self.degree, 1), -np.inf) for name in names}

        def of_all(name: str) -> np.ndarray:
            rows = [np.broadcast_to(n.get(name, unknown[name]), (self.degree, len(i))) for i, _, n in parts]
            return np.concatenate(rows, axis=1)[:, order]

        coefficients = np.concatenate([c for _, c, _ in parts], axis=1)[:, order]
        return coefficients, self._drawn.array, {name: of_all(name) for name in sorted(names)}

    def _give_up(self, module: pl.LightningModule, error: Exception) -> None:
        """Leave the run alone from here on; the optimizer's hooks stay, which do nothing without a snapshot."""
        self._give_step_back(module)
        self._blocks, self._given_up = [], True
        self._tracked, self._gradients = TrackedTensors(), TrackedTensors()
        rank_zero_warn(f"{self._name}: {error} Training goes on; {self._lost()}.")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called at the end: puts everything back and lets go of the model."""
        super().teardown(trainer, pl_module, stage)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._sync.remove()
        self._ended = self._ended or self._steps > 0
        self._forget()
        give_back_freed_memory()


def _scaler(trainer: pl.Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """What an optimizer keeps in the shape of its parameters."""
    return {
        f"state[{names[id(p)]}][{key!r}]": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if id(p) in names and isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point()
    }
