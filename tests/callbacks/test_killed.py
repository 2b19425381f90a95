"""Runs that are killed at random moments and resumed end with the sketch of the run that was left alone."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import FEATURES, Classifier, fit
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_sketch import Sketch, SketchCallback, StableAdamW

KILLS = 50


class Small(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
        self.double()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return StableAdamW(self.parameters(), lr=0.02, eps=1e-3)


def train(dirpath: Path) -> None:
    """Train, from the last checkpoint if there is one."""
    units = [i % 4 for i in range(12)]
    sketching = SketchCallback(dirpath / "sketch", 3, 2, units=units, every_n_train_steps=2)
    saving = ModelCheckpoint(dirpath, save_last=True, save_top_k=0, every_n_epochs=1)
    last = dirpath / "last.ckpt"
    checkpoint = last if last.exists() else None
    fit(Small, [sketching, saving], epochs=40, checkpoint=checkpoint, enable_checkpointing=True)


def in_a_process(dirpath: Path, seconds: float) -> bool:
    """Train in a fork, killed after some time; return whether it came to its end."""
    child = os.fork()
    if not child:
        code = 1
        try:
            train(dirpath)
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_killed_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the run that was left alone."""
    start = time.monotonic()
    train(tmp_path / "alone")
    whole = time.monotonic() - start
    expected = {n: b for shard in Sketch.load(tmp_path / "alone/sketch").shards() for n, b in shard.scaled.items()}
    moments = random.Random(0)
    kills = runs = 0
    while kills < KILLS:
        dirpath = tmp_path / f"run{runs}"
        while not in_a_process(dirpath, moments.uniform(0, 1.3 * whole)):
            kills += 1
            if (dirpath / "sketch/sketch.json").exists():
                Sketch.load(dirpath / "sketch").verify()
        runs += 1
        sketch = Sketch.load(dirpath / "sketch")
        sketch.verify()
        for shard in sketch.shards():
            for name, block in shard.scaled.items():
                torch.testing.assert_close(block, expected[name], rtol=1e-12, atol=1e-15)
        known = {"sketch.json", *sketch.metadata["files"]}
        assert {p.name for p in (dirpath / "sketch").iterdir() if not p.name.startswith(".")} == known
        assert [p.name for p in dirpath.iterdir() if p.is_file()] == ["last.ckpt"]
    with capsys.disabled():
        print(f"\n{runs} runs of {whole:.1f} s, killed {kills} times")
