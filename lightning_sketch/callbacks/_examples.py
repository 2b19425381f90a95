"""Units of the examples of every training batch: what the sketch and the ground truth must agree on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sketch.directions import count_units, resolve_units
from lightning_sketch.errors import ConfigurationError
from lightning_sketch.shadow.example_ids import ExampleIds
from lightning_sketch.shadow.wrapping import count_examples


class BatchUnits:
    """Follows the batches of a run and tells the unit of each of their examples.

    Args:
        units: unit of every example of the train dataset, -1 = not deletable; ``None`` for one unit per example.
        ids: ``"auto"``, a key of the batch, or ``callable(batch) -> (B,)`` integers.
    """

    def __init__(self, units: Sequence[int] | None, ids: Callable[[Any], Any] | str) -> None:
        self.given = units
        self.ids = ExampleIds(ids)
        self.of_example = np.zeros(0, dtype=np.int64)
        self._traced: list[int] | None = None

    def start(self, trainer: Any) -> None:
        """Read the size of the train dataset; called when the dataloaders exist."""
        self.of_example = resolve_units(self.given, count_examples(trainer, self.ids, self.given))

    @property
    def num_units(self) -> int:
        """Number of deletion units."""
        return count_units(self.of_example)

    def next_batch(self, trainer: Any, batch_idx: int) -> None:
        """Called for every training batch, in order."""
        self._traced = self.ids.next_batch(trainer, batch_idx)

    def of_batch(self, batch: Any) -> Tensor:
        """Return the unit of every example, int64 ``(B,)``.

        Raises:
            ConfigurationError: if an example is not a row of the dataset.
        """
        ids = self.ids.of_batch(batch, self._traced)
        unknown = (ids < 0) | (ids >= len(self.of_example))
        if bool(unknown.any()):
            raise ConfigurationError(
                f"`ids` gave example {int(ids[unknown][0])}, but the train dataset has examples 0 to "
                f"{len(self.of_example) - 1}: make `ids` return rows of the train dataset."
            )
        return torch.as_tensor(self.of_example)[ids]
