"""Small trainings for the tests of the Lightning side."""

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import Reweight, Sketch, SketchCallback

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

FEATURES, CLASSES = 5, 3

# What every Trainer of the tests is given: nothing printed, nothing written.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def data(size: int = 12, seed: int = 0) -> TensorDataset:
    """Inputs ``(size, FEATURES)`` in float64 and classes ``(size,)``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, FEATURES, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, CLASSES, (size,), generator=generator))


def loader(size: int = 12, batch_size: int = 4, **options: Any) -> DataLoader:
    """Batches of :func:`data`."""
    return DataLoader(data(size), batch_size=batch_size, **options)


def network(width: int = 6) -> nn.Sequential:
    """A small smooth classifier."""
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, CLASSES))


class Classifier(pl.LightningModule):
    """Cross-entropy on :func:`data`; tests override what they are about."""

    lr = 0.1

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = network() if net is None else net

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def overflowing(x: Tensor) -> Tensor:
    """The identity in float64, through which gradients of losses overflow that were scaled by more than 2^100."""
    return x * 1e-280 * 1e280


def scaled(init_scale: float = 2.0**120) -> dict[str, Any]:
    """Trainer options: float16 autocast on a CPU, which leaves float64 alone, with a loss scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return {"precision": None, "plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}


def fit(
    make: Callable[[], pl.LightningModule],
    callbacks: Sequence[pl.Callback] = (),
    train: Any = None,
    *,
    val: Any = None,
    epochs: int = 2,
    seed: int = 1,
    checkpoint: Path | None = None,
    **options: Any,
) -> tuple[pl.LightningModule, pl.Trainer]:
    """Train in float64 from a seed, or resume a checkpoint; return module and Trainer."""
    pl.seed_everything(seed, verbose=False)
    module = make()
    given: dict[str, Any] = {
        "max_epochs": epochs,
        "precision": "64-true",
        **QUIET,
        **options,
    }
    trainer = pl.Trainer(callbacks=list(callbacks), **given)
    if isinstance(train, pl.LightningDataModule):
        trainer.fit(module, datamodule=train)
    else:
        trainer.fit(module, loader() if train is None else train, val, ckpt_path=checkpoint)
    return module, trainer


def sketch(dirpath: Path, directions: Any = 2, degree: int = 1, **options: Any) -> SketchCallback:
    """A cheap callback: one unit in ``dirpath``'s sketch per example unless said otherwise."""
    return SketchCallback(dirpath / "sketch", directions, degree, **options)


def first_order(
    make: Callable[[], pl.LightningModule],
    dirpath: Path,
    train: Callable[[], Any] = loader,
    num_units: int = 12,
    callback: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """First-order coefficients of parameters along one direction, and central differences of retraining along it.

    ``callback`` holds arguments of both callbacks; ``options`` are those of :func:`fit`.
    """
    callback = callback or {}
    psi = np.random.default_rng(3).normal(size=num_units)
    fit(make, [sketch(dirpath, psi[None], **callback)], train(), **options)
    (shard,) = Sketch.load(dirpath / "sketch").shards()
    h = 1e-5
    runs = (fit(make, [Reweight(weights=s * h * psi, **callback)], train(), **options)[0] for s in (1, -1))
    plus, minus = (dict(module.named_parameters()) for module in runs)
    difference = {name: (p - minus[name]).detach() / (2 * h) for name, p in plus.items()}
    ours = {name: shard.coefficients[name][0, 0, 0] for name in difference if name in shard.coefficients}
    return ours, difference


def assert_first_order(*args: Any, **options: Any) -> None:
    """Require the coefficients of a run to be its derivative."""
    ours, truth = first_order(*args, **options)
    for name, value in truth.items():
        found = ours.get(name, torch.zeros_like(value))
        scale = max(float(value.abs().max()), 1e-3)
        assert float((found - value).abs().max()) < 1e-6 * scale, name
