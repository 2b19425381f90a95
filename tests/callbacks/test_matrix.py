"""What users put around a training: every cell is right by central differences of retraining, or is refused."""

import warnings
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FEATURES, QUIET, Classifier, assert_first_order, data, fit, loader, sketch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
)
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_sketch import Reweight, Sketch
from lightning_sketch.errors import ConfigurationError, FidelityError


def stepping(make: Callable[[Any], Any], **how: Any) -> type[Classifier]:
    """A classifier that logs its loss and has a learning rate scheduler."""

    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=True, on_epoch=False)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **how}}

    return Module


def plateau(optimizer: Any) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)


def one_cycle(optimizer: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)


class Freezes(Classifier):
    """One layer rests in the second epoch; its momentum and decay do too."""

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch != 1)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "weight_decay": 0.3}, {"params": self.net[2].parameters()}]
        return torch.optim.AdamW(groups, lr=0.02, eps=1e-2)


class FrozenNorm(Classifier):
    """Batch statistics are followed in the first epoch only."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))

    def on_train_epoch_start(self) -> None:
        self.net[1].train(self.current_epoch == 0)


class Parametrized(Classifier):
    """Weights that are functions of parameters and of buffers that every step changes."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.net[0])
        nn.utils.parametrizations.spectral_norm(self.net[2])


class Compiled(Classifier):
    backend = "eager"

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend=self.backend)


class CompiledAot(Compiled):
    backend = "aot_eager"


class CompiledLoss(Classifier):
    """The loss function that examples weight is inside the compiled region."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = torch.compile(lambda x, y: F.cross_entropy(self.net(x), y), backend="eager")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(*batch)


class CompiledInPlace(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="eager")


class Checkpointed(Classifier):
    reentrant = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = checkpoint(self.net[1], self.net[0](batch[0]), use_reentrant=self.reentrant)
        return F.cross_entropy(self.net[2](hidden), batch[1])


class Pair(Mapping):
    """A mapping that is no dict."""

    def __init__(self, held: dict[str, Any]) -> None:
        self.held = held

    def __getitem__(self, key: str) -> Any:
        return self.held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


class ReturnsMapping(Classifier):
    kind: Any = Pair

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        return self.kind({"loss": F.cross_entropy(logits, batch[1]), "logits": logits})


class SometimesDict(ReturnsMapping):
    kind = dict

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class OneEntry(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).reshape(1)


class Keyed(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class Encoding(UserDict):
    """A batch of a tokenizer: a mapping that moves itself."""

    def to(self, device: Any) -> "Encoding":
        return Encoding({name: t.to(device) for name, t in self.items()})


def keyed(kind: Any) -> Callable[[], DataLoader]:
    def collate(examples: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(examples)
        return kind({"x": x, "y": y})

    return lambda: DataLoader(data(), 4, collate_fn=collate)


class Validates(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


class EndsEpoch(Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


class EndsEpochFromCallback(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 1 else None


class ModuleHooks(Classifier):
    """Hooks of modules are part of the graph that is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1].register_forward_hook(lambda module, inputs, output: output * 1.5)
        self.net[1].register_full_backward_hook(lambda module, inner, outer: (inner[0] * 0.5,))


class WarmsUp(Classifier):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (self.global_step + 1)
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = 0.5


class Augments(Classifier):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * torch.rand_like(batch[0]), batch[1]]


