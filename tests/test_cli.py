"""``lightning-sketch``: answers, exit codes, and one line for every mistake."""

import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import QUIET
from rich.console import Console
from safetensors.torch import save_file
from sketches import data_file, flip, write
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import DeletionPredictor, Reweight, Sketch, SketchCallback, plan, plotting
from lightning_sketch.cli import main
from lightning_sketch.cli.question import Question
from lightning_sketch.prediction.stability import stability_profile

UNITS = np.arange(40) % 5
WIDTH = 6  # not the default of `Net`, so that it must come from the checkpoint

# What `--module` and `--data` name in these tests.
NET, DATA = f"{__name__}.Net", f"{__name__}.Data"


def examples(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


class Net(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Fixed(Net):
    """Needs no argument."""

    def __init__(self) -> None:
        super().__init__(WIDTH)


class Data(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        print("reading the data")  # must not get into a document
        self.stage = stage

    def train_dataloader(self) -> DataLoader:
        return DataLoader(examples(40, 1), batch_size=8, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        assert self.stage == "test"
        return DataLoader(examples(7, 2), batch_size=4)


class TwoLoaders(Data):
    def test_dataloader(self) -> Any:
        return [super().test_dataloader(), super().test_dataloader()]


class BrokenData(Data):
    def setup(self, stage: str) -> None:
        raise FileNotFoundError("no such\nfile")


class InterruptedData(Data):
    def setup(self, stage: str) -> None:
        raise KeyboardInterrupt


class OtherBatches(Data):
    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(4, 9), torch.zeros(4).long()))


def first_logit(module: Net, batch: tuple[Tensor, Tensor]) -> Tensor:
    return module(batch[0])[:, 0]


def train(*callbacks: pl.Callback, seed: int = 0) -> pl.Trainer:
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(max_epochs=2, precision="64-true", callbacks=list(callbacks), **QUIET)
    trainer.fit(Net(WIDTH), Data().train_dataloader())
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory with a sketch, checkpoints of the run, and damaged copies of the sketch."""
    root = tmp_path_factory.mktemp("run")
    trainer = train(SketchCallback(root / "good", 4, 3, design="basis+common", units=UNITS))
    trainer.save_checkpoint(root / "last.ckpt")
    state = trainer.lightning_module.state_dict()
    torch.save(state, root / "state.pt")
    save_file(state, root / "state.safetensors")
    torch.save({"hyper_parameters": {"where": Path("/tmp")}, "state_dict": state}, root / "unsafe.ckpt")
    torch.save({"epoch": 3}, root / "empty.ckpt")
    (root / "text.ckpt").write_text("not a checkpoint")
    train(seed=1).save_checkpoint(root / "other.ckpt")
    torch.save({"elsewhere": torch.zeros(2)}, root / "elsewhere.pt")
    content = (root / "last.ckpt").read_bytes()
    (root / "torn.ckpt").write_bytes(content[: len(content) // 2])
    assert zipfile.is_zipfile(root / "last.ckpt")
    for name in ("bit", "torn"):
        shutil.copytree(root / "good", root / name)
    flip(0.9)(data_file(root / "bit", "coefficients-00000"))
    (root / "torn" / "sketch.json").write_text((root / "good" / "sketch.json").read_text()[:-20])
    (root / "file").touch()
    (root / "nothing").mkdir()
    return root


@pytest.fixture(autouse=True)
def here(run, monkeypatch):
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(run)  # which also takes back what `main` puts there


def model(**changes: str | None) -> list[str]:
    given = {"module": NET, "checkpoint": "last.ckpt", "data": DATA, **changes}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def answer(capsys, *argv: str) -> dict[str, Any]:
    """The document that a command prints; its standard output must hold nothing else."""
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys, code: int, *argv: str) -> str:
    """The one line on stderr of a command that has no answer."""
    assert main(list(argv)) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line != "reading the data"]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert lines[0].startswith("lightning-sketch: ")
    return lines[0]


@pytest.fixture(scope="module")
def effect(run):
    """Oracle of the predictions: the library's own interface."""
    predictor = DeletionPredictor(Sketch.load(run / "good"), Net(WIDTH).double())
    return predictor.prepare(DataLoader(examples(7, 2), batch_size=7))


NUMBER = {"type": ["number", "null"]}
NUMBERS = {"type": "array", "items": {"type": ["number", "array"]}}
COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}


def exactly(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def prediction(number: dict[str, Any]) -> dict[str, Any]:
    fields = dict.fromkeys(("baseline", "value", "change", "stderr", "truncation"), number)
    interval = {"type": "array", "items": number, "minItems": 2, "maxItems": 2}
    return exactly(**fields, interval=interval, reliable={"type": "boolean"})


RANKED = {"type": "array", "items": exactly(unit=COUNT, change=NUMBER, stderr=NUMBER, truncation=NUMBER)}
PLAN = exactly(
    design=TEXT,
    directions=COUNT,
    degree=COUNT,
    expected_error=NUMBER,
    cost=NUMBER,
    meets_target={"type": "boolean"},
)
ABOUT = {"dirpath": TEXT, "output": TEXT, "split": {"enum": ["test", "val", "train"]}}
INFO = exactly(
    **dict.fromkeys(("dirpath", "design", "dtype", "optimizer", "loss", "normalization"), TEXT),
    **dict.fromkeys(("num_units", "num_examples", "num_directions", "degree", "steps", "num_tensors"), COUNT),
    **dict.fromkeys(("num_entries", "num_bytes", "format_version"), COUNT),
    versions={"type": "object", "additionalProperties": TEXT},
)
SCHEMAS = {
    "info": INFO,
    "merge": INFO,
    "verify": exactly(dirpath=TEXT, intact={"type": "boolean"}, error={"type": ["string", "null"]}),
    "predict": exactly(
        **ABOUT,
        delete={"type": "array", "items": COUNT},
        shape={"type": "array", "items": COUNT},
        mean=prediction(NUMBER),
        per_example={"anyOf": [{"type": "null"}, prediction(NUMBERS)]},
    ),
    "rank": exactly(
        **ABOUT,
        k=COUNT,
        of=TEXT,
        rankings={
            "type": "array",
            "items": exactly(entry={"type": ["array", "null"], "items": COUNT}, raising=RANKED, lowering=RANKED),
        },
    ),
    "plot": exactly(**ABOUT, kind={"enum": ["changes", "ray", "ranking", "profile"]}, out=TEXT),
    "plan": exactly(
        n_units=COUNT,
        error=NUMBER,
        failure_probability=NUMBER,
        deletion_size=COUNT,
        best=PLAN,
        alternatives={"type": "array", "items": PLAN},
    ),
}


@pytest.mark.parametrize(
    "argv",
    [
        ["info", "good"],
        ["verify", "good"],
        ["predict", "good", *model(), "--delete=3"],
        ["predict", "good", *model(), "--delete=3", "--per_example"],
        ["predict", "good", *model(data=None), "--delete=3", "--output=parameter:net.0.bias"],
        ["rank", "good", *model()],
        ["rank", "good", *model(), "--k=2", "--of=each"],
        ["plot", "good", "--out=figure.png"],
        ["plan", "50"],
    ],
    ids=" ".join,
)
def test_documents_obey_their_schemas_and_tables_are_printed_for_people(argv, capsys):
    """Oracle: JSON schemas that allow no other key."""
    jsonschema.validate(answer(capsys, *argv), SCHEMAS[argv[0]])
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert not captured.out.lstrip().startswith("{")
    assert captured.err.replace("reading the data\n", "") == ""  # no progress where there is no terminal


def test_info(run, capsys):
    """Oracle: the run."""
    found = answer(capsys, "info", "good")
    expected = {
        "num_units": 5,
        "num_examples": 40,
        "num_directions": 11,
        "design": "basis+common",
        "degree": 3,
        "dtype": "float64",
        "steps": 10,
        "optimizer": "SGD",
        "num_entries": 4 * 6 + 6 + 6 * 3 + 3,
        "num_bytes": sum(path.stat().st_size for path in (run / "good").glob("*.safetensors")),
    }
    assert {name: found[name] for name in expected} == expected


def test_verify_tells_programs_too_what_is_damaged(capsys):
    """Oracle: a bit was flipped."""
    assert main(["verify", "bit", "--json"]) == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    jsonschema.validate(document, SCHEMAS["verify"])
    assert not document["intact"]
    assert "altered" in document["error"]
    assert len(captured.err.splitlines()) == 1


def test_predict_equals_the_library_and_retraining(effect, capsys):
    """Oracles: ``DeletionPredictor`` on one batch of all test examples; a ``Reweight`` run for the mean."""
    units = [3, 1]
    found = answer(capsys, "predict", "good", *model(), "--delete=3,1", "--per_example")
    mean = effect.reduce(torch.full((7,), 1 / 7, dtype=torch.float64)).delete(units=units)
    for document, p in ((found["mean"], mean), (found["per_example"], effect.delete(units=units))):
        for name in ("baseline", "value", "change", "stderr", "truncation"):
            np.testing.assert_allclose(document[name], getattr(p, name).numpy(), rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(document["interval"], torch.stack(p.interval(0.95)).numpy(), rtol=1e-9)
        assert document["reliable"] == bool(p.reliable)
    retrained = train(Reweight(units=UNITS, delete=units)).lightning_module
    inputs, targets = examples(7, 2).tensors
    with torch.no_grad():
        losses = F.cross_entropy(retrained(inputs), targets, reduction="none").numpy()
    change = losses.mean() - found["mean"]["baseline"]
    assert abs(found["mean"]["change"] - change) < 0.01 * abs(change)
    low, high = found["mean"]["interval"]
    assert low < losses.mean() < high


def test_predictions_that_are_not_to_be_trusted_say_so(effect, capsys):
    """Oracle: ``Prediction.reliable``."""
    units = [2, 3, 4]
    assert not effect.reduce(torch.full((7,), 1 / 7, dtype=torch.float64)).delete(units=units).reliable
    argv = ["predict", "good", *model(), "--delete=2,3,4"]
    assert answer(capsys, *argv)["mean"]["reliable"] is False
    assert main(argv) == 0
    assert "not reliable" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "changes",
    [{"checkpoint": "state.pt"}, {"checkpoint": "state.safetensors"}, {"checkpoint": None}],
    ids=lambda changes: str(changes["checkpoint"]),
)
def test_checkpoints_without_arguments_suit_a_class_that_needs_none(changes, effect, capsys):
    """Oracle: ``DeletionPredictor``."""
    found = answer(capsys, "predict", "good", *model(module=f"{__name__}.Fixed", **changes), "--delete=2")
    np.testing.assert_allclose(found["mean"]["value"], float(effect.delete(units=[2]).value.mean()), rtol=1e-9)


@pytest.mark.parametrize("text", ["0,2", "0, 2,", "0\n2\n", "0 2"])
def test_units_in_a_file(text, run):
    """Oracle: the units that were written."""
    (run / "units.txt").write_text(text)
    assert Question(Console(), Path("good")).units("@units.txt") == [0, 2]


def test_outputs_and_splits(run, capsys):
    """Oracles: the losses of the training examples, in the order of the dataset; a logit; the parameter itself."""
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    module = Net(WIDTH).double()
    module.load_state_dict(checkpoint["state_dict"])
    inputs, targets = examples(40, 1).tensors
    with torch.no_grad():
        losses = F.cross_entropy(module(inputs), targets, reduction="none").numpy()
        logit = module(examples(7, 2).tensors[0])[:, 0].numpy()
    asked = ("predict", "good", "--delete=3", "--per_example")
    found = answer(capsys, *asked, *model(), "--split=train")
    np.testing.assert_allclose(found["per_example"]["baseline"], losses, rtol=1e-9)
    found = answer(capsys, *asked, *model(), f"--output={__name__}.first_logit")
    np.testing.assert_allclose(found["per_example"]["baseline"], logit, rtol=1e-9)
    found = answer(capsys, *asked, *model(data=None), "--output=parameter:net.0.bias")
    assert found["per_example"]["baseline"] == module.net[0].bias.tolist()
    assert found["shape"] == [WIDTH]


def test_rank(effect, capsys):
    """Oracle: the predictions of every unit alone, sorted."""
    alone = effect.leave_one_out().change.numpy()
    (found,) = answer(capsys, "rank", "good", *model(), "--k=5")["rankings"]
    assert found["entry"] is None
    assert [row["unit"] for row in found["raising"]] == np.argsort(-alone.mean(1)).tolist()
    (found,) = answer(capsys, "rank", "good", *model(), "--k=2", "--of=4")["rankings"]
    assert [row["unit"] for row in found["lowering"]] == np.argsort(alone[:, 4])[:2].tolist()
    np.testing.assert_allclose([row["change"] for row in found["lowering"]], np.sort(alone[:, 4])[:2], rtol=1e-9)
    for found in answer(capsys, "rank", "good", *model(), "--k=2", "--of=each")["rankings"]:
        (entry,) = found["entry"]
        assert [row["unit"] for row in found["raising"]] == np.argsort(-alone[:, entry])[:2].tolist()


def test_merge(tmp_path, capsys):
    """Oracle: the directions of the parts."""
    parts = [write(tmp_path / str(seed), names="sphere", seed=seed) for seed in (0, 1)]
    found = answer(capsys, "merge", str(tmp_path / "out"), str(tmp_path / "0"), str(tmp_path / "1"))
    jsonschema.validate(found, SCHEMAS["merge"])
    assert found["num_directions"] == 6
    expected = np.concatenate([part.directions for part in parts])
    np.testing.assert_array_equal(Sketch.load(tmp_path / "out").directions, expected)
    out, first, second = (str(tmp_path / name) for name in ("0", "out", "1"))
    assert "holds a sketch" in complaint(capsys, 2, "merge", out, first, second)  # a forgotten OUT must not cost a part
    assert "at least two" in complaint(capsys, 2, "merge", str(tmp_path / "new"), first)
    write(tmp_path / "later", names="sphere", seed=5, steps=13)
    assert "steps" in complaint(capsys, 1, "merge", str(tmp_path / "new"), first, str(tmp_path / "later"))


def test_plan(capsys):
    """Oracle: ``lightning_sketch.plan``."""
    asked = ("--error=0.5", "--deletion_size=4", "--failure_probability=0.1")
    found = answer(capsys, "plan", "2000", *asked)
    expected = plan(2000, error=0.5, deletion_size=4, failure_probability=0.1)
    assert found["best"]["design"] == expected.design
    assert [row["directions"] for row in found["alternatives"]] == [p.directions for p in expected.alternatives]
    assert [row["cost"] for row in found["alternatives"]] == [p.cost for p in expected.alternatives]


@pytest.mark.parametrize(
    "argv",
    [
        ["--kind=profile"],
        [*model()],
        [*model(), "--kind=ranking"],
        [*model(), "--delete=3"],
        [*model(), "--delete=3,1", "--kind=ray"],
    ],
    ids=lambda argv: " ".join(argv[-2:]),
)
def test_plots_are_written(argv, run, capsys):
    """Oracle: the signature of PNG."""
    (run / "figure.png").unlink(missing_ok=True)
    answer(capsys, "plot", "good", "--out=figure.png", *argv)
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_profile_of_the_parameters(run, monkeypatch):
    """Oracle: the profile of all coefficients in one array, whose sizes are root mean squares and not norms."""
    drawn, draw = [], plotting.plot_stability_profile
    monkeypatch.setattr(plotting, "plot_stability_profile", lambda p: drawn.append(p) or draw(p))
    assert main(["plot", "good", "--out=figure.png"]) == 0
    sketch = Sketch.load(run / "good")
    (shard,) = sketch.shards()
    flat = torch.cat([c[:, 0].flatten(2) for c in shard.coefficients.values()], dim=2)
    expected = stability_profile(flat.numpy(), sketch.directions[shard.indices])
    np.testing.assert_allclose(drawn[0].log2_norms, expected.log2_norms + np.log2(flat.shape[2]) / 2, rtol=1e-9)


PREDICT = ["predict", "{}", *model(), "--delete=3"]
COMMANDS = [
    ["info", "{}"],
    ["verify", "{}"],
    ["merge", "out", "good", "{}"],
    PREDICT,
    ["rank", "{}", *model(), "--k=2"],
    ["plot", "{}", *model(), "--out=figure.png"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("sketch", "code", "words"),
    [
        ("torn", 1, "sketch.json.*restore"),
        ("bit", 1, "altered.*restore"),
        ("nothing", 1, "no sketch.*SketchCallback"),
        ("missing", 2, "no directory.*SketchCallback"),
        ("file", 2, "no directory.*SketchCallback"),
    ],
)
def test_sketches_that_are_damaged_or_missing(command, sketch, code, words, capsys):
    """Oracle: what was done to the sketch."""
    argv = [word.format(sketch) for word in command]
    if (command[0], sketch) == ("info", "bit"):
        assert main(argv) == 0  # it reads no tensors
    elif (command[0], sketch) == ("merge", "bit"):
        assert re.search("direction", complaint(capsys, 1, *argv))  # those of `good` itself are found first
    else:
        assert re.search(words, complaint(capsys, code, *argv))


MISTAKES = {
    "no command": (2, [], "subcommand"),
    "unknown command": (2, ["forget"], "forget.*help"),
    "unknown flag": (2, ["info", "good", "--loud"], "--loud.*help"),
    "no deletion": (2, ["predict", "good", *model()], "delete.*help"),
    "wrong choice": (2, [*PREDICT, "--split=all"], "split.*test.*all"),
    "no module": (2, ["predict", "good", *model(module=None), "--delete=3"], "--module"),
    "no data": (2, ["predict", "good", *model(data=None), "--delete=3"], "--data"),
    "module not found": (2, ["predict", "good", *model(module="nope.Net"), "--delete=3"], "nope.*PYTHONPATH"),
    "module without a dot": (2, ["predict", "good", *model(module="Net"), "--delete=3"], "package.Class"),
    "class not found": (2, ["predict", "good", *model(module=NET + "s"), "--delete=3"], "Nets.*PYTHONPATH"),
    "no module class": (2, ["predict", "good", *model(module=DATA), "--delete=3"], "Data.*LightningModule"),
    "no data class": (2, ["predict", "good", *model(data=NET), "--delete=3"], "Net.*LightningDataModule"),
    "module needs arguments": (
        2,
        ["predict", "good", *model(checkpoint="state.pt"), "--delete=3"],
        "width.*save_hyperparameters",
    ),
    "no checkpoint": (2, ["predict", "good", *model(checkpoint="none.ckpt"), "--delete=3"], "none.ckpt.*no file"),
    "text": (2, ["predict", "good", *model(checkpoint="text.ckpt"), "--delete=3"], "text.ckpt.*cannot be read"),
    "torn": (2, ["predict", "good", *model(checkpoint="torn.ckpt"), "--delete=3"], "torn.ckpt.*cannot be read"),
    "empty": (2, ["predict", "good", *model(checkpoint="empty.ckpt"), "--delete=3"], "no parameters"),
    "unsafe": (2, ["predict", "good", *model(checkpoint="unsafe.ckpt"), "--delete=3"], "Path.*run code.*state_dict"),
    "other run": (1, ["predict", "good", *model(checkpoint="other.ckpt"), "--delete=3"], "not the end of.*last step"),
    "other model": (1, ["predict", "good", *model(checkpoint="elsewhere.pt"), "--delete=3"], "no parameter is in both"),
    "no dataloader": (2, [*PREDICT, "--split=val"], "no `val_dataloader`.*--split"),
    "two dataloaders": (2, ["predict", "good", *model(data=f"{__name__}.TwoLoaders"), "--delete=3"], "one DataLoader"),
    "broken data": (
        2,
        ["predict", "good", *model(data=f"{__name__}.BrokenData"), "--delete=3"],
        "no such file.*test_cli",
    ),
    "other batches": (1, ["predict", "good", *model(data=f"{__name__}.OtherBatches"), "--delete=3"], "failed.*shapes"),
    "interrupted": (130, ["predict", "good", *model(data=f"{__name__}.InterruptedData"), "--delete=3"], "interrupted"),
    "unknown output": (2, [*PREDICT, "--output=lossy"], "lossy"),
    "unknown parameter": (2, [*PREDICT, "--output=parameter:net.9"], "net.9"),
    "output not found": (2, [*PREDICT, "--output=nope.output"], "nope"),
    "unit out of range": (2, [*PREDICT[:-1], "--delete=3,5"], "unit 5.*0 to 4"),
    "negative unit": (2, [*PREDICT[:-1], "--delete=-1"], "unit -1.*0 to 4"),
    "unit twice": (2, [*PREDICT[:-1], "--delete=3,3"], "unit 3 twice"),
    "no units": (2, [*PREDICT[:-1], "--delete="], "no unit"),
    "words": (2, [*PREDICT[:-1], "--delete=three"], "'three'.*integers"),
    "no unit file": (2, [*PREDICT[:-1], "--delete=@none.txt"], "none.txt.*cannot be read"),
    "empty unit file": (2, [*PREDICT[:-1], "--delete=@file"], "`file` holds no unit"),
    "malformed unit file": (2, [*PREDICT[:-1], "--delete=@good/sketch.json"], "sketch.json.*integers"),
    "binary unit file": (2, [*PREDICT[:-1], "--delete=@last.ckpt"], "last.ckpt.*cannot be read"),
    "no ranks": (2, ["rank", "good", *model(), "--k=0"], "--k.*at least 1"),
    "ranking of nothing": (2, ["rank", "good", *model(), "--k=1", "--of=all"], "--of.*mean, each"),
    "example out of range": (2, ["rank", "good", *model(), "--k=1", "--of=7"], "--of.*(7,)"),
    "ray of nothing": (2, ["plot", "good", *model(), "--out=a.png", "--kind=ray"], "--delete"),
    "no directory for a figure": (2, ["plot", "good", "--out=none/a.png"], "none"),
    "unknown suffix": (2, ["plot", "good", "--out=a.figure"], ".png.*.svg"),
    "no units to plan for": (2, ["plan", "0"], "n_units"),
    "too many units to plan for": (2, ["plan", "1" * 30], "n_units"),
    "error above one": (2, ["plan", "10", "--error=2"], "error"),
    "no number": (2, ["plan", "many"], "n_units.*many"),
}


@pytest.mark.parametrize(("code", "argv", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_get_one_line(code, argv, words, capsys):
    """Oracle: the mistake."""
    assert re.search(words, complaint(capsys, code, *[word.format("good") for word in argv]))


def test_a_module_of_another_shape_is_refused(run, capsys):
    """Oracle: the sketch is of a width of six."""
    torch.save(Net(3).double().state_dict(), run / "narrow.pt")
    argv = ["predict", "good", *model(module=f"{__name__}.Fixed", checkpoint="narrow.pt"), "--delete=3"]
    assert "net.0.bias" in complaint(capsys, 1, *argv)


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        if text:
            raise BrokenPipeError
        return 0


def test_a_reader_that_goes_away_is_no_error(capsys, monkeypatch):
    """Oracle: the code that a shell gives a process that a closed pipe ends."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", ClosedPipe())
        assert main(["info", "good"]) == 141
    assert capsys.readouterr().err == ""


def test_progress_is_shown_on_a_terminal():
    """Oracle: the name of what is counted."""
    console = Console(force_terminal=True, file=io.StringIO(), record=True)
    question = Question(console, Path("good"), module=NET, checkpoint=Path("last.ckpt"), data=DATA)
    question.effect()
    assert "shards" in console.export_text()


def test_help_comes_from_the_docstrings(capsys):
    """Oracle: the words of the docstrings."""
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Predict an output of the model had units not been trained on." in text
    assert "which dataloader of the datamodule" in text


def test_classes_are_imported_from_the_current_directory(run, tmp_path, monkeypatch, capsys):
    """Oracle: a module that lies only there."""
    (tmp_path / "only_here.py").write_text(f"from {__name__} import Fixed, Data\n")
    monkeypatch.chdir(tmp_path)
    given = model(module="only_here.Fixed", data="only_here.Data", checkpoint=None)
    assert answer(capsys, "predict", str(run / "good"), *given, "--delete=3")["delete"] == [3]


def test_the_console_entry():
    """Oracle: ``lightning_sketch.plan``, in a process of its own."""
    argv = [sys.executable, "-m", "lightning_sketch", "plan", "50", "--json"]
    found = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["best"]["directions"] == plan(50).directions
    assert found.stderr == ""
