"""(d) CPU time per direction and training step of the names transformer, everything included.

python examples/benchmarks/microgpt_steps.py --names FILE [--steps 40] [--directions 128] [--degree 3]
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from models import QUIET
from torch.utils.data import DataLoader

from lightning_sketch import SketchCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from microgpt import MicroGPT, NamesDataset, collate_names, load_names


class StepTimes(pl.Callback):
    """CPU time of every training batch, callbacks included."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.process_time())


def step_seconds(names: list[str], *callbacks: pl.Callback) -> float:
    """Median CPU time from the end of a batch to the end of the next."""
    pl.seed_everything(0, verbose=False)
    clock = StepTimes()
    trainer = pl.Trainer(
        max_epochs=1,
        precision="64-true",
        accelerator="cpu",
        callbacks=[*callbacks, clock],
        **QUIET,
    )
    loader = DataLoader(NamesDataset(names), batch_size=1, collate_fn=collate_names)
    trainer.fit(MicroGPT(steps=len(names)).double(), loader)
    return float(torch.tensor(clock.times).diff()[2:].median())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", type=Path, required=True, help="a text file of names, one a line")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--directions", type=int, nargs="+", default=[128])
    parser.add_argument("--degree", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names = load_names(given.names, given.steps)
    plain = step_seconds(names)
    print("| directions | degree | ms per direction and step | plain steps per direction |\n|---|---|---|---|")
    for directions in given.directions:
        with tempfile.TemporaryDirectory() as dirpath:
            tracked = step_seconds(names, SketchCallback(dirpath, directions, given.degree, design="sphere"))
        each = (tracked - plain) / directions
        print(f"| {directions} | {given.degree} | {1000 * each:.2f} | {each / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
