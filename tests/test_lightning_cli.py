"""Callbacks given to ``LightningCLI`` by YAML and on the command line are those given in Python."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import QUIET, Classifier, data, network
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_sketch
from lightning_sketch import Sketch, SketchCallback, StabilityMonitor
from lightning_sketch.cli import main as ask

EXAMPLE = Path(__file__).parents[1] / "examples" / "cli"
UNITS = [0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, -1]


class Net(Classifier):
    def __init__(self, width: int = 3) -> None:
        super().__init__(network(width))
        self.save_hyperparameters()


class Data(pl.LightningDataModule):
    """Twelve examples, each with its row; ``units`` may be linked into the callbacks."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.units = UNITS

    def train_dataloader(self) -> DataLoader:
        inputs, targets = data().tensors
        return DataLoader(list(zip(inputs, targets, torch.arange(12), strict=True)), batch_size=self.batch_size)


class RowsNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[:2], batch_idx)


def losses(module: Net, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


def rows(batch: Any) -> Tensor:
    return batch[2]


class Bystander(pl.Callback):
    def __init__(self, name: str = "bystander") -> None:
        self.name = name


class Linked(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.units", "trainer.callbacks.init_args.units", apply_on="instantiate")


def command_line(args: list[str], kind: type[LightningCLI] = LightningCLI) -> pl.Trainer:
    """Train as ``main.py fit`` with these arguments would."""
    quiet = {**QUIET, "max_epochs": 2, "precision": "64-true"}
    return kind(
        RowsNet, Data, args=["fit", *args], trainer_defaults=quiet, seed_everything_default=1, save_config_callback=None
    ).trainer


def in_python(*callbacks: pl.Callback, width: int = 3) -> pl.Trainer:
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(max_epochs=2, precision="64-true", callbacks=list(callbacks), **QUIET)
    datamodule = Data()
    trainer.fit(RowsNet(width), datamodule=datamodule)
    return trainer


def assert_same_sketches(a: Path, b: Path) -> None:
    first, second = Sketch.load(a), Sketch.load(b)
    np.testing.assert_array_equal(first.directions, second.directions)
    assert first.loss == second.loss
    np.testing.assert_array_equal(first.units, second.units)
    shards = list(zip(first.shards(), second.shards(), strict=True))
    for ours, theirs in shards:
        assert ours.scaled.keys() == theirs.scaled.keys()
        for name, block in ours.scaled.items():
            assert torch.equal(block, theirs.scaled[name]), name
            assert block.any()
    for name, tensor in first.primal.items():
        assert torch.equal(tensor, second.primal[name])


YAML = """
trainer:
  callbacks:
    - class_path: lightning_sketch.SketchCallback
      init_args:
        dirpath: {dirpath}
        directions: 2
        degree: 2
        design: sphere+indicator
        units: &units {units}
        deletion_sets: [[0], [1, 2]]
        seed: 3
    - class_path: StabilityMonitor
      init_args:
        every_n_steps: 3
        window: 2
        units: *units
model:
  width: 4
"""


def test_yaml_is_python(tmp_path):
    """Oracle: the same callbacks, made in Python."""
    (tmp_path / "sketch.yaml").write_text(YAML.format(dirpath=tmp_path / "a", units=UNITS))
    trainer = command_line([f"--config={tmp_path / 'sketch.yaml'}"])
    names = {"design": "sphere+indicator", "deletion_sets": [[0], [1, 2]], "seed": 3, "units": UNITS}
    monitor = StabilityMonitor(every_n_steps=3, window=2, units=UNITS)
    in_python(SketchCallback(tmp_path / "b", 2, 2, **names), monitor, width=4)
    assert_same_sketches(tmp_path / "a", tmp_path / "b")
    (found,) = (c for c in trainer.callbacks if isinstance(c, StabilityMonitor))
    assert len(found.history) == len(monitor.history) > 0
    for ours, theirs in zip(found.history, monitor.history, strict=True):
        np.testing.assert_array_equal(ours.profile.log2_norms, theirs.profile.log2_norms)


EVERY_ARGUMENT = [
    ({"design": "basis+common", "degree": "3"}, {"design": "basis+common", "degree": 3}),
    ({"units": str(UNITS)}, {"units": UNITS}),
    ({"directions": "[[1, 0.5, 0, 0], [0, 0, 0, -1]]", "units": str(UNITS)},
     {"directions": np.array([[1, 0.5, 0, 0], [0, 0, 0, -1]]), "units": UNITS}),
    ({"loss": f"{__name__}.losses", "ids": f"{__name__}.rows"}, {"loss": losses, "ids": rows}),
    ({"normalization": "remaining", "directions_per_pass": "1", "every_n_train_steps": "2", "on_instability": "stop"},
     {"normalization": "remaining", "directions_per_pass": 1, "every_n_train_steps": 2, "on_instability": "stop"}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "values"), EVERY_ARGUMENT, ids=lambda given: " ".join(map(str, given)))
def test_arguments_on_the_command_line(words, values, tmp_path):
    """Oracle: the same callback, made in Python."""
    given = {"directions": "2", **words}
    args = [f"--trainer.callbacks.{name}={value}" for name, value in given.items()]
    command_line(["--trainer.callbacks+=SketchCallback", f"--trainer.callbacks.dirpath={tmp_path / 'a'}", *args])
    in_python(SketchCallback(tmp_path / "b", **{"directions": 2, **values}))
    assert_same_sketches(tmp_path / "a", tmp_path / "b")


def test_units_of_the_datamodule_reach_every_callback_that_takes_them(tmp_path):
    """Oracle: the same callbacks, made in Python; one that takes no units stays as it is."""
    given = "--trainer.callbacks"
    trainer = command_line(
        [
            f"{given}+=SketchCallback",
            f"{given}.dirpath={tmp_path / 'a'}",
            f"{given}.design=basis",
            f"{given}+=StabilityMonitor",
            f"{given}+={__name__}.Bystander",
        ],
        Linked,
    )
    in_python(SketchCallback(tmp_path / "b", design="basis", units=UNITS))
    assert_same_sketches(tmp_path / "a", tmp_path / "b")
    expected = ["SketchCallback", "StabilityMonitor", "Bystander"]
    assert [type(c).__name__ for c in trainer.callbacks] == expected


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("Reweight", ["delete=[3]", f"units={UNITS}"]),
        ("Reweight", ["weights=[0, 0.5, -0.5, 1]", f"units={UNITS}"]),
        ("GradientFeatures", ["dirpath={}", "at=[0, 1]", "projection=16"]),
        ("GradientRestriction", ["alpha=0.1", "norm=global"]),
        ("StabilityMonitor", ["window=null", f"output={__name__}.losses", "tolerance=0.2"]),
    ],
)
def test_the_other_callbacks(name, args, tmp_path):
    """Oracle: the callback is in the Trainer, and the run comes to its end."""
    flags = [f"--trainer.callbacks.{arg.format(tmp_path / 'out')}" for arg in args]
    trainer = command_line([f"--trainer.callbacks+={name}", *flags])
    assert type(trainer.callbacks[0]) is getattr(lightning_sketch, name)
    assert trainer.global_step == 6


