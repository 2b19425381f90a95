"""The sketch, the user's classes and the checkpoint that a command is given, and the prediction that they make."""

import importlib
import io
import re
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from lightning_sketch.cli.errors import BAD, CommandError, one_line_errors
from lightning_sketch.prediction import DeletionPredictor, Effect
from lightning_sketch.sketch import Shard, Sketch

# name -> stage of `setup`, hook of the datamodule
SPLITS = {
    "test": ("test", "test_dataloader"),
    "val": ("validate", "val_dataloader"),
    "train": ("fit", "train_dataloader"),
}


@dataclass
class Question:
    """An output of the trained model, to be predicted.

    Args:
        console: where progress is shown.
        dirpath: directory of the sketch.
        module: class that was trained, `package.module.Class`, importable from the current directory.
        checkpoint: of the last step of the run, to take the arguments of the classes from where they were saved by
            `save_hyperparameters`, and to compare the parameters with the sketch's: a Lightning checkpoint, a
            `state_dict`, or a safetensors file. Needed if the classes have no defaults.
        data: class of the LightningDataModule, `package.module.Class`.
        output: loss, logits, probabilities, margin, embedding:SUBMODULE, parameter:NAME (needs no data), or
            `package.module.function` of module and batch.
        split: which dataloader of the datamodule; a train dataloader that shuffles is read in order.
    """

    console: Console
    dirpath: Path
    _: KW_ONLY
    module: str | None = None
    checkpoint: Path | None = None
    data: str | None = None
    output: str = "loss"
    split: Literal["test", "val", "train"] = "test"

    @cached_property
    def sketch(self) -> Sketch:
        """The sketch, opened."""
        return _ShownSketch(open_sketch(self.dirpath), self.console)

    def units(self, text: str) -> list[int]:
        """Read units to delete: `3,17`, or `@file` with such text in any number of lines."""
        source = "`--delete`"
        if text.startswith("@"):
            source = f"`{text[1:]}`"
            try:
                text = Path(text[1:]).read_text()
            except (OSError, ValueError) as error:
                raise CommandError(f"{source} of `--delete` cannot be read ({error}): give a text file.") from error
        words = re.findall(r"[^\s,]+", text)
        faults = [word for word in words if not re.fullmatch(r"-?\d{1,18}", word)]
        if faults or not words:
            found = f"{faults[0][:40]!r}" if faults else "no unit"
            raise CommandError(f"{source} holds {found}: give units as integers, separated by commas or blanks.")
        units = [int(word) for word in words]
        for unit in units:
            if not 0 <= unit < self.sketch.num_units:
                raise CommandError(
                    f"{source} holds unit {unit}: this sketch has units 0 to {self.sketch.num_units - 1}."
                )
        if len(set(units)) < len(units):
            twice = next(unit for unit in units if units.count(unit) > 1)
            raise CommandError(f"{source} holds unit {twice} twice: list every unit once.")
        return units

    def effect(self) -> Effect:
        """Run the coefficients through the model; the long work."""
        sketch = self.sketch
        if self.module is None:
            raise CommandError("`--module` is missing: give the class that was trained, for instance `train.Net`.")
        module_class = _import(self.module, "--module", pl.LightningModule)
        checkpoint = {} if self.checkpoint is None else _read_checkpoint(self.checkpoint)
        if self.checkpoint is not None:
            _check_same_run(sketch, checkpoint["state_dict"], self.checkpoint)
        module = _build(module_class, checkpoint, f"`--module {self.module}`")
        output: Any = self.output
        if "." in output and ":" not in output:
            output = _import(output, "--output")
        predictor = DeletionPredictor(sketch, module, output)
        batches = None if self.output.startswith("parameter:") else self._batches(checkpoint)
        with one_line_errors("the prediction failed", "run `DeletionPredictor.prepare` in Python to see where.", BAD):
            return predictor.prepare(batches)

    def about(self) -> dict[str, Any]:
        """What was asked, for programs."""
        return {"dirpath": str(self.dirpath), "output": self.output, "split": self.split}

    def _batches(self, checkpoint: dict[str, Any]) -> DataLoader:
        if self.data is None:
            raise CommandError("`--data` is missing: give a LightningDataModule class, for instance `train.Data`.")
        what = f"`--data {self.data}`"
        data = _build(_import(self.data, "--data", pl.LightningDataModule), checkpoint, what)
        stage, hook = SPLITS[self.split]
        with one_line_errors(f"{what} failed", f"check its `setup('{stage}')` and `{hook}`."):
            defined = is_overridden(hook, data)
            if defined:
                data.prepare_data()
                data.setup(stage)
                loader = getattr(data, hook)()
        if not defined:
            raise CommandError(f"{what} has no `{hook}`: define it, or choose another dataloader with `--split`.")
        if isinstance(loader, list | tuple) and len(loader) == 1:
            loader = loader[0]
        if not isinstance(loader, DataLoader):
            raise CommandError(f"{what} has a `{hook}` that returns {type(loader).__name__}: return one DataLoader.")
        if isinstance(loader.sampler, RandomSampler):
            workers, collate = loader.num_workers, loader.collate_fn
            loader = DataLoader(loader.dataset, loader.batch_size, num_workers=workers, collate_fn=collate)
        return loader


