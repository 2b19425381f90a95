"""``SketchCallback``: carry Taylor coefficients along the user's run and leave a sketch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sketch._sketch_format import JSON_NAME
from lightning_sketch.callbacks._carrying import CarriesJets
from lightning_sketch.callbacks._examples import joint_order
from lightning_sketch.directions import (
    Directions,
    first_order_error,
    make_directions,
    parse_design,
    plain_steps,
)
from lightning_sketch.errors import ConfigurationError, check_count
from lightning_sketch.features import UnitFeatures
from lightning_sketch.shadow.planning import (
    state_bytes,
    trained_bytes,
)
from lightning_sketch.shadow.unit_gradients import PROJECTION, CountSketch, project_gradients
from lightning_sketch.shadow.weighting import LossWeighting, Normalization, PerExampleLoss
from lightning_sketch.shadow.wrapping import (
    piecewise_linear,
)
from lightning_sketch.sketch import Shard, check_writable, module_types, write_sketch

# Optimizer steps after which the growth of the Taylor terms is looked at; and again after twice as many, four times ...
FIRST_LOOK = 10


class SketchCallback(CarriesJets):
    """Carry higher-order derivatives of training by deletion weights along an unchanged ``Trainer.fit``.

    Every optimizer step is run again on Taylor coefficients, along every direction ``psi``: order ``r`` of any
    parameter is ``(1/r!) d^r/dz^r`` of its value in a training where unit ``u`` has weight ``1 - psi_u z`` (Gunn, *How
    to sketch a learning algorithm*). The run itself is left alone: parameters, optimizer state, logs, metrics and
    random numbers are bit-identical. At the end of training the sketch is written to ``dirpath``.

    Under ``precision="16-mixed"`` coefficients are kept in float32. A step that the loss scaler skips is skipped, too:
    its loss need not be finite, and only what its batches leave in buffers and attributes is followed. Every
    counterfactual skips the steps of the run, though a retraining might skip others.

    Args:
        dirpath: directory that the sketch is written to.
        directions: number of random directions, or an explicit array ``(K, n)``, real or complex; in YAML nested lists.
        degree: highest order of the Taylor coefficients, from 1.
        design: ``"sphere"``, ``"orthonormal"``, ``"basis"``, ``"indicator"``, ``"gradient"``, ``"common"``, joined with
            ``+``; for example ``"basis+common"``.
        units: unit of every example of the train dataset (a user, a vendor, a document), ``-1`` = not deletable;
            ``None`` = one unit per example.
        deletion_sets: lists of units, for ``"indicator"``.
        features: for ``"gradient"``: ``dirpath`` of the :class:`GradientFeatures` of a pilot run; ``None`` takes the
            gradients at initialisation, in one pass over the train dataset.
        loss: ``"auto"``, or ``callable(module, batch) -> (B,)`` per-example losses whose mean is the training loss.
        ids: ``"auto"`` (the batch sampler is traced), a key of the batch, or ``callable(batch) -> (B,)`` rows of the
            dataset.
        normalization: ``"batch"`` divides a batch's weighted losses by its size, ``"remaining"`` by the sum of weights.
        directions_per_pass: how many directions one re-run of the step carries; ``"auto"`` measures the first step and
            keeps a pass in the allocator's cache (CPU) or in half of the free memory (GPU). Where a GPU has not enough
            memory for a pass, its directions are halved and the step is carried again.
        seed: of the random directions; two sketches of the same run with different seeds can be merged.
        every_n_train_steps: also write the sketch after every so many optimizer steps.
        on_instability: what to do when the loss or the coefficients are not finite any more, or memory does not suffice
            for one direction: ``"warn"`` gives up the sketch and lets training go on, ``"stop"`` raises.

    Attributes:
        planned_bytes: expected at the peak beside the model and its training, on this process; ``None`` before the
            first batch, on which it is measured.

    Raises:
        ConfigurationError: in the constructor, in ``setup`` or on the first batch, naming what is not supported.
        FidelityError: during training, if the tracked run is not the user's run.
        InstabilityError: during training, with ``on_instability="stop"``.
        MemoryShortageError: during training, with ``on_instability="stop"``.
        UnsupportedOperatorError: on the first batch, if an operator has no Taylor rule.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        directions: int | Sequence[Sequence[float]] | np.ndarray = 64,
        degree: int = 2,
        *,
        design: str = "orthonormal",
        units: Sequence[int] | np.ndarray | None = None,
        deletion_sets: Sequence[Sequence[int]] | None = None,
        features: str | os.PathLike[str] | None = None,
        loss: Literal["auto"] | PerExampleLoss = "auto",
        ids: Callable[[Any], Any] | str = "auto",
        normalization: Normalization = "batch",
        directions_per_pass: int | Literal["auto"] = "auto",
        seed: int = 0,
        every_n_train_steps: int | None = None,
        on_instability: Literal["warn", "stop"] = "warn",
    ) -> None:
        super().__init__(
            units,
            ids,
            degree=degree,
            loss=loss,
            normalization=normalization,
            directions_per_pass=directions_per_pass,
            on_instability=on_instability,
        )
        if every_n_train_steps is not None:
            check_count("every_n_train_steps", every_n_train_steps)
        if isinstance(directions, int):
            check_count("directions", directions)
            if "gradient" not in parse_design(design) and features is not None:
                raise ConfigurationError("`features` is given, which only the design 'gradient' uses: add it.")
        self.dirpath = os.fspath(dirpath)
        self.directions = directions
        self.design = design
        self.deletion_sets = deletion_sets
        self.features = features
        self.seed = seed
        self.every_n_train_steps = every_n_train_steps
        self.planned_bytes: int | None = None

    @override
    def _forget(self) -> None:
        super()._forget()
        self._leading: Tensor | None = None  # of the gradients at initialisation, (count, n)
        self._warned = False  # that the Taylor terms grow

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before dataloaders are built: refuses what cannot be right, and starts to trace the batches."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._together(lambda: check_writable(self.dirpath) if self._ranks.is_first else None)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Called where a checkpoint is saved, on all processes: the coefficients so far, as tensors and primitives."""
        state = super().state_dict()
        return {**state, "leading": self._leading} if state and self._leading is not None else state

    @override
    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> Directions:
        n, sets = self._units.num_units, self.deletion_sets
        return make_directions(
            self.directions,
            self.design,
            n,
            seed=self.seed,
            deletion_sets=sets,
            leading=lambda count: self._leading_directions(count, trainer, module),
        )

    def _leading_directions(self, count: int, trainer: pl.Trainer, module: pl.LightningModule) -> np.ndarray:
        of_example = self._units.of_example
        if self.features is not None:
            return UnitFeatures.load(self.features, of_example).leading_directions(count)
        if self._loaded is not None:  # the gradients at initialisation are gone
            self._leading = self._loaded.get("leading")
            if self._leading is None or len(self._leading) != count:
                raise ConfigurationError(
                    f"{self._name}: the checkpoint was saved without `design={self.design!r}`, `directions={count}`"
                    ": give the arguments that training began with."
                )
        else:
            plain, projection = LossWeighting(self.weighting.loss, "batch"), CountSketch(PROJECTION, self.seed)
            losses, found = project_gradients(trainer, module, plain, of_example, projection)
            features = UnitFeatures(found[None].numpy(), losses[None].numpy(), "", self.seed)
            self._leading = torch.from_numpy(features.leading_directions(count))
        return self._leading.numpy()

    @override
    def _announce(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert self._drawn is not None
        degree, n = self.degree, self._units.num_units
        real = int(self._drawn.real.sum())
        complex_ = self._drawn.num_directions - real
        measurements = real + 2 * complex_
        state = state_bytes(trained_bytes(module.parameters()), self._state_tensors, measurements, degree)
        cost = real * plain_steps(degree, real=True) + complex_ * plain_steps(degree, real=False)
        error = first_order_error(measurements, n)
        rank_zero_info(
            f"{self._name}: {n} units, {self._drawn.num_directions} directions ({real} real, {complex_} complex), "
            f"degree {degree}; {_bytes(state)} of state; a step costs up to {cost:.0f} plain steps; expected relative "
            f"sampling error of a first-order prediction for a random set of units: {error:.2f}."
        )
        kinks = piecewise_linear(module)
        if kinks:
            rank_zero_warn(
                f"{self._name}: {kinks[0]} is piecewise linear: derivatives are exact, but a deletion crosses "
                "kinks that no derivative sees, so predictions may be far off. Use a smooth activation (GELU, SiLU, "
                "Tanh) and average pooling where predictions matter."
            )
        random_only = set(self._drawn.recipe["design"].split("+")) <= {"sphere", "orthonormal"}
        if degree > 1 and random_only and measurements < n * (n + 1) // 2:
            rank_zero_warn(
                f"{self._name}: random directions measure {measurements} of the {n * (n + 1) // 2} dimensions of the "
                "second order, so orders above 1 of a single deletion, and their error bars, are rough. Use "
                "design='basis+common' or 'indicator' where interactions matter, or degree=1."
            )
        informed = not {"indicator", "gradient"}.isdisjoint(self._drawn.recipe["design"].split("+"))
        if error > 0.5 and not informed:
            rank_zero_warn(
                f"{self._name}: {measurements} measurements for {n} units predict a random deletion to a relative "
                f"error of about {error:.2f}. Group examples into fewer units with `units=`, measure more directions, "
                "or use another `design` ('indicator' for deletion sets known in advance, 'basis+common' for few "
                "units, 'gradient' for single examples)."
            )

    @override
    def _announce_memory(self, needed: int, passes: int) -> None:
        self.planned_bytes = needed
        rank_zero_info(
            f"{self._name}: {passes} {'pass' if passes == 1 else 'passes'} a step; up to about {_bytes(needed)} of "
            "memory beside the model and its training."
        )

    @override
    def _after_step(self, module: pl.LightningModule, optimizer: Optimizer) -> None:
        looks, rest = divmod(self._steps, FIRST_LOOK)
        if not rest and looks.bit_count() == 1 and not self._warned:
            self._warn_of_growth(f"after {self._steps} optimizer steps ")
        if self.every_n_train_steps and self._steps % self.every_n_train_steps == 0:
            self._write(module, optimizer)

    @override
    def _lost(self) -> str:
        steps = self._steps - self._steps % self.every_n_train_steps if self.every_n_train_steps else 0
        if steps:
            return f"the sketch of step {steps} stays in `{self.dirpath}`"
        older = os.path.exists(os.path.join(self.dirpath, JSON_NAME))
        return "the sketch is not written" + f", and that of an earlier run stays in `{self.dirpath}`" * older

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called at the regular end of training: writes the sketch."""
        if self._given_up:
            return
        if not self._steps or trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(f"{self._name}: no sketch was written to `{self.dirpath}`, since this was no training.")
            return
        self._together(self._readings.read)
        self._write(pl_module, trainer.optimizers[0])
        self._warn_of_growth("")

    def _warn_of_growth(self, when: str) -> None:
        growth = max(self._ranks.share(max((_growth(block.norms()) for block in self._blocks), default=0.0)))
        if growth > 1:
            self._warned = True
            rank_zero_warn(
                f"{self._name}: {when}the Taylor terms of the parameters grow with the order (the last is "
                f"{growth:.2g} times the first along a typical direction), so predictions of a whole unit are not to "
                "be trusted. Usual cures: a smaller learning rate, StableAdamW with eps=1e-3 instead of Adam, smooth "
                "activations, smaller units, float64."
            )

    def _write(self, module: pl.LightningModule, optimizer: Optimizer) -> None:
        drawn = self._drawn
        assert drawn is not None
        # as the last step left them: another callback may average parameters at the end
        last = self._tracked.values
        primal = {name: last[name].cpu().contiguous() for name in self._look().tensors if name in last}
        orders = self._ranks.share(self._units.order)
        shards = self._ranks.collect(
            Shard(block.indices, {name: c.cpu() for name, c in block.coefficients(primal).items()}, block.exponents)
            for block in self._blocks
        )

        def write() -> None:
            try:
                if self._ranks.is_first:
                    write_sketch(
                        self.dirpath,
                        primal=primal,
                        shards=shards,
                        directions=drawn,
                        unit_of_example=self._units.of_example,
                        degree=self.degree,
                        normalization=self.weighting.normalization,
                        steps=self._steps,
                        data_order=joint_order(orders),
                        optimizer=type(optimizer).__qualname__,
                        loss=self.weighting.name,
                        modules=module_types(module),
                    )
            finally:  # what the other processes carry must leave them, also where it cannot be written
                deque(shards, maxlen=0)

        self._together(write)


def _growth(norms: dict[str, np.ndarray]) -> float:
    """Norm of all coefficients of the last order over that of the first, the median over directions."""
    squares = 2 * np.stack(list(norms.values())) if norms else np.zeros((0, 1, 1))
    if squares.shape[1] == 1:
        return 0.0
    logs = np.logaddexp2.reduce(squares, axis=0) / 2  # (R, k)
    with np.errstate(invalid="ignore"):
        ratios = np.where(np.isfinite(logs[-1]), logs[-1] - logs[0], -np.inf)
    return float(np.exp2(np.sort(ratios)[(len(ratios) - 1) // 2]))


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError
