"""``Reweight``: really train without some units, the ground truth of every prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from typing_extensions import override

from lightning_sketch.callbacks._examples import AroundTrainingStep
from lightning_sketch.errors import ConfigurationError
from lightning_sketch.shadow.weighting import LossWeighting, Normalization, PerExampleLoss
from lightning_sketch.shadow.wrapping import check_start, check_trainer


class Reweight(AroundTrainingStep):
    """Train with some units deleted or reweighted: same batches, same random numbers, same normalisation.

    Example ``i`` of unit ``u`` enters the training loss with weight ``1 - x_u``. Unlike the other callbacks this one
    changes the run; it needs the same seeds, model and data as the run whose counterfactual it is.

    Args:
        units: unit of every example of the train dataset, ``-1`` = not deletable; ``None`` = one unit per example.
        delete: units to delete (``x_u = 1``).
        weights: deletion weights ``x``, shape ``(n,)``, instead of ``delete``; fractions downweight, negative ones
            up-weight.
        loss: as in :class:`SketchCallback`.
        ids: as in :class:`SketchCallback`.
        normalization: ``"batch"`` divides a batch's weighted losses by its size, ``"remaining"`` by the sum of weights.

    Raises:
        ConfigurationError: in ``setup`` or on the first batch, if the setup cannot be reweighted.
    """

    def __init__(
        self,
        units: Sequence[int] | np.ndarray | None = None,
        delete: Sequence[int] = (),
        *,
        weights: Sequence[float] | None = None,
        loss: Literal["auto"] | PerExampleLoss = "auto",
        ids: Callable[[Any], Any] | str = "auto",
        normalization: Normalization = "batch",
    ) -> None:
        super().__init__(units, ids)
        if not hasattr(delete, "__len__"):
            raise ConfigurationError(f"`delete` must be a list of units but is {delete!r}.")
        if weights is not None and len(delete):
            raise ConfigurationError("`delete` and `weights` exclude each other: give one of them.")
        self.delete = list(delete)
        self.weights = weights
        self.weighting = LossWeighting(loss, normalization)
        self._kept = torch.zeros(0)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before dataloaders are built: starts to trace them."""
        if stage == "fit":
            check_trainer(trainer, pl_module, "Reweight")
            self._units.ids.install(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the train dataset is known: reads the deletion and takes the place of ``training_step``."""
        check_start(trainer, "Reweight")
        self._units.start(trainer)
        n = self._units.num_units
        x = np.zeros(n)
        if self.weights is not None:
            x = np.asarray(self.weights, dtype=np.float64)
            if x.shape != (n,) or not np.isfinite(x).all():
                raise ConfigurationError(
                    f"`weights` must be {n} finite numbers, one per unit, but has shape {x.shape}."
                )
        elif any(not 0 <= u < n for u in self.delete):
            raise ConfigurationError(f"`delete` must name units 0 to {n - 1} but is {self.delete}.")
        x[self.delete] = 1
        # a last entry for examples of unit -1
        self._kept = torch.as_tensor(np.append(1 - x, 1.0)).to(next(pl_module.parameters()).dtype)
        self._take_step(pl_module, lambda step, args: self._weighted(pl_module, step, args))

    def _weighted(self, module: pl.LightningModule, step: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        kept = self._kept[self._units.of_batch(args[0])]  # on the CPU, where a look at it costs no wait for the device
        weighting = self.weighting
        if weighting.normalization == "remaining" and not bool(kept.any()):
            weighting = LossWeighting(weighting.loss, "batch")  # nothing is left of this batch: its loss is zero
        return weighting(module, step, args, kept.to(module.device, non_blocking=True))
