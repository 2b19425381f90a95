"""A run that an exception ends leaves the last written sketch, and nothing of ours in what is the user's."""

import gc
import os
import pathlib
import signal
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import FEATURES, Classifier, fit, loader
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from sketches import write
from torch import Tensor, nn

from lightning_sketch import ConfigurationError, Sketch, SketchCallback, _sketch_writer
from lightning_sketch.jets import JetTensor

STEP = 4  # at which a run fails: the second of its second epoch, after three an epoch
EVERY = 2


class Normalised(Classifier):
    """With running statistics."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
        self.double()

    @property
    def rerun(self) -> bool:
        return isinstance(self.net[0].weight, JetTensor)


class InTrainingStep(Normalised):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == STEP:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


class InRerun(Normalised):
    error: type[BaseException] = KeyboardInterrupt

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.rerun and self.global_step == STEP:
            raise self.error("the user's")
        return loss


class ErrorInRerun(InRerun):
    error = RuntimeError


class InBackwardPassOfRerun(Normalised):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.rerun and self.global_step == STEP:
            loss.register_hook(self.interrupt)
        return loss

    def interrupt(self, gradient: Tensor) -> None:
        raise KeyboardInterrupt


class InOptimizer(Normalised):
    """In its own step, or in ours."""

    ours = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        ours, module = self.ours, weakref.ref(self)

        class Interrupted(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                loss = super().step(closure)
                params = self.param_groups[0]["params"]
                if module().global_step == STEP and isinstance(params[0], JetTensor) == ours:  # type: ignore[union-attr]
                    raise KeyboardInterrupt
                return loss

        return Interrupted(self.parameters(), lr=0.1, momentum=0.9)


class InOurOptimizer(InOptimizer):
    ours = True


class InValidation(Normalised):
    """After the second step of the second epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == STEP + 1:
            raise RuntimeError("the user's")


class Interrupt(pl.Callback):
    """Raises in one hook."""

    def __init__(self, hook: str) -> None:
        def interrupt(trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == STEP:
                raise KeyboardInterrupt

        setattr(self, hook, interrupt)


class Keep(pl.Callback):
    """Holds on to the Trainer's parts where ``fit`` does not return."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.trainer, self.module = trainer, pl_module
        self.before = self.now()
        self.ids = [id(p) for p in pl_module.parameters()]

    def now(self) -> list[Any]:
        owned = [(name, sorted(m.__dict__), type(m)) for name, m in self.module.named_modules()]
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return [owned, [(name, type(t)) for name, t in tensors.items()], sorted(self.trainer.strategy.__dict__)]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Lightning ignores further interruptions from the first on."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def sketching(dirpath: Path, **options: Any) -> SketchCallback:
    options = {"units": [i % 4 for i in range(12)], "every_n_train_steps": EVERY, "directions_per_pass": 1, **options}
    return SketchCallback(dirpath, 2, 1, **options)


HOOKS = [
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
]
CASES: dict[str, tuple[type[pl.LightningModule], list[str], type[BaseException], int]] = {
    "training step": (InTrainingStep, [], SystemExit, 4),
    **{f"{hook} of another callback": (Normalised, [hook], SystemExit, 4) for hook in HOOKS},
    "on_train_batch_end of another callback": (Normalised, ["on_train_batch_end"], SystemExit, 4),
    "re-run": (InRerun, [], SystemExit, 4),
    "re-run, an error": (ErrorInRerun, [], RuntimeError, 4),
    "backward pass of the re-run": (InBackwardPassOfRerun, [], SystemExit, 4),
    "optimizer": (InOptimizer, [], SystemExit, 4),
    "optimizer of the re-run": (InOurOptimizer, [], SystemExit, 4),
    "validation": (InValidation, [], RuntimeError, 4),
}


@pytest.mark.parametrize("where", CASES)
@pytest.mark.parametrize("first", [True, False])
def test_an_exception_leaves_the_last_sketch_and_nothing_else(where: str, first: bool, tmp_path: Path) -> None:
    """Oracle: attributes, hooks, sampler and types before training, weak references, the callback's next run."""
    kind, hooks, error, steps = CASES[where]
    callback, keep, train = sketching(tmp_path / "sketch"), Keep(), loader()
    sampler = train.batch_sampler
    others = [Interrupt(hook) for hook in hooks]
    callbacks = [keep, *others, callback] if first else [keep, callback, *others]
    with pytest.raises(error):
        fit(kind, callbacks, train, val=loader(4), epochs=4, val_check_interval=2, num_sanity_val_steps=0)
    sketch = Sketch.load(tmp_path / "sketch")
    sketch.verify()
    assert sketch.steps == steps
    assert keep.now() == keep.before
    assert [id(p) for p in keep.module.parameters()] == keep.ids
    assert keep.module.training_step.__func__ is kind.training_step
    assert train.batch_sampler is sampler
    (optimizer,) = keep.trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not callback._blocks
    references = [weakref.ref(t) for t in (keep.module, keep.trainer, keep.module.net[0].weight, optimizer)]
    keep.trainer.callbacks.clear()
    del keep, optimizer, others, callbacks, callback.log, callback.log_dict  # Lightning puts the last two there
    gc.collect()
    assert [r() for r in references] == [None] * 4

    fit(Normalised, [callback])
    fit(Normalised, [sketching(tmp_path / "again")])
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("sketch", "again")]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


