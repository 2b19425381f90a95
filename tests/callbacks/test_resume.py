"""A run that is resumed from a checkpoint ends with the sketch of the run that was never interrupted."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import FEATURES, Classifier, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_sketch import ConfigurationError, Reweight, Sketch, SketchCallback, StableAdamW

UNITS = [i % 4 for i in range(12)]
EPOCHS = 4


class Normalised(Classifier):
    """With running statistics, optimizer state and a schedule."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
        self.double()  # before the Trainer would: it restores optimizer state in the dtype that parameters have then

    def configure_optimizers(self) -> Any:
        optimizer = StableAdamW(self.parameters(), lr=0.02, eps=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def callback(dirpath: Path, **changed: Any) -> SketchCallback:
    options = {"directions": 3, "degree": 2, "design": "sphere+common", "units": UNITS, "directions_per_pass": 2}
    return SketchCallback(dirpath, **{**options, **changed})


def resume(checkpoint: Path, *callbacks: pl.Callback, epochs: int = EPOCHS) -> pl.LightningModule:
    return fit(Normalised, callbacks, epochs=epochs, seed=9, checkpoint=checkpoint)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with a checkpoint of every epoch."""
    dirpath = tmp_path_factory.mktemp("run")
    saving = ModelCheckpoint(dirpath, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    module, _ = fit(Normalised, [callback(dirpath / "sketch"), saving], epochs=EPOCHS, enable_checkpointing=True)
    torch.save(module.state_dict(), dirpath / "final.pt")
    return dirpath


@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_the_sketch_is_that_of_the_whole_run(run: Path, epoch: int, tmp_path: Path) -> None:
    """Oracle: the run that was never interrupted, to the last bit."""
    module = resume(run / f"epoch={epoch}.ckpt", callback(tmp_path / "sketch"))
    for name, value in torch.load(run / "final.pt").items():
        assert torch.equal(module.state_dict()[name], value), name
    whole, resumed = Sketch.load(run / "sketch"), Sketch.load(tmp_path / "sketch")
    assert resumed.steps == whole.steps == 3 * EPOCHS
    assert resumed.metadata["data_order"] == whole.metadata["data_order"]
    assert np.array_equal(resumed.exponents, whole.exponents)
    for a, b in zip(resumed.shards(), whole.shards(), strict=True):
        assert np.array_equal(a.indices, b.indices)
        assert set(a.scaled) == set(b.scaled)
        for name, value in b.scaled.items():
            assert torch.equal(a.scaled[name], value), name
            assert value.any()


def test_the_state_is_of_tensors_and_primitives(run: Path) -> None:
    """Oracle: torch's loader that runs no code."""
    state = torch.load(run / "epoch=1.ckpt", weights_only=True)["callbacks"]["SketchCallback"]
    assert state["steps"] == 6
    assert len(state["blocks"]) == 4  # one common direction, and the others by two


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"degree": 3}, "degree"),
        ({"seed": 1}, "directions"),
        ({"directions": 4}, "directions"),
        ({"directions": np.ones((2, 4))}, "directions"),
        ({"units": UNITS[::-1]}, "units"),
        ({"normalization": "remaining"}, "normalization"),
    ],
)
def test_other_arguments_are_refused(run: Path, changed: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"`{name}` is .*the checkpoint was saved with.*`ckpt_path`"):
        resume(run / "epoch=0.ckpt", callback(tmp_path, **changed))
    assert not (tmp_path / "sketch.json").exists()


def test_a_checkpoint_without_our_state_is_refused(tmp_path: Path) -> None:
    _, trainer = fit(Normalised, epochs=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(
        ConfigurationError, match=r"first step.*starts at step 3: resume a checkpoint that was saved with this callback"
    ):
        resume(tmp_path / "run.ckpt", callback(tmp_path))


def test_explicit_directions_are_compared(tmp_path: Path) -> None:
    """Oracle: the whole run."""
    psi = np.random.default_rng(0).normal(size=(2, 4))
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    options: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": tmp_path, "epochs": 2}
    fit(Normalised, [callback(tmp_path / "whole", directions=psi), saving], **options)
    resume(tmp_path / "epoch=0.ckpt", callback(tmp_path / "part", directions=psi), epochs=2)
    for a, b in zip(*(Sketch.load(tmp_path / name).shards() for name in ("whole", "part")), strict=True):
        for name, value in a.scaled.items():
            assert torch.equal(b.scaled[name], value)
    with pytest.raises(ConfigurationError, match="`directions` is"):
        resume(tmp_path / "epoch=0.ckpt", callback(tmp_path / "other", directions=2 * psi), epochs=2)


class NotANumber(Normalised):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (float("nan") if self.global_step == 1 else 1.0)


def test_a_sketch_that_was_given_up_stays_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Training goes on"):
        fit(NotANumber, [callback(tmp_path / "a", directions_per_pass="auto"), Saves(tmp_path)], epochs=1)
    resume(tmp_path / "end.ckpt", callback(tmp_path / "b"), epochs=2)
    assert not (tmp_path / "b/sketch.json").exists()


def test_a_checkpoint_after_training_says_that_it_has_no_coefficients(tmp_path: Path, caplog: Any) -> None:
    """Oracle: the words, when it is saved and when it is resumed."""
    _, trainer = fit(Normalised, [callback(tmp_path / "a")], epochs=1)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer.save_checkpoint(tmp_path / "late.ckpt")
    assert "its coefficients are not in this checkpoint" in caplog.text
    with pytest.raises(ConfigurationError, match="saved with this callback during training"):
        resume(tmp_path / "late.ckpt", callback(tmp_path / "b"), epochs=2)


class Saves(pl.Callback):
    def __init__(self, dirpath: Path) -> None:
        self.dirpath = dirpath

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.dirpath / "end.ckpt")


class SavesOnce(pl.Callback):
    """A checkpoint after one batch, wherever in an accumulation that is."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("batch", [1, 4])
def test_running_statistics_of_an_unfinished_step_are_kept(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: central differences of reweighted trainings, which lose the unfinished step's gradients as well."""
    monkeypatch.setattr("lightning_sketch.callbacks.reweight.check_start", lambda *_: None)
    psi = np.random.default_rng(0).normal(size=4)
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "epochs": 2}

    def through_a_checkpoint(name: str, make: Any) -> pl.LightningModule:
        path = tmp_path / name / "one.ckpt"
        fit(Normalised, [make(), SavesOnce(path, batch)], loader(batch_size=2), **options)
        return fit(Normalised, [make()], loader(batch_size=2), seed=9, checkpoint=path, **options)[0]

    through_a_checkpoint("sketch", lambda: callback(tmp_path / "sketch", directions=psi[None], degree=1))
    (shard,) = Sketch.load(tmp_path / "sketch").shards()
    h = 1e-5
    plus, minus = (
        through_a_checkpoint(str(s), lambda s=s: Reweight(UNITS, weights=s * h * psi)).state_dict() for s in (1, -1)
    )
    for name, values in plus.items():
        if values.is_floating_point():
            ours = np.ldexp(shard.scaled[name][0, 0, 0].numpy(), -int(shard.exponents[0]))
            np.testing.assert_allclose(ours, (values - minus[name]) / (2 * h), rtol=1e-6, atol=1e-8, err_msg=name)
