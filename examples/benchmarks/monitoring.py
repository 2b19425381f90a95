"""What does the stability monitor cost? CPU time of training with it, against the same training without.

    python examples/benchmarks/monitoring.py [--steps 500]

An MLP whose step is bound by its matrix products, float32: alone at the defaults of `StabilityMonitor`, and beside a
`SketchCallback`, where it measures five times as often as by default.
"""

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from models import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import SketchCallback, StabilityMonitor, StableAdamW

WIDTH, BATCH, BATCHES = 512, 512, 20


class MLP(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
        self.net = nn.Sequential(*hidden, nn.Linear(WIDTH, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return StableAdamW(self.parameters(), lr=1e-3)


def seconds(steps: int, *callbacks: pl.Callback) -> float:
    pl.seed_everything(0, verbose=False)
    module = MLP()
    rows = BATCH * BATCHES
    loader = DataLoader(TensorDataset(torch.randn(rows, WIDTH), torch.randint(0, 10, (rows,))), batch_size=BATCH)
    trainer = pl.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=list(callbacks), **QUIET)
    start = time.process_time()
    trainer.fit(module, loader)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    units = [i % 100 for i in range(BATCH * BATCHES)]
    seconds(20)
    plain, alone = seconds(steps), seconds(steps, StabilityMonitor(units=units))
    print("| training | CPU seconds | ratio |\n|---|---|---|")
    print(f"| {steps} steps without | {plain:.1f} | 1 |")
    print(f"| with a monitor at its defaults | {alone:.1f} | {alone / plain:.2f} |")
    few = max(1, steps // 5)
    with tempfile.TemporaryDirectory() as directory:
        sketch = seconds(few, SketchCallback(Path(directory) / "a", 4, 2, units=units))
        both = seconds(
            few, SketchCallback(Path(directory) / "b", 4, 2, units=units), StabilityMonitor(100, units=units)
        )
    print(f"| {few} steps with a sketch of 4 complex directions, degree 2 | {sketch:.1f} | 1 |")
    print(f"| and a monitor beside it | {both:.1f} | {both / sketch:.2f} |")


if __name__ == "__main__":
    main()
