"""``precision="16-mixed"``: scaled losses, steps that the scaler skips, coefficients beyond the range of float16."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, FEATURES, Classifier, fit, loader, overflowing, scaled, sketch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_sketch import ConfigurationError, Reweight, Sketch, StableAdamW

BATCHES, EPOCHS = 4, 5


class Scales(pl.Callback):
    """Notes by what the next loss is scaled."""

    def __init__(self) -> None:
        self.noted: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.noted.append(trainer.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.noted.append(trainer.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]

    @property
    def skips(self) -> list[int]:
        """Batches after which the scale fell, as it does if the step is skipped."""
        return [i for i, (a, b) in enumerate(pairwise(self.noted)) if b < a]


class Centred(Classifier):
    """What one step leaves in a buffer acts on the next, also if the step is skipped; all in float64."""

    lr = 0.03

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES)))
        self.register_buffer("centre", torch.zeros(6))
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.net[:3](batch[0])
        logits = self.net[3](hidden - 3 * self.centre)
        self.centre.mul_(0.7).add_(hidden.detach().mean(0), alpha=0.3)
        overflows = (BATCHES * self.current_epoch + batch_idx) % 5 == 0
        return F.cross_entropy(overflowing(logits) if overflows else logits, batch[1])


class CentredAdam(Centred):
    def configure_optimizers(self) -> Any:
        return StableAdamW(self.parameters(), lr=0.02, eps=1e-2)


class NotFinite(Centred):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if (self.current_epoch, batch_idx) == (1, 2) else loss


class NoLoss(Centred):
    """The second half of a pair whose step is left out, therefore, though no gradient overflows."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if (self.current_epoch, batch_idx) == (1, 3) else super().training_step(batch, batch_idx)


# module, options of the Trainer, batches after which steps are skipped, steps that are made
CASES: dict[str, tuple[type[Centred], dict[str, Any], list[int], int]] = {
    "momentum": (Centred, {}, [0, 5, 10, 15], 16),
    "accumulation": (Centred, {"accumulate_grad_batches": 2}, [1, 5, 11, 15], 6),
    "clipping": (Centred, {"gradient_clip_val": 0.05}, [0, 5, 10, 15], 16),
    "adaptive": (CentredAdam, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, [1, 5, 11, 15], 6),
    "loss not finite": (NotFinite, {}, [0, 5, 6, 10, 15], 15),
    "no loss": (NoLoss, {"accumulate_grad_batches": 2}, [1, 5, 11, 15], 5),
}


def train(kind: type[Centred], callback: pl.Callback, **options: Any) -> tuple[dict[str, Tensor], list[int]]:
    """Train; return what is floating point in the module, and after which batches steps were skipped."""
    scales = Scales()
    module, _ = fit(kind, [callback, scales], loader(4 * BATCHES), epochs=EPOCHS, **options, **scaled())
    return {name: t.detach() for name, t in module.state_dict().items() if t.is_floating_point()}, scales.skips


@pytest.mark.parametrize("name", CASES)
def test_coefficients_are_derivatives_of_runs_that_skip_steps(name: str, tmp_path: Path) -> None:
    """Oracle: differences of reweighted runs, in float64, which autocast leaves alone; the scaler is the run's."""
    kind, options, skips, steps = CASES[name]
    psi = np.random.default_rng(3).normal(size=4 * BATCHES)
    middle, skipped = train(kind, sketch(tmp_path, psi[None], 2), **options)
    assert skipped == skips
    found = Sketch.load(tmp_path / "sketch")
    assert found.steps == steps
    (shard,) = found.shards()
    for h, order, tolerance in ((1e-5, 1, 1e-7), (1e-3, 2, 1e-4)):
        runs = [train(kind, Reweight(weights=list(s * h * psi)), **options) for s in (1, -1)]
        assert all(run[1] == skips for run in runs)
        for key, value in middle.items():
            plus, minus = (run[0][key] for run in runs)
            expected = (plus - minus) / (2 * h) if order == 1 else (plus + minus - 2 * value) / (2 * h * h)
            off = shard.coefficients[key][order - 1, 0, 0] - expected
            assert float(off.abs().max()) < tolerance * max(float(expected.abs().max()), 1e-3), (key, order)


class Single(Classifier):
    """Matrix products in float16 under autocast, normalisation and loss in float32."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, CLASSES)
            )
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.net[0](batch[0].float())
        assert hidden.dtype == (torch.float16 if self.trainer.precision == "16-mixed" else torch.float32)
        return F.cross_entropy(self.net[1:](hidden), batch[1])

    def configure_optimizers(self) -> Any:
        return StableAdamW(self.parameters(), lr=0.02, eps=1e-3)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_the_run_is_the_same_to_the_last_bit(options: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the run without the callback, whose first scaled gradients overflow in float16."""
    runs = []
    for callbacks in ([sketch(tmp_path, 3, 2)], []):
        scales = Scales()
        module, trainer = fit(Single, [*callbacks, scales], epochs=4, **options, **scaled(2.0**22))
        assert scales.skips[:2] == ([1, 2] if options else [0, 1])
        assert len(scales.skips) <= len(scales.noted) // 2
        plugin: Any = trainer.precision_plugin
        state = trainer.optimizers[0].state_dict()["state"]
        runs.append(
            {
                **module.state_dict(),
                **{f"{i} {key}": value for i, of in state.items() for key, value in of.items()},
                "scaler": torch.tensor(list(plugin.scaler.state_dict().values())),
                "scales": torch.tensor(scales.noted),
                "random": torch.rand(3),
            }
        )
    ours, theirs = runs
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    assert (tmp_path / "sketch/sketch.json").exists()


