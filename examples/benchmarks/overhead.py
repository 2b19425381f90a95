"""CPU time of a tracked step that is not spent on jets: tracing ids, quiet re-execution, recording, checks.

One real direction of degree 1, carried in one pass. The time on jets is that of `training_step` and its backward pass
on replaced tensors, of the optimizer's step on them, and of what makes them and looks at the size of coefficients.

    python examples/benchmarks/overhead.py [--blocks 62] [--steps 100] [--rounds 3]
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from models import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import SketchCallback
from lightning_sketch.shadow import record, update
from lightning_sketch.shadow.jets_of_run import RunJets

BATCH = 4


class Deep(pl.LightningModule):
    """Many small layers, some of them with buffers or random numbers: what is done per module weighs most."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(blocks)]
        for block in layers[::10]:
            block.extend([nn.BatchNorm1d(4), nn.Dropout(0.1)])
        self.net = nn.Sequential(*layers, nn.Linear(4, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(pl.Callback):
    """CPU time from the end of a batch to the end of the next, and what of it was spent on jets."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.on_jets: list[float] = []
        self._on_jets = 0.0

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.process_time())
        self.on_jets.append(self._on_jets)
        self._on_jets = 0.0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within, what works on coefficients is timed."""
        call_with_tensors = record.call_with_tensors

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                start = time.process_time()
                try:
                    return function(*args)
                finally:
                    self._on_jets += time.process_time() - start

            return run

        with ExitStack() as stack:
            for owner, name in (
                (update, "step"),
                (RunJets, "_parameters"),
                (RunJets, "_gradients_as_in_run"),
                (RunJets, "_watch"),
            ):
                stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
            replaced = mock.patch.object(
                record, "call_with_tensors", lambda module, tensors, f: call_with_tensors(module, tensors, timed(f))
            )
            stack.enter_context(replaced)
            yield


def measure(module: Deep, steps: int, callbacks: list[pl.Callback]) -> tuple[float, float]:
    """Median milliseconds of a step, and of its jets."""
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[*callbacks, clock],
        **QUIET,
    )
    data = TensorDataset(torch.randn(steps * BATCH, 4), torch.randint(0, 3, (steps * BATCH,)))
    with clock.attached():
        trainer.fit(module, DataLoader(data, batch_size=BATCH))
    warm_up = 5
    step, jets = np.diff(clock.ends)[warm_up:], np.array(clock.on_jets)[1 + warm_up :]
    return 1e3 * float(np.median(step)), 1e3 * float(np.median(jets))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=62, help="of a linear layer and a tanh, in a container")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="everything is measured so often, the shortest counts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    directions = np.random.default_rng(0).standard_normal((1, given.steps * BATCH)) / given.steps
    plain, tracked = [], []
    for _ in range(given.rounds):
        plain.append(measure(Deep(given.blocks), given.steps, [])[0])
        with tempfile.TemporaryDirectory() as dirpath:
            callback = SketchCallback(dirpath, directions, 1)
            tracked.append(measure(Deep(given.blocks), given.steps, [callback]))
    step, (total, jets) = min(plain), min(tracked)
    modules, params = list(Deep(given.blocks).modules()), list(Deep(given.blocks).parameters())
    print(f"{len(modules)} modules, {len(params)} parameters.\n")
    print("| part of a tracked step | ms | plain steps |\n|---|---|---|")
    parts = {"the plain step": step, "jets": jets, "overhead": total - jets - step, "together": total}
    for part, milliseconds in parts.items():
        print(f"| {part} | {milliseconds:.2f} | {milliseconds / step:.2f} |")


if __name__ == "__main__":
    main()
