"""(c) Peak memory of a tracked run against the plan that is made on its first batch.

Every run is a process of its own: a short ``Trainer.fit`` with ``SketchCallback``, the writing of the sketch included,
and one without, whose peak is subtracted (resident memory on the CPU, what the allocator gave on a GPU).

    python examples/benchmarks/peak_memory.py [--cases gpt] [--degrees 1 2] [--directions 16] [--device cuda]
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from models import CASES, train

from lightning_sketch import SketchCallback

UNITS = 8


class BeforeWriting(pl.Callback):
    """The peak at the end of the last step; stands before the callback that writes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.peak = 0

    def on_train_end(self, *_: object) -> None:
        self.peak = peak(self.device)


def peak(device: str) -> int:
    """Peak bytes of this process so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def fit(
    name: str, device: str, steps: int, degree: int, directions: int, per_pass: int | Literal["auto"], real: bool
) -> dict[str, int]:
    """Train for some steps, tracked unless there are no directions; return bytes planned and measured."""
    planned = 0
    pl.seed_everything(0, verbose=False)
    case = CASES[name]()
    examples = torch.arange(steps * len(case.inputs))
    rows = examples % len(case.inputs)
    before_writing = BeforeWriting(device)
    callbacks: list[pl.Callback] = [before_writing]
    with tempfile.TemporaryDirectory() as dirpath:
        if directions:
            along = torch.randn(directions, UNITS, dtype=torch.float64 if real else torch.complex128).numpy()
            units = (examples % UNITS).tolist()
            tracked = SketchCallback(dirpath, along, degree, units=units, directions_per_pass=per_pass)
            callbacks.append(tracked)
        train(case, rows, callbacks, "gpu" if device == "cuda" else "cpu")
        if directions:
            planned = tracked.planned_bytes or 0
    return {"planned": planned, "steps": before_writing.peak, "whole": peak(device)}


def in_a_process(*args: Any) -> dict[str, int]:
    """Return what :func:`fit` gives in a fresh process."""
    command = [sys.executable, __file__, "--run", json.dumps(args)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--degrees", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--directions", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--real", action="store_true", help="real directions instead of complex ones")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        print(json.dumps(fit(*json.loads(given.run))))
        return
    print(
        "| model | degree | directions | in one pass | planned MiB | measured MiB | with the writing | "
        "measured / planned |\n|---|---|---|---|---|---|---|---|"
    )
    kind = "real" if given.real else "complex"
    for name in given.cases:
        plain = in_a_process(name, given.device, given.steps, 1, 0, "auto", given.real)
        for degree in given.degrees:
            for directions in given.directions:
                for per_pass in ("auto", directions):
                    tracked = in_a_process(name, given.device, given.steps, degree, directions, per_pass, given.real)
                    planned, steps, whole = (
                        x / 2**20
                        for x in (tracked["planned"], *(tracked[key] - plain[key] for key in ("steps", "whole")))
                    )
                    print(
                        f"| {name} | {degree} | {directions} {kind} | {per_pass if per_pass == 'auto' else 'all'} | "
                        f"{planned:.0f} | {steps:.0f} | {whole:.0f} | {whole / planned:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
