"""Time of a tracked step on two DDP processes against one, on the same global batches, each process with one thread.

Wall time, since the processes run side by side: two cores must be free. The shortest step counts.

    python examples/benchmarks/processes.py [--directions 32] [--degree 3] [--batch 256] [--steps 6]
"""

import argparse
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from models import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import SketchCallback


class Classifier(pl.LightningModule):
    """A wide MLP, whose cost is in its products."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Ends(pl.Callback):
    """When every step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter())


def train(given: argparse.Namespace) -> None:
    """Train as one of ``WORLD_SIZE`` processes and print the seconds of the shortest step."""
    world = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    size = given.batch * given.steps
    loader = DataLoader(TensorDataset(torch.randn(size, 256), torch.randint(10, (size,))), given.batch // world)
    clock = Ends()
    with tempfile.TemporaryDirectory() as dirpath:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=world,
            strategy="ddp" if world > 1 else "auto",
            **QUIET,
            callbacks=[
                SketchCallback(dirpath, given.directions, given.degree, units=[i % 50 for i in range(size)]),
                clock,
            ],
        )
        trainer.fit(Classifier(), loader)
    if trainer.is_global_zero:
        print("seconds", float(torch.tensor(clock.times, dtype=torch.float64).diff().min()))


def step_seconds(world: int) -> float:
    """Start this script in so many processes with the arguments of this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, **shared, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate()[0] for process in processes]
    return float(outputs[0].split("seconds")[1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directions", type=int, default=32)
    parser.add_argument("--degree", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256, help="global batch")
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        train(given)
        return
    one, two = step_seconds(1), step_seconds(2)
    print("| seconds a step, one process | two processes | ratio |\n|---|---|---|")
    print(f"| {one:.2f} | {two:.2f} | {one / two:.2f} |")


if __name__ == "__main__":
    main()