class BuiltLate(pl.LightningModule):
    """Has no parameters before the Trainer asks for them."""

    training_step = Classifier.training_step

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Linear(FEATURES, 3).double()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnBackward(torch.autograd.Function):
    """Its derivative is another function's, as in a straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -0.3 * g * x.cos()


class UsesOwnBackward(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net[2](OwnBackward.apply(self.net[0](batch[0]))), batch[1])


class ClearsState(Classifier):
    """Momentum starts again in every epoch."""

    def on_train_epoch_start(self) -> None:
        self.trainer.optimizers[0].state.clear()


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader(shuffle=True)


def twos(**options: Any) -> Callable[[], DataLoader]:
    return lambda: loader(batch_size=2, **options)


def weighted() -> DataLoader:
    """Examples come twice in an epoch, and in a batch."""
    return loader(batch_size=6, sampler=WeightedRandomSampler(torch.arange(12.0) + 1, 20))


def windows() -> pl.Callback:
    return GradientAccumulationScheduler({0: 1, 1: 4, 2: 2})


def stop_early() -> pl.Callback:
    return EarlyStopping("loss", min_delta=10.0, patience=1)


def boring() -> DataLoader:
    torch.manual_seed(0)
    return DataLoader(RandomDataset(32, 12), 4)


WINDOWS = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05}
CELLS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "incomplete window, clipped": (Classifier, twos(shuffle=True), WINDOWS),
    "accumulation scheduler": (Classifier, twos(), {"add": windows, "epochs": 3}),
    "frozen and unfrozen": (Freezes, loader, {"epochs": 3}),
    "batch norm frozen later": (FrozenNorm, loader, {}),
    "parametrizations": (Parametrized, loader, {}),
    "compiled submodule": (Compiled, loader, {}),
    "compiled submodule, aot_eager": (CompiledAot, loader, {}),
    "compiled loss": (CompiledLoss, loader, {}),
    "compiled in place": (CompiledInPlace, loader, {}),
    "activation checkpointing": (Checkpointed, loader, {}),
    "a mapping is returned": (ReturnsMapping, loader, {}),
    "a dict or nothing is returned": (SometimesDict, loader, {}),
    "a loss of one entry": (OneEntry, loader, {}),
    "scheduler by epoch": (stepping(lambda o: lr_scheduler.StepLR(o, 1, 0.5)), loader, {}),
    "scheduler by step": (stepping(one_cycle, interval="step"), loader, {}),
    "plateau": (stepping(plateau, monitor="loss"), loader, {"epochs": 4}),
    "plateau by step": (stepping(plateau, monitor="loss", interval="step"), loader, {"epochs": 3}),
    "overfit_batches": (Classifier, twos(shuffle=True), {"overfit_batches": 2}),
    "limit_train_batches": (Classifier, twos(shuffle=True), {"limit_train_batches": 0.5}),
    "workers": (Classifier, twos(shuffle=True, num_workers=2, persistent_workers=True), {}),
    "drawn twice": (Classifier, weighted, {}),
    "data module": (Classifier, Data, {}),
    "batch encoding": (Keyed, keyed(Encoding), {}),
    "an epoch and a half": (Classifier, loader, {"max_steps": 4, "epochs": -1}),
    "half a window is left": (Classifier, twos(), {"max_steps": 3, "epochs": -1, "accumulate_grad_batches": 4}),
    "validation inside the epoch": (Validates, loader, {"val": True, "val_check_interval": 1}),
    "reloading": (Classifier, twos(shuffle=True), {"reload_dataloaders_every_n_epochs": 1}),
    "epoch ended by the module": (EndsEpoch, twos(), {"accumulate_grad_batches": 2, "epochs": 3}),
    "epoch ended by a callback": (Classifier, twos(shuffle=True), {"add": EndsEpochFromCallback}),
    "early stopping": (stepping(plateau, monitor="loss"), loader, {"add": stop_early, "epochs": 5}),
    "module hooks": (ModuleHooks, loader, {}),
    "warm-up in optimizer_step": (WarmsUp, loader, {}),
    "augmentation after transfer": (Augments, loader, {}),
    "configure_model": (BuiltLate, loader, {}),
    "autograd.Function": (UsesOwnBackward, loader, {}),
    "state cleared": (ClearsState, loader, {}),
    "detect_anomaly": (Classifier, loader, {"detect_anomaly": True}),
    "BoringModel": (BoringModel, boring, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_what_is_supported_is_right(name, tmp_path, monkeypatch):
    """Oracle: central differences of retraining; and the run without the callback, to the last bit."""
    make, train, options = CELLS[name]
    options = dict(options)
    add, val = options.pop("add", None), options.pop("val", False)

    def run(make: Any, callbacks: Any = (), train: Any = None, **given: Any) -> Any:
        return fit(make, [*callbacks, *([add()] if add else [])], train, val=loader() if val else None, **given)

    monkeypatch.setattr("helpers.fit", run)
    assert_first_order(make, tmp_path, train, **options)
    followed, plain = (run(make, callbacks, train(), **options)[0] for callbacks in ([sketch(tmp_path)], []))
    for p, q in zip(followed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_that_is_given_to_fit(backend, tmp_path):
    """Oracle: the sketch of the module as it is written, and both trainings that ``Reweight`` makes."""

    def compiled() -> Any:
        return torch.compile(Classifier(), backend=backend)

    for name, make in (("compiled", compiled), ("plain", Classifier)):
        fit(make, [sketch(tmp_path / name, 3, 2)])
    found, expected = (next(iter(Sketch.load(tmp_path / n / "sketch").shards())) for n in ("compiled", "plain"))
    assert found.coefficients.keys() == expected.coefficients.keys()
    for name, block in expected.coefficients.items():
        torch.testing.assert_close(found.coefficients[name], block)
    followed, plain = (fit(make, [Reweight(delete=[3, 4])])[0] for make in (compiled, Classifier))
    for p, q in zip(followed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert not torch.equal(q, list(fit(Classifier)[0].parameters())[-1])  # deleting something changes something


class Reentrant(Checkpointed):
    reentrant = True


class ReentrantAtOnce(Classifier):
    """Its input requires grad, so that the first layers are trained too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = checkpoint(self.net[:2], batch[0].requires_grad_(), use_reentrant=True)
        return F.cross_entropy(self.net[2](hidden), batch[1])


