"""What the sketch and the ground truth must agree on: the units of every batch, taken around ``training_step``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_sketch.directions import count_units, resolve_units
from lightning_sketch.errors import ConfigurationError
from lightning_sketch.shadow.example_ids import ExampleIds
from lightning_sketch.shadow.wrapping import count_examples, unwrap_training_step, wrap_training_step

_HASHED_AT_ONCE = 100  # batches


class BatchUnits:
    """Follows the batches of a run and tells the unit of each of their examples.

    Args:
        units: unit of every example of the train dataset, -1 = not deletable; ``None`` for one unit per example.
        ids: ``"auto"``, a key of the batch, or ``callable(batch) -> (B,)`` integers.
    """

    def __init__(self, units: Sequence[int] | np.ndarray | None, ids: Callable[[Any], Any] | str) -> None:
        self.given = units
        self.ids = ExampleIds(ids)
        self.of_example = np.zeros(0, dtype=np.int64)
        self._order = ""
        self._unhashed: list[bytes] = []  # rows of the batches since: many are hashed in less time than one by one
        self._traced: list[int] | None = None

    def start(self, trainer: Any) -> None:
        """Read the size of the train dataset; called when the dataloaders exist.

        Raises:
            ConfigurationError: if the dataloader does not tell the rows of its batches, or ``units`` do not fit.
        """
        self.order = ""
        self.ids.check(trainer)
        self.of_example = resolve_units(self.given, count_examples(trainer, self.given))

    @property
    def order(self) -> str:
        """SHA-256 of the rows of all batches so far, in their order; empty before the first."""
        for rows in self._unhashed:
            self._order = hashlib.sha256(self._order.encode() + rows).hexdigest()
        self._unhashed = []
        return self._order

    @order.setter
    def order(self, order: str) -> None:
        self._order, self._unhashed = order, []

    @property
    def num_units(self) -> int:
        """Number of deletion units."""
        return count_units(self.of_example)

    def next_batch(self, trainer: Any, batch_idx: int) -> None:
        """Called for every training batch, in order."""
        self._traced = self.ids.next_batch(trainer, batch_idx)

    def of_batch(self, batch: Any) -> Tensor:
        """Return the unit of every example, int64 ``(B,)``, on the CPU; called once for every batch.

        Raises:
            ConfigurationError: if an example is not a row of the dataset.
        """
        ids = self.ids.of_batch(batch, self._traced).numpy()
        unknown = ids[(ids < 0) | (ids >= len(self.of_example))]
        if len(unknown):
            raise ConfigurationError(
                f"`ids` gave example {unknown[0]}, but the train dataset has examples 0 to "
                f"{len(self.of_example) - 1}: make `ids` return rows of the train dataset."
            )
        self._unhashed.append(ids.astype("<i8").tobytes())
        if len(self._unhashed) == _HASHED_AT_ONCE:
            _ = self.order
        return torch.from_numpy(self.of_example[ids])


def joint_order(orders: Sequence[str]) -> str:
    """Return the SHA-256 over ``BatchUnits.order`` of all processes, by rank."""
    return hashlib.sha256("".join(orders).encode()).hexdigest()


class AroundTrainingStep(pl.Callback):
    """Takes the place of ``training_step`` for one fit, and knows the units of its batches.

    Args:
        units: as in :class:`BatchUnits`.
        ids: as in :class:`BatchUnits`.
    """

    def __init__(self, units: Sequence[int] | np.ndarray | None, ids: Callable[[Any], Any] | str) -> None:
        self._units = BatchUnits(units, ids)
        self._original: Callable[..., Any] | None = None

    def _take_step(
        self, module: pl.LightningModule, around: Callable[[Callable[..., Any], tuple[Any, ...]], Any]
    ) -> None:
        self._original = wrap_training_step(module, around)

    def _give_step_back(self, module: pl.LightningModule) -> None:
        if self._original is not None:
            unwrap_training_step(module, self._original)
            self._original = None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called for every batch: takes note of its examples."""
        self._units.next_batch(trainer, batch_idx)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called at the end: puts everything back."""
        self._units.ids.remove()
        self._give_step_back(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called where training fails, when Lightning calls no ``teardown``."""
        self.teardown(trainer, pl_module, "fit")