class _ShownSketch(Sketch):
    """Shows how many of its shards were read."""

    def __init__(self, sketch: Sketch, console: Console) -> None:
        super().__init__(sketch.dirpath, sketch.metadata)
        self._console = console

    def shards(self) -> Iterator[Shard]:
        total, hidden = len(self.metadata["coefficients"]["shards"]), not self._console.is_terminal
        yield from track(super().shards(), "shards", total, console=self._console, transient=True, disable=hidden)


def open_sketch(dirpath: Path) -> Sketch:
    """Open a sketch whose directory is there."""
    if not dirpath.is_dir():
        raise CommandError(f"`{dirpath}` is no directory: give the `dirpath` of a SketchCallback.")
    return Sketch.load(dirpath)


def _import(path: str, flag: str, base: type | None = None) -> Any:
    module, _, name = path.rpartition(".")
    remedy = "run from the directory in which it can be imported, or set PYTHONPATH."
    with one_line_errors(f"`{flag} {path}` cannot be imported", remedy):
        if not module:
            raise ImportError("it names no module, as in `package.Class`")
        found = getattr(importlib.import_module(module), name)
    if base is None and not callable(found):
        raise CommandError(f"`{flag} {path}` is no function: give `callable(module, batch) -> tensor`.")
    if base is not None and not (isinstance(found, type) and issubclass(found, base)):
        raise CommandError(f"`{flag} {path}` is no {base.__name__}: give the class itself.")
    return found


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a Lightning checkpoint, or ``{"state_dict": ...}`` of a file of tensors; no code in it is run."""
    if not path.is_file():
        raise CommandError(f"`--checkpoint {path}` is no file: give one of the run, or leave it out.")
    remedy = "give a Lightning checkpoint, a `state_dict` saved by torch.save, or a .safetensors file."
    try:
        if path.suffix == ".safetensors":
            return {"state_dict": load_file(path)}
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise CommandError(
                f"`--checkpoint {path}` holds a `{unsafe[1]}`, which is not plain data and is not loaded, since that "
                "may run code: save hyper-parameters as numbers and text, or give the module's `state_dict`."
            ) from error
        raise CommandError(f"`--checkpoint {path}` cannot be read ({str(error)[:200]}): {remedy}") from error
    content = content if isinstance(content, dict) else {}
    found = content.get("state_dict", content)
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise CommandError(f"`--checkpoint {path}` holds no parameters: {remedy}")
    return {"state_dict": content} if found is content else content


def _check_same_run(sketch: Sketch, state: dict[str, Any], path: Path) -> None:
    shared = sketch.primal.keys() & state.keys()
    differing = sorted(name for name in shared if not _equal(sketch.primal[name], state[name]))
    if differing or not shared:
        what = f"`{differing[0]}` and {len(differing) - 1} more differ" if differing else "no parameter is in both"
        raise CommandError(
            f"`--checkpoint {path}` is not the end of the sketched run, {what}: give the checkpoint of its last step, "
            "or none (predictions use the sketch's own parameters).",
            BAD,
        )


def _equal(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)


def _build(made: Any, checkpoint: dict[str, Any], what: str) -> Any:
    """Make a module or datamodule with the arguments that a Lightning checkpoint keeps, or else without any."""
    remedy = "its arguments come from a Lightning `--checkpoint` if it calls `save_hyperparameters()`, or are defaults."
    with one_line_errors(f"{what} cannot be made", remedy):
        if "pytorch-lightning_version" not in checkpoint:
            return made()
        light = io.BytesIO()  # without what callbacks keep, which may be a sketch, many times the model
        torch.save({**checkpoint, "callbacks": {}, "optimizer_states": []}, light)
        light.seek(0)
        return made.load_from_checkpoint(light, map_location="cpu", weights_only=True)