class Scripted(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.jit.script(self.net)


class ScalesLoss(Classifier):
    def backward(self, loss: Tensor) -> None:
        (0.5 * loss).backward()


class AccumulateHook(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.register_post_accumulate_grad_hook(self.shrink)

    def shrink(self, p: Tensor) -> None:
        p.grad *= 0.5


class ReplacesOptimizer(Classifier):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), lr=0.05)]


class AddsLayer(Classifier):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.extra = nn.Linear(3, 3).double()
            self.trainer.optimizers[0].add_param_group({"params": list(self.extra.parameters())})


class CopiesIntoBuffer(Classifier):
    """Stays close to the parameters at the end of the epoch before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("before", self.net[0].weight.detach().clone())

    def on_train_epoch_start(self) -> None:
        self.before.copy_(self.net[0].weight.detach())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + (self.net[0].weight - self.before).square().sum()


class ReadsMetric(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        before = self.trainer.callback_metrics.get("loss", 1.0)
        self.log("loss", loss)
        return loss * before


class Halves(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x[:2]), y[:2]) + F.cross_entropy(self.net(x[2:]), y[2:])


class TwoViews(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(torch.cat([x, 2 * x])), torch.cat([y, y]))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Reentrant, ConfigurationError, "`use_reentrant=True`.*pass `use_reentrant=False`"),
        (ReentrantAtOnce, ConfigurationError, "`use_reentrant=True`.*pass `use_reentrant=False`"),
        (Scripted, ConfigurationError, "TorchScript module `net`"),
        (ScalesLoss, FidelityError, "not the run's `p.grad` at optimizer step 0"),
        (AccumulateHook, FidelityError, r"gradient of `net\.0\.weight` in the re-run"),
        (ReplacesOptimizer, ConfigurationError, r"another optimizer \(a SGD\) .* before optimizer step 3"),
        (AddsLayer, (ConfigurationError, FidelityError), "register it in `__init__`"),
        (CopiesIntoBuffer, FidelityError, "`before` was changed before optimizer step 3"),
        (ReadsMetric, FidelityError, "`training_step` again at optimizer step 0 gives loss"),
        (Halves, ConfigurationError, "found no torch.nn.functional loss with one entry per example"),
        (TwoViews, ConfigurationError, "weights do not act on single examples"),
    ],
)
def test_what_is_not_supported_is_refused(kind, error, message, tmp_path):
    with pytest.raises(error, match=message):
        fit(kind, [sketch(tmp_path)])
    assert checkpoint(torch.sin, torch.ones(1, requires_grad=True), use_reentrant=True).requires_grad  # put back
    assert not (tmp_path / "sketch" / "sketch.json").exists()


@pytest.mark.parametrize("kind", [Pair, lambda held: type("Batch", (), held)()])
def test_batches_in_which_no_examples_are_found_are_refused(kind, tmp_path):
    class Reads(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            pair = (batch["x"], batch["y"]) if isinstance(batch, Pair) else (batch.x, batch.y)
            return super().training_step(pair, batch_idx)

    with pytest.raises(ConfigurationError, match="`loss='auto'` cannot find the examples in the batch"):
        fit(Reads, [sketch(tmp_path)], keyed(kind)())


def test_pruning_is_refused(tmp_path):
    class Single(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch[0].float(), batch[1]), batch_idx)

    with pytest.raises(FidelityError, match="optimizer step 3"):
        fit(Single, [sketch(tmp_path), ModelPruning("l1_unstructured", amount=0.3)], precision="32-true")


class Tuned(Classifier):
    """What the finders of Lightning set."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size, self.lr = 2, 0.1

    def train_dataloader(self) -> DataLoader:
        return loader(batch_size=self.batch_size, shuffle=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def finders() -> dict[str, tuple[Any, Any]]:
    """A finder as a callback, or what is done with the Trainer before."""
    rates: dict[str, Any] = {"max_lr": 0.1, "early_stop_threshold": None}
    sizes: dict[str, Any] = {"mode": "power", "steps_per_trial": 1, "max_trials": 2, "init_val": 2}
    return {
        "LearningRateFinder": (lambda: LearningRateFinder(num_training_steps=20, **rates), None),
        "BatchSizeFinder": (lambda: BatchSizeFinder(**sizes), None),
        "lr_find": (None, lambda trainer, module: Tuner(trainer).lr_find(module, num_training=20, **rates)),
        "scale_batch_size": (None, lambda trainer, module: Tuner(trainer).scale_batch_size(module, **sizes)),
    }


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("LearningRateFinder", True),
        ("LearningRateFinder", False),
        ("BatchSizeFinder", False),
        ("lr_find", True),
        ("scale_batch_size", True),
    ],
)
def test_finders(name, first, tmp_path):
    """Oracle: central differences of retraining, with trials before every run, and the run without the callback."""
    finder, before = finders()[name]
    psi = np.random.default_rng(3).normal(size=12)

    def train(*callbacks: Any) -> Tuned:
        pl.seed_everything(1, verbose=False)
        module, found = Tuned(), [finder()] if finder else []
        trainer = pl.Trainer(
            callbacks=[*found, *callbacks] if first else [*callbacks, *found],
            max_epochs=4 if "r_find" in name or "Rate" in name else 2,  # a finder needs 20 losses
            precision="64-true",
            **QUIET,
        )
        if before:
            before(trainer, module)
        trainer.fit(module)
        assert (module.batch_size, module.lr) != (2, 0.1)
        return module

    followed, plain = train(sketch(tmp_path, psi[None])), train()
    plus, minus = (dict(train(Reweight(weights=h * psi)).named_parameters()) for h in (1e-5, -1e-5))
    (shard,) = Sketch.load(tmp_path / "sketch").shards()
    for (n, p), q in zip(followed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        truth = (plus[n] - minus[n]).detach() / 2e-5
        assert (shard.coefficients[n][0, 0, 0] - truth).abs().max() < 1e-6 * truth.abs().max()


def quick(*callbacks: Any) -> pl.Trainer:
    return pl.Trainer(
        callbacks=list(callbacks),
        max_epochs=1,
        **QUIET,
    )


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_leave_no_sketch(stage, tmp_path):
    """Oracle: the directory, and the sketch of a training that follows."""
    module, trainer = BoringModel(), quick(sketch(tmp_path, 2))
    getattr(trainer, stage)(module)
    assert not (tmp_path / "sketch").exists()
    trainer.fit(module)
    assert Sketch.load(tmp_path / "sketch").num_units == 64
    getattr(trainer, stage)(module)


def test_training_goes_on_with_a_new_trainer(tmp_path):
    """Oracle: the sketch of the second part alone, by a callback of its own; the first part is held constant."""

    def second(callback: Any) -> Any:
        module, _ = fit(Classifier, [callback] if callback is used else [])
        fit(lambda: module, [callback])
        return next(iter(Sketch.load(callback.dirpath).shards())).coefficients["net.0.weight"]

    used, fresh = sketch(tmp_path / "used"), sketch(tmp_path / "fresh")
    assert torch.equal(second(used), second(fresh))


def test_training_goes_on_with_the_same_trainer_is_refused(tmp_path):
    module, trainer = fit(Classifier, [sketch(tmp_path)])
    trainer.fit_loop.max_epochs = 4
    with pytest.raises(ConfigurationError, match=r"must see training from its first step.*starts at step 6"):
        trainer.fit(module, loader())


def test_half_precision_on_a_cpu_is_bfloat16(tmp_path):
    """Lightning itself makes it so. Oracle: the bytes of that run's sketch."""

    class Single(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch[0].float(), batch[1]), batch_idx)

    folders = [tmp_path / "16", tmp_path / "bf16"]
    for folder in folders:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(Single, [sketch(folder)], precision=f"{folder.name}-mixed")
    a, b = (sorted((folder / "sketch").glob("*.safetensors")) for folder in folders)
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_several_loggers(tmp_path):
    """Oracle: what both write without the callback."""
    kind, written = stepping(plateau, monitor="loss"), []
    for callbacks in ([sketch(tmp_path)], []):
        loggers = [CSVLogger(tmp_path / f"{len(callbacks)}{i}", name="", version="") for i in range(2)]
        fit(kind, callbacks, logger=loggers, log_every_n_steps=1)
        written += [(Path(logger.log_dir) / "metrics.csv").read_text() for logger in loggers]
    assert len(set(written)) == 1


class Raises(pl.Callback):
    """Raises in one hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._fail)

    def _fail(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the user's")


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_start",
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_train_end",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_callbacks_that_raise(hook, first, tmp_path):
    """Oracle: the sketch that a callback of its own makes of the next run."""
    used, fresh = sketch(tmp_path / "used"), sketch(tmp_path / "fresh")
    with pytest.raises(RuntimeError, match="the user's"):
        fit(Classifier, [Raises(hook), used] if first else [used, Raises(hook)])
    for callback in (used, fresh):
        fit(Classifier, [callback])
    a, b = (sorted(Path(callback.dirpath).glob("*.safetensors")) for callback in (used, fresh))
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]