def orders(dirpath: Path, direction: int = 0) -> Tensor:
    """All coefficients of the parameters along a real direction, ``(R, N)``, float64."""
    (shard,) = Sketch.load(dirpath / "sketch").shards()
    names = (name for name in sorted(shard.coefficients) if "running" not in name)
    return torch.cat([shard.coefficients[name][:, 0, direction].double().flatten(1) for name in names], 1)


def test_coefficients_of_a_run_in_half_precision(tmp_path: Path) -> None:
    """Oracles: the same run in float32; retraining in half precision, over steps large against its rounding.

    The largest coefficients of scaled gradients, and the orders of the second direction, are beyond float16.
    """
    units = [i % 6 for i in range(24)]
    psi = np.random.default_rng(0).normal(size=6)
    found = {}
    for name, options in (("half", scaled(2.0**16)), ("single", {"precision": "32-true"})):
        callback = sketch(tmp_path / name, np.stack([psi, 1e-6 * psi]), 2, units=units)
        middle, _ = fit(Single, [callback], loader(24), epochs=3, **options)
        found[name] = orders(tmp_path / name)
        tiny = orders(tmp_path / name, 1)
        assert tiny.isfinite().all()
        for r, power in ((0, 1e6), (1, 1e12)):
            assert (power * tiny[r] - found[name][r]).norm() < 1e-3 * found[name][r].norm()
        if name == "half":
            plain = parameters(middle)
    error = (found["half"] - found["single"]).norm(dim=1) / found["single"].norm(dim=1)
    assert error[0] < 0.01
    assert error[1] < 0.02
    radii = 0.3 * np.cos(np.pi * (np.arange(8) + 0.5) / 8)
    runs = [
        fit(Single, [Reweight(units, weights=list(r * psi))], loader(24), epochs=3, **scaled(2.0**16))[0] for r in radii
    ]
    moved = torch.stack([parameters(module) for module in runs]) - plain
    fitted = torch.linalg.lstsq(torch.as_tensor(radii[:, None] ** np.arange(1, 5)), moved).solution[0]
    print("against float32:", error, "against retraining:", (found["half"][0] - fitted).norm() / fitted.norm())
    assert (found["half"][0] - fitted).norm() < 0.02 * fitted.norm()


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for _, p in sorted(module.named_parameters())])


class Small(Single):
    """Its gradients are less than float16 holds, unless they are scaled."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 1e-8 * super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e7, momentum=0.9)


def test_scaling_saves_small_gradients(tmp_path: Path) -> None:
    """Oracle: the same run in float32."""
    psi = np.random.default_rng(0).normal(size=(1, 12))
    for name, options in (("half", scaled(2.0**36)), ("single", {"precision": "32-true"})):
        fit(Small, [sketch(tmp_path / name, psi, 2)], **options)
    half, single = orders(tmp_path / "half"), orders(tmp_path / "single")
    assert ((half - single).norm(dim=1) < 0.02 * single.norm(dim=1)).all()


def test_resumed(tmp_path: Path) -> None:
    """Oracle: the run that was never interrupted, to the last bit; the first step after resuming is skipped."""
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    options: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": tmp_path, "epochs": 4}
    whole, rest = Scales(), Scales()
    half = {"train": loader(20), **options}
    fit(Centred, [sketch(tmp_path / "whole", 2, 2), saving, whole], **half, **scaled())
    again = {**half, "checkpoint": tmp_path / "epoch=1.ckpt"}
    fit(Centred, [sketch(tmp_path / "rest", 2, 2), rest], **again, **scaled(1.0))
    assert whole.noted[10:] == rest.noted
    assert rest.skips
    a, b = (Sketch.load(tmp_path / name / "sketch") for name in ("whole", "rest"))
    assert a.steps == b.steps == 20 - len(whole.skips)
    for ours, theirs in zip(a.shards(), b.shards(), strict=True):
        for name, block in ours.scaled.items():
            assert torch.equal(theirs.scaled[name], block), name


class Fused(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), fused=True)


def test_fused_optimizers_are_refused(tmp_path: Path) -> None:
    """They see scaled gradients. Without a scaler they are supported."""
    with pytest.raises(ConfigurationError, match=r"16-mixed.*AdamW with `fused=True`.*use `fused=False`"):
        fit(Fused, [sketch(tmp_path)], **scaled())
    fit(Fused, [sketch(tmp_path)])