@pytest.mark.parametrize("name", ["SketchCallback", "StabilityMonitor", "Reweight", "GradientFeatures"])
def test_help_is_the_docstring(name, capsys):
    """Oracle: the names and the first words of ``Args``."""
    with pytest.raises(SystemExit) as stop:
        command_line([f"--trainer.callbacks.help={name}"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    documented = getattr(lightning_sketch, name).__doc__.partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {8}(\w+): (.*)$", documented, re.MULTILINE)
    assert found
    for argument, words in found:
        assert f"--trainer.callbacks.{argument} " in text
        assert " ".join(words.split()[:4]) in text


def test_the_example(tmp_path, monkeypatch, capsys):
    """Oracle: ``lightning-sketch`` finds what was asked for, and in the checkpoint the arguments of the classes."""
    spec = importlib.util.spec_from_file_location("cli_example", EXAMPLE / "main.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cli_example", example)
    spec.loader.exec_module(example)
    monkeypatch.chdir(tmp_path)
    args = ["fit", f"--config={EXAMPLE / 'sketch.yaml'}", "--model.hidden=8", "--data.sources=3"]
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.enable_progress_bar=false"]
    example.CLI(example.DigitClassifier, example.Digits, args=[*args, *quick], save_config_callback=None)
    assert Sketch.load("cli_output/sketch").num_units == 3
    classes = ["--module=cli_example.DigitClassifier", "--data=cli_example.Digits"]
    assert (
        ask(["predict", "cli_output/sketch", *classes, "--checkpoint=cli_output/last.ckpt", "--delete=1", "--json"])
        == 0
    )
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["shape"] == [360]