@pytest.mark.parametrize("call", range(1, 6))
def test_an_interruption_while_the_sketch_is_written(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the steps of the sketch before, and its files."""
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == of_one + call:
            raise KeyboardInterrupt
        sync(descriptor)

    sync = os.fsync
    monkeypatch.setattr(_sketch_writer.os, "fsync", fsync)
    of_one = 10**9
    fit(Normalised, [sketching(tmp_path / "one", every_n_train_steps=None)], epochs=1)
    of_one = len(synced)
    assert of_one >= 5
    synced.clear()
    keep = Keep()
    with pytest.raises(SystemExit):
        fit(Normalised, [keep, sketching(tmp_path / "sketch")])
    sketch = Sketch.load(tmp_path / "sketch")
    sketch.verify()
    assert sketch.steps == EVERY
    assert {p.name for p in sketch.dirpath.iterdir()} == {"sketch.json", *sketch.metadata["files"]}
    assert keep.now() == keep.before


class InterruptAt:
    """Within, the writer is interrupted before or after one of the calls of the system, counted from 0."""

    def __init__(self, event: int) -> None:
        self.left = event

    def __enter__(self) -> None:
        sys.setprofile(self.profile)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        caller = frame.f_back if frame.f_code.co_filename == pathlib.__file__ else frame
        if event in ("c_call", "c_return") and caller and caller.f_code.co_filename == _sketch_writer.__file__:
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt


def test_the_writer_may_be_interrupted_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the steps of the sketches before and after."""
    monkeypatch.setattr(_sketch_writer.os, "fsync", lambda descriptor: None)  # which takes most of the time
    steps, event, found = 1, 0, set()
    small: dict[str, Any] = {"design": 1, "names": "sphere", "units": [0, 1]}
    write(tmp_path, steps=steps, **small)
    while True:
        try:
            with InterruptAt(event):
                write(tmp_path, steps=steps + 1, **small)
        except KeyboardInterrupt:
            sketch = Sketch.load(tmp_path)
            sketch.verify()
            assert sketch.steps in (steps, steps + 1), event
            found.add(sketch.steps - steps)
            steps = sketch.steps
        else:
            break
        event += 1
    assert found == {0, 1}
    assert event > 100
    assert {p.name for p in tmp_path.iterdir()} == {"sketch.json", *Sketch.load(tmp_path).metadata["files"]}


class Saves(pl.Callback):
    """Saves a checkpoint where training fails, before the callback of the sketch lets go."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("kind", [InRerun, InOptimizer, InTrainingStep])
@pytest.mark.parametrize("saves", ["before", "after"])
def test_a_checkpoint_of_the_exception_is_not_resumed(
    kind: type[pl.LightningModule], saves: str, tmp_path: Path
) -> None:
    """The parameters in it are those after a step, the coefficients those before it."""
    path = tmp_path / "on_exception.ckpt"
    saving = Saves(path) if saves == "before" else OnExceptionCheckpoint(tmp_path)
    with pytest.raises(SystemExit):
        fit(kind, [saving, sketching(tmp_path / "sketch")], enable_checkpointing=True, default_root_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="resume a checkpoint that was saved with this callback"):
        fit(Normalised, [sketching(tmp_path / "sketch")], checkpoint=path)


class Exchange(pl.Callback):
    """Puts another optimizer in the place of the first before a step."""

    def __init__(self, of_strategy: bool, step: int) -> None:
        self.of_strategy = of_strategy
        self.step = step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            owner: Any = trainer.strategy if self.of_strategy else trainer
            owner.optimizers = [torch.optim.RMSprop(pl_module.parameters(), lr=0.01)]


@pytest.mark.parametrize("of_strategy", [False, True])
@pytest.mark.parametrize("step", [0, 4])
def test_another_optimizer_in_mid_run_is_refused(of_strategy: bool, step: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"another optimizer \(a RMSprop\).*step {step},.*`param_groups`"):
        fit(Normalised, [Exchange(of_strategy, step), sketching(tmp_path / "sketch")])
    if step:
        assert Sketch.load(tmp_path / "sketch").steps == step
