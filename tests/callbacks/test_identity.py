"""A run with the callback is the run without it, to the last bit, and nothing is left behind."""

import gc
import random
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, data, fit, sketch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_sketch.optim import StableAdamW

CLASSES = 3


class Everything(pl.LightningModule):
    """Dropout, batch norm, mixup by numpy, metrics, logging, attributes, an optimizer with a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 8})
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, CLASSES))
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.metrics = MetricCollection([MulticlassAccuracy(CLASSES), MulticlassF1Score(CLASSES)])
        self.outputs: list[Tensor] = []
        self.table: dict[str, list[float]] = {"mix": []}
        self.count = 0

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        x = x.to(self.dtype)
        mix = float(np.random.beta(0.4, 0.4)) + 0.01 * random.random()
        other = torch.randperm(len(x))
        self.count += 1
        self.table["mix"].append(mix)
        logits = self.net(x + 0.1 * mix * torch.rand_like(x))
        loss = F.cross_entropy(logits, y, label_smoothing=0.1) * (1 + 1 / self.count)
        loss = loss + 0.01 * self.net[0].weight.square().sum() * int(other[0])
        self.accuracy(logits, y)
        self.metrics.update(logits, y)
        self.outputs.append(loss.detach())
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return {"loss": loss, "logits": logits.detach()}

    def on_train_epoch_end(self) -> None:
        self.log("mean_loss", torch.stack(self.outputs).mean())
        self.log_dict(self.metrics.compute())
        self.metrics.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x.to(self.dtype)), y))

    def configure_optimizers(self) -> Any:
        optimizer = StableAdamW(self.parameters(), lr=0.02, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(folder: Path, with_callback: bool, **options: Any) -> dict[str, Any]:
    """Train; return whatever can be compared."""
    logger = CSVLogger(folder, name="", version="")
    checkpoint = ModelCheckpoint(folder, monitor="val_loss", save_last=True, save_top_k=2, filename="{step}")
    callbacks: list[pl.Callback] = [checkpoint, LearningRateMonitor()]
    if with_callback:
        callbacks.insert(1, sketch(folder, 3, 2, design="sphere"))
    workers = options.pop("workers", 0)
    module, trainer = fit(
        Everything,
        callbacks,
        DataLoader(data(26), 4, shuffle=True, num_workers=workers, persistent_workers=workers > 0),
        val=DataLoader(data(8, seed=5), 4),
        epochs=3,
        logger=logger,
        enable_checkpointing=True,
        log_every_n_steps=1,
        **options,
    )
    random_numbers = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    return {
        "state": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "logged": (folder / "metrics.csv").read_text(),
        "metrics": dict(trainer.callback_metrics),
        "containers": (module.count, module.table, module.outputs),
        "metric states": [m.metric_state for m in module.modules() if hasattr(m, "metric_state")],
        "random": random_numbers,
        "saved": {k: saved[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")},
        "files": sorted(p.name for p in folder.glob("*.ckpt")),
        "keys": sorted(k for m in module.modules() for k in m.__dict__),
    }


def assert_same(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for k in a:
            assert_same(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (v, w) in enumerate(zip(a, b, strict=True)):
            assert_same(v, w, f"{path}[{i}]")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


OPTIONS = {
    "double": {},
    "single precision, accumulation, clipping by norm": {
        "precision": "32-true",
        "accumulate_grad_batches": 3,
        "gradient_clip_val": 0.1,
    },
    "autocast": {"precision": "bf16-mixed"},
    "workers, clipping by value, validation inside the epoch": {
        "workers": 2,
        "gradient_clip_val": 0.01,
        "gradient_clip_algorithm": "value",
        "val_check_interval": 0.5,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_run_is_the_same_to_the_last_bit(name, tmp_path):
    """Oracle: the run without the callback."""
    without = train(tmp_path / "without", False, **OPTIONS[name])
    with_callback = train(tmp_path / "with", True, **OPTIONS[name])
    assert without["logged"].count("\n") > 9
    assert (tmp_path / "with/sketch/sketch.json").exists()
    assert_same(with_callback, without)


class Fails(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 2:
            raise RuntimeError("the user's")
        return super().training_step(batch, batch_idx)


class Keep(pl.Callback):
    """Holds on to the Trainer's parts where ``fit`` does not return."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.trainer, self.module, self.strategy = trainer, pl_module, set(trainer.strategy.__dict__)
        self.keys = set(pl_module.__dict__)


@pytest.mark.parametrize("kind", [Classifier, Fails])
def test_nothing_is_left_behind(kind, tmp_path):
    """Oracle: attributes, hooks and sampler before training, also after an exception."""
    loader = DataLoader(data(), 4)
    sampler, keep = loader.batch_sampler, Keep()
    with nullcontext() if kind is Classifier else pytest.raises(RuntimeError, match="the user's"):
        fit(kind, [keep, sketch(tmp_path)], loader)
    optimizer = keep.trainer.optimizers[0]
    assert set(keep.module.__dict__) == keep.keys
    assert set(keep.trainer.strategy.__dict__) == keep.strategy
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert loader.batch_sampler is sampler
    assert keep.module.training_step.__func__ is kind.training_step


def test_the_callback_lets_go_of_the_model(tmp_path):
    """Oracle: a weak reference to the module dies while the callback lives."""
    callback = sketch(tmp_path)
    module, trainer = fit(Classifier, [callback])
    references = [weakref.ref(module), weakref.ref(trainer), weakref.ref(module.net[0].weight)]
    del callback.log, callback.log_dict  # which Lightning puts on every callback
    trainer.callbacks.clear()
    del module, trainer
    gc.collect()
    assert [r() for r in references] == [None, None, None]
    assert not callback._blocks
    assert not callback._records


def test_a_callback_may_be_used_again(tmp_path):
    """Oracle: the sketch of a callback of its own."""
    callback, again = sketch(tmp_path / "a"), sketch(tmp_path / "b")
    fit(Classifier, [callback], seed=5)
    fit(Classifier, [callback])
    fit(Classifier, [again])
    a, b = ((tmp_path / k / "sketch").glob("*.safetensors") for k in "ab")
    assert [p.read_bytes() for p in sorted(a)] == [p.read_bytes() for p in sorted(b)]


def test_a_step_set_on_the_instance_is_put_back(tmp_path):
    """Oracle: the function that the user had put there."""

    def step(batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(made[0].net(batch[0]), batch[1])

    made: list[Any] = []

    def make() -> Classifier:
        made[:] = [Classifier()]
        made[0].training_step = step
        return made[0]

    module, _ = fit(make, [sketch(tmp_path)])
    assert module.training_step is step
