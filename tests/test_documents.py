"""What the documents say to type is typed here, in the order in which they say it."""

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path.relative_to(ROOT)
    for path in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:PYTHONPATH=\S+ )?python examples/[^`]+)`")
# The two commands of the README, which `.ci/run` executes as they are, and what the fixture runs.
MADE_BY_CI = ("python -m pip install", "python examples/digits.py")
LONG = ("examples/paper", "examples/benchmarks")  # minutes to an hour each: only their options are looked at
# What README takes for given: the reader's own script.
READERS = """
import lightning.pytorch as pl
import lightning_sketch
from digits import DigitClassifier, load_data
from torch.utils.data import DataLoader, Subset, TensorDataset
(dataset, vendor_of_example, test_batch), model = load_data(), DigitClassifier()
dataset = TensorDataset(*(t.float() if t.is_floating_point() else t for t in dataset.tensors))
test_batch = test_batch[0].float(), test_batch[1]
train_dataloader = DataLoader(dataset, batch_size=48, shuffle=True, drop_last=True)
withdrawn = [i for i, vendor in enumerate(vendor_of_example) if vendor in (3, 17)]
kept = sorted(set(range(len(dataset))) - set(withdrawn))
forget_loader, retain_loader = (DataLoader(Subset(dataset, rows), batch_size=48) for rows in (withdrawn, kept))
test_loader = DataLoader(TensorDataset(*test_batch), batch_size=120)
"""


def run(command: str, where: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=where, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def digits_output(tmp_path_factory):
    """What `python examples/digits.py` leaves."""
    where = tmp_path_factory.mktemp("digits")
    run(f"python {ROOT}/examples/digits.py", where)
    return where / "digits_output"


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if not str(d).startswith(LONG)], ids=str)
def test_commands_and_code_of_a_document_run(document, digits_output, tmp_path, monkeypatch):
    """Oracle: exit codes, and for `>>>` the printed results of the document."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "digits_output").symlink_to(digits_output)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    names: dict[str, object] = {}
    if document.name == "README.md" and document.parent == Path():
        exec(READERS, names)
    blocks = BLOCK.findall((ROOT / document).read_text())
    assert blocks
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    for language, text in blocks:
        if language == "bash":
            if not text.startswith(MADE_BY_CI):
                run(text, tmp_path)
        elif ">>>" in text:
            test = doctest.DocTestParser().get_doctest(text, names, str(document), str(document), 0)
            runner = doctest.DocTestRunner(optionflags=flags)
            runner.run(test, clear_globs=False)
            assert runner.failures == 0, f"{document}: see the output above"
            names.update(test.globs)
        else:
            exec(compile(text, str(document), "exec"), names)


def commands(document: Path) -> list[str]:
    text = (ROOT / document).read_text()
    of_blocks = [line for language, block in BLOCK.findall(text) if language == "bash" for line in block.splitlines()]
    found = [c.split("#")[0].strip() for c in [*of_blocks, *INLINE.findall(text)] if "python examples/" in c]
    return [c for c in found if not c.startswith(MADE_BY_CI)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", sorted({c for d in DOCUMENTS if str(d).startswith(LONG) for c in commands(d)}), ids=str
)
def test_commands_of_long_runs_exist(command, tmp_path):
    """Oracle: the script's own help knows every option of the command."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shown = run(f"{command} --help", tmp_path).stdout
    for option in re.findall(r"--[\w-]+", command):
        assert option in shown
