"""CPU time of a tracked step that is not spent on jets: tracing ids, quiet re-execution, recording, checks.

One real direction of degree 1, carried in one pass. The time on jets is that of `training_step` and its backward pass
on replaced tensors, of the optimizer's step on them, and of what makes them, looks at the size of coefficients and
frees them: here the jets of parameters, gradients and weights are kept until the pass has ended, and freed at once.
Passes of Python's garbage collector, which begin wherever enough objects have been made, most of them jets, have a row
of their own. Everything else is what the callback's other functions take.

Jets leave the memory of all others out of the caches: the run's own step takes longer between them than by itself, and
so does everything else. The second column is what the same work takes without jets: the step is recorded, run again
and checked as in the first, on plain tensors in the place of those with coefficients.

    python examples/benchmarks/overhead.py [--blocks 62] [--steps 100] [--rounds 3]
"""

import argparse
import gc
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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
from lightning_sketch.shadow import jets_of_run, record, update
from lightning_sketch.shadow.jets_of_run import RunJets

BATCH = 4
KINDS = ("run", "callback", "jets", "collector")
# What is called of the callback in every step, besides what takes the place of `training_step`.
ENTRIES = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_after_backward",
    "on_before_optimizer_step",
    "_leave_step",
    "on_train_batch_end",
)


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
    """CPU time of every step from one end of a batch to the next: the run's, the callback's, and that of jets."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._spent = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = KINDS[0], time.process_time()

    def _turn_to(self, kind: str) -> str:
        now, before = time.process_time(), self._kind
        self._spent[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    def on_train_batch_end(self, *_: object) -> None:
        self._turn_to(self._kind)
        self.steps.append(self._spent)
        self._spent = dict.fromkeys(KINDS, 0.0)

    def collects(self, phase: str, _: object) -> None:
        """Called before and after every pass of the garbage collector."""
        if phase == "start":
            self._before = self._turn_to("collector")
        else:
            self._turn_to(self._before)

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            before = self._turn_to(kind)
            try:
                return function(*args)
            finally:
                self._turn_to(before)

        return run

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within, the callback's own work and what works on coefficients are told from the run."""
        recorded, call_with_tensors = SketchCallback._recorded, record.call_with_tensors
        in_passes, kept = SketchCallback._in_passes, []

        def keep(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                found = function(*args)
                kept.append([*found.values()] if isinstance(found, dict) else found)
                return found

            return run

        def carry(*args: Any) -> None:
            in_passes(*args)
            self.timed("jets", kept.clear)()

        made = [(RunJets, name) for name in ("_parameters", "_buffers", "_gradients_as_in_run", "weights")]
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(SketchCallback, "_in_passes", carry))
            for owner, name in made:
                stack.enter_context(mock.patch.object(owner, name, keep(getattr(owner, name))))
            for owner, name in [
                *made,
                (update, "step"),
                (RunJets, "_watch"),
                (RunJets, "_rescale"),
                (jets_of_run, "_copies"),
            ]:
                stack.enter_context(mock.patch.object(owner, name, self.timed("jets", getattr(owner, name))))
            for name in ENTRIES:
                whole = self.timed("callback", getattr(SketchCallback, name))
                stack.enter_context(mock.patch.object(SketchCallback, name, whole))
            own_step = self.timed(
                "callback", lambda c, t, m, step, args: recorded(c, t, m, self.timed("run", step), args)
            )
            stack.enter_context(mock.patch.object(SketchCallback, "_recorded", own_step))
            replaced = mock.patch.object(
                record, "call_with_tensors", lambda places, t, f: call_with_tensors(places, t, self.timed("jets", f))
            )
            stack.enter_context(replaced)
            yield


class _Values:
    """The value of a plain tensor as a jet's: itself."""

    def __get__(self, tensor: Tensor, owner: type) -> Tensor:
        return tensor.detach()


@contextmanager
def without_jets() -> Iterator[None]:
    """Within, steps are run again on plain tensors, which have no coefficients."""

    def plain(value: Tensor, _: object, lead: object, requires_grad: bool = False) -> Tensor:
        return value.requires_grad_(requires_grad)

    with ExitStack() as stack:
        for name, value in (("primal", _Values()), ("block", None), ("coefficients", None)):
            stack.enter_context(mock.patch.object(Tensor, name, value, create=True))
        for name in ("wrap", "jet"):
            stack.enter_context(mock.patch.object(jets_of_run, name, plain))
        stack.enter_context(mock.patch.object(RunJets, "weights", lambda jets, units: torch.ones(len(units))))
        stack.enter_context(mock.patch.object(SketchCallback, "_write"))  # there is nothing to write
        yield


def measure(module: Deep, steps: int, callbacks: list[pl.Callback]) -> dict[str, float]:
    """Median milliseconds of a step's parts."""
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[*callbacks, clock],
        **QUIET,
    )
    data = TensorDataset(torch.randn(steps * BATCH, 4), torch.randint(0, 3, (steps * BATCH,)))
    loader = DataLoader(data, batch_size=BATCH)
    gc.callbacks.append(clock.collects)
    try:
        with clock.attached():
            trainer.fit(module, loader)
    finally:
        gc.callbacks.remove(clock.collects)
    warm_up = 6
    return {kind: 1e3 * float(np.median([step[kind] for step in clock.steps[warm_up:]])) for kind in KINDS}


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
    plain: list[float] = []
    tracked: list[list[dict[str, float]]] = [[], []]
    for _ in range(given.rounds):
        plain.append(measure(Deep(given.blocks), given.steps, [])["run"])
        for found, context in zip(tracked, (nullcontext, without_jets), strict=True):
            with tempfile.TemporaryDirectory() as dirpath, context():
                found.append(measure(Deep(given.blocks), given.steps, [SketchCallback(dirpath, directions, 1)]))
    step = min(plain)
    best = [min(found, key=lambda parts: sum(parts.values())) for found in tracked]
    modules, params = list(Deep(given.blocks).modules()), list(Deep(given.blocks).parameters())
    print(f"{len(modules)} modules, {len(params)} parameters.\n")
    print(f"The plain step by itself: {step:.2f} ms.\n")
    print("| part of a tracked step | ms | plain steps | ms without jets | plain steps |\n|---|---|---|---|---|")
    rows = {
        "run": "the plain step",
        "jets": "its re-run, on jets or plain tensors",
        "collector": "the garbage collector",
        "callback": "everything else",
    }
    for kind, part in rows.items():
        numbers = (f"{parts[kind]:.2f} | {parts[kind] / step:.2f}" for parts in best)
        print(f"| {part} | {' | '.join(numbers)} |")
    totals = (f"{sum(parts.values()):.2f} | {sum(parts.values()) / step:.2f}" for parts in best)
    print(f"| together | {' | '.join(totals)} |")


if __name__ == "__main__":
    main()
