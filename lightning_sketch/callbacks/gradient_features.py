"""``GradientFeatures``: record which units have similar gradients, for directions and priors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_sketch.directions import resolve_units, units_checksum
from lightning_sketch.errors import ConfigurationError, check_count
from lightning_sketch.features import UnitFeatures
from lightning_sketch.shadow.unit_gradients import CountSketch, project_gradients
from lightning_sketch.shadow.weighting import LossWeighting, PerExampleLoss
from lightning_sketch.shadow.wrapping import check_start, check_trainer, count_examples


class GradientFeatures(pl.Callback):
    """Record randomly projected gradients of every unit, and its losses, at a few points of training.

    Their inner products tell which units act alike. ``SketchCallback(design="gradient", features=dirpath)`` measures
    along their leading eigenvectors, and ``DeletionPredictor(..., features=dirpath)`` may take them for a prior, in
    which influence functions are a mean. Each point costs one pass over the train dataset and, for each batch, as
    much as a direction of degree 1 for each of its units. The run itself is left alone.

    Args:
        dirpath: directory that the features are written to.
        at: points of training, as fractions of its optimizer steps; 0 is the initialisation, 1 the end.
        projection: numbers kept for each unit and point.
        units: as in :class:`SketchCallback`, whose units they must be.
        loss: as in :class:`SketchCallback`.
        seed: of the random projections.

    Raises:
        ConfigurationError: in the constructor, in ``setup`` or at the first point, naming what is not supported.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        at: Sequence[float] = (0.125, 0.25, 0.5, 1.0),
        projection: int = 1024,
        *,
        units: Sequence[int] | np.ndarray | None = None,
        loss: Literal["auto"] | PerExampleLoss = "auto",
        seed: int = 0,
    ) -> None:
        points = sorted(set(map(float, at)))
        if not points or not all(0 <= a <= 1 for a in points):
            raise ConfigurationError(f"`at` is {list(at)}: give fractions of training between 0 and 1.")
        check_count("projection", projection)
        self.dirpath = os.fspath(dirpath)
        self.at = points
        self.projection = projection
        self.units = units
        self.seed = seed
        self.weighting = LossWeighting(loss, "batch")
        self._forget()

    def _forget(self) -> None:
        self._of_example = np.zeros(0, dtype=np.int64)
        self._due: list[int] = []  # optimizer steps of the points to come
        self._loaded = False
        self._features: list[torch.Tensor] = []  # one a point, (n, m)
        self._losses: list[torch.Tensor] = []  # one a point, (n,)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before dataloaders are built: refuses what cannot be right."""
        if stage == "fit":
            check_trainer(trainer, pl_module, "GradientFeatures")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the train dataset is known."""
        self._of_example = resolve_units(self.units, count_examples(trainer, self.units))
        steps = trainer.estimated_stepping_batches
        if not np.isfinite(steps):
            raise ConfigurationError("GradientFeatures: training has no end to take fractions of: set `max_steps`.")
        if not self._loaded:
            check_start(trainer, "GradientFeatures", "resume a checkpoint that was saved with this callback, or ")
            self._due = [round(a * int(steps)) for a in self.at]
        self._take(trainer, pl_module, trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after every batch: takes the points that have been reached."""
        self._take(trainer, pl_module, trainer.global_step)

    def _take(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        while self._due and self._due[0] <= step:
            self._due.pop(0)
            projection = CountSketch(self.projection, self.seed)
            losses, gradients = project_gradients(trainer, module, self.weighting, self._of_example, projection)
            self._losses.append(losses)
            self._features.append(gradients)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called at the regular end of training: takes the last point, and writes."""
        if len(self._due) > 1:
            rank_zero_warn(
                f"GradientFeatures: training ended before {len(self._due) - 1} of the points `at` were reached."
            )
        if self._due:
            self._due = self._due[-1:]
            self._take(trainer, pl_module, self._due[0])
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            features, losses = torch.stack(self._features).numpy(), torch.stack(self._losses).numpy()
            UnitFeatures(features, losses, units_checksum(self._of_example), self.seed).save(self.dirpath)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Called where a checkpoint is saved: the features so far, as tensors and primitives."""
        return {"due": list(self._due), "features": list(self._features), "losses": list(self._losses)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before training is resumed."""
        self._due, self._features, self._losses = state_dict["due"], state_dict["features"], state_dict["losses"]
        self._loaded = True

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called at the end."""
        self._forget()
