"""Peers side by side: what other libraries predict of deletions that are really retrained, and at what cost.

1,000 digits and a tanh net, 300 names and a transformer, single examples as units: our degrees 1 to 3, the exact
metagradient, influence functions, EK-FAC, TRAK, TracIn, and plain retraining of all sets at once. Each library gets an
environment of its own, which pip makes on first use under ``--environments``, with the CPU build of torch: where the
package index has none, set ``PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu``. What can not be installed or
fails is skipped, with the reason.

    python examples/benchmarks/peers.py [--names FILE] [--peers NAME ...] [--environments DIR] [--quick]
"""

import argparse
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from peer_workers import bytes_of
from safetensors import safe_open
from safetensors.torch import save_file
from single_examples import POINTS
from studies import Study, digits, example_losses, names
from torch import Tensor

from lightning_sketch import DeletionPredictor, GradientFeatures, Sketch, SketchCallback
from lightning_sketch.metrics import IntervalCoverage, LinearDatamodelingScore, RelativeChangeError

WORKERS = Path(__file__).resolve().with_name("peer_workers.py")
LEVEL = 0.9  # of intervals
PATIENCE = 600  # seconds, for one method
CHECKPOINTS = 30
Cases = dict[str, tuple[str, int, int]]  # what is printed -> (design, directions, degree)


# peer -> what pip installs
PEERS = {
    "autograd": None,
    "bergson": "bergson==2.5.1",
    "pydvl": "pyDVL[influence]==0.10.0",
    "dattri": "dattri==0.3.0",
    "kronfluence": "kronfluence==1.0.1",
    "traker": "traker==0.3.2",
}
# what is printed -> (peer, function of peer_workers.py, whether its scores are changes of the loss in nats)
METHODS = {
    "exact metagradient (autograd through training)": ("autograd", "autograd", True),
    "exact metagradient (bergson), 20 outputs": ("bergson", "bergson", True),
    "influence function, exact Hessian (pyDVL)": ("pydvl", "pydvl_exact", True),
    "influence function, Nyström (pyDVL)": ("pydvl", "pydvl_nystroem", True),
    "influence function, CG (dattri)": ("dattri", "dattri_cg", True),
    "EK-FAC (kronfluence)": ("kronfluence", "kronfluence", True),
    "TRAK (dattri)": ("dattri", "dattri_trak", True),
    "TRAK (traker)": ("traker", "traker", False),
    "TracIn (dattri)": ("dattri", "dattri_tracin", True),
}


class Skipped(Exception):
    """Why a method has no row."""


def environment(name: str, directory: Path) -> Path:
    """Return the interpreter of a peer's environment, made if need be."""
    if PEERS[name] is None:
        return Path(sys.executable)
    home = directory.resolve() / name
    python = home / "bin" / "python"
    if (home / "complete").exists():
        return python
    build = "+cpu" if sys.platform == "linux" else ""  # without it, pip fetches gigabytes of CUDA
    home.mkdir(parents=True, exist_ok=True)
    constraints = home / "constraints.txt"
    constraints.write_text(f"torch=={torch.__version__.split('+')[0]}{build}\nlightning=={lightning.__version__}\n")
    shared = ["torch", "lightning", "scipy", "safetensors", "scikit-learn"]
    checked_run([sys.executable, "-m", "venv", str(home)])
    checked_run([str(python), "-m", "pip", "install", "-q", "-c", str(constraints), *shared, PEERS[name]])
    # some pull them in, built for another torch, which then can not be imported
    checked_run([str(python), "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio"])
    (home / "complete").touch()
    return python


def checked_run(command: list[str], timeout: float | None = None) -> None:
    """Run a command, one thread, or raise `Skipped` with the last line of its errors."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKERS.parents[2]), "HF_HUB_OFFLINE": "1"}
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=timeout, env={**os.environ, **variables}
        )
    except subprocess.TimeoutExpired as error:
        raise Skipped(f"takes more than {timeout:.0f} s") from error
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()] or [f"exit code {error.returncode}"]
        raise Skipped(lines[-1].strip()[:200]) from error


def save_run(study: Study, directory: Path) -> None:
    """Write what the workers need."""
    record = study.record
    count = min(CHECKPOINTS, study.steps)
    checkpoints = [study.steps * (2 * i + 1) // (2 * count) for i in range(count)]
    parameters = {
        "initial": record.states[0],
        "trained": study.trained,
        **{str(i): record.states[step] for i, step in enumerate(checkpoints)},
    }
    tensors = {f"{point}.{name}": p for point, values in parameters.items() for name, p in values.items()}
    tensors["train.inputs"], tensors["train.targets"], _ = study.train.tensors
    tensors["test.inputs"], tensors["test.targets"] = study.test
    tensors["rows"] = torch.stack(record.rows)
    tensors["rates"] = torch.tensor(record.rates, dtype=torch.float64)
    tensors["checkpoint_steps"] = torch.tensor(checkpoints)
    contiguous = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    save_file(contiguous, directory / "run.safetensors", {"name": study.name, "optimizer": study.optimizer})


@dataclass(frozen=True)
class Cost:
    """Seconds of one thread, and bytes.

    Args:
        precomputation: what is done once, for any outputs.
        outputs: what is done for the outputs, before any set.
        a_set: for one of all sets, asked together.
        stored: bytes kept between precomputation and outputs, beside model and data.
    """

    precomputation: float
    outputs: float
    a_set: float
    stored: int

    def __str__(self) -> str:
        seconds = f"{self.precomputation:.1f} s | {self.outputs:.1f} s | {1000 * self.a_set:.3g} ms"
        return f"{seconds} | {self.stored / 2**20:.1f} MiB"


def print_row(
    study: Study,
    label: str,
    changes: dict[int, Tensor],
    cost: Cost,
    coverage: dict[int, float] | None = None,
    in_nats: bool = True,
) -> None:
    """Print scores and errors for every size, on the outputs that there are predictions of, and costs."""
    cells = []
    for size, change in changes.items():
        true = study.truth[size][:, : change.shape[1]]
        error = f"{RelativeChangeError()(change, true):.1%}" if in_nats else "-"
        inside = f"{coverage[size]:.0%}" if coverage else "-"
        cells.append(f"{LinearDatamodelingScore()(change, true):.3f} / {error} / {inside}")
    print(f"| {label} | {' | '.join(cells)} | {cost} |", flush=True)


def peer_row(study: Study, label: str, environments: Path, directory: Path) -> None:
    """Run a method in its environment and print its row; its predictions are sums over the set."""
    peer, method, in_nats = METHODS[label]
    try:
        python = environment(peer, environments)
        checked_run([str(python), str(WORKERS), method, str(directory)], PATIENCE)
    except Skipped as reason:
        print(f"| {label} | skipped: {reason} |", flush=True)
        return
    with safe_open(directory / f"{method}.safetensors", framework="pt") as file:
        of_examples, about = file.get_tensor("changes"), file.metadata()
    start = time.process_time()
    changes = {size: torch.from_numpy(deleted) @ of_examples for size, deleted in study.sets.items()}
    a_set = (time.process_time() - start) / study.num_sets
    cost = Cost(float(about["precomputation"]), float(about["outputs"]), a_set, int(about["bytes"]))
    print_row(study, label, changes, cost, in_nats=in_nats)


def sketch_rows(study: Study, directory: Path, cases: Cases) -> dict[str, Cost]:
    """Print a row for each sketch and return its cost."""
    costs = {}
    start = time.process_time()
    study.fit(GradientFeatures(directory / "features", at=POINTS, projection=4096))
    pilot = time.process_time() - start
    for label, (design, directions, degree) in cases.items():
        dirpath, informed = directory / f"sketch-{len(costs)}", design == "gradient"
        features = directory / "features" if informed else None
        times = [time.process_time()]
        module = study.fit(SketchCallback(dirpath, directions, degree, design=design, features=features))
        times.append(time.process_time())
        output = "loss" if study.name == "digits" else losses_of_names  # the same losses, known to be such
        predictor = DeletionPredictor(Sketch.load(dirpath), module, output, features=features)
        effect = predictor.prepare(study.test)
        effect.delete([0])  # makes the factors
        times.append(time.process_time())
        predictions = {size: effect.delete_many(deleted) for size, deleted in study.sets.items()}
        times.append(time.process_time())
        precomputation, outputs, all_sets = np.diff(times)
        stored = bytes_of(dirpath) + (bytes_of(features) if features else 0)
        costs[label] = Cost(precomputation + pilot * informed, outputs, all_sets / study.num_sets, stored)
        coverage = {
            size: float(IntervalCoverage()(p.interval(LEVEL), study.baseline + study.truth[size]))
            for size, p in predictions.items()
        }
        print_row(study, label, {size: p.change for size, p in predictions.items()}, costs[label], coverage)
    return costs


def losses_of_names(module: Any, batch: Any) -> Tensor:
    """The mean over the tokens of every name."""
    return example_losses(module(batch[0]), batch[1])


def pilot_cases(directions: int) -> Cases:
    """Degrees 1 to 3, along what units share in a pilot run."""
    return {f"sketch, {directions} directions of a pilot, degree {r}": ("gradient", directions, r) for r in (1, 2, 3)}


def compare(study: Study, cases: Cases, chosen: list[str], environments: Path) -> None:
    """Print the table of a study, and where the sketches overtake retraining."""
    start = time.process_time()
    study.retrain(np.concatenate(list(study.sets.values())))
    together = (time.process_time() - start) / study.num_sets
    start = time.process_time()
    study.fit()
    alone = time.process_time() - start
    units, outputs = len(study.train), len(study.baseline)
    print(f"\n{study.name}: {units} units, {study.steps} steps, {outputs} outputs.")
    print(f"Of sets: LDS / relative error / coverage at {LEVEL:.0%}.\n")
    print(f"| method | {' | '.join(f'sets of {s}' for s in study.sets)} | precomputation | outputs | a set | stored |")
    print("|---|" + "---|" * (len(study.sets) + 4))
    for label, each in (("retraining, all sets at once", together), ("retraining, one by one in Lightning", alone)):
        print_row(study, label, study.truth, Cost(0, 0, each, 0))
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        save_run(study, directory)
        costs = sketch_rows(study, directory, cases)
        for label, (peer, _, _) in METHODS.items():
            if peer in chosen:
                peer_row(study, label, environments, directory)
    print("\n| sketch | sets until it overtakes retraining all at once | one by one |\n|---|---|---|")
    for label, cost in costs.items():
        before = cost.precomputation + cost.outputs
        cells = [f"{math.ceil(before / (r - cost.a_set)):,}" if r > cost.a_set else "never" for r in (together, alone)]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print a table for each study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", type=Path, help="a text file of names, one a line")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "lightning_sketch_peers")
    parser.add_argument("--optimizer", choices=["adam", "sgd"], default="adam", help="of the digits")
    parser.add_argument("--quick", action="store_true", help="short runs, few directions and sets")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    epochs, count, num_sets, directions = (2, 40, 10, 16) if given.quick else (30, 300, 40, 256)
    every_unit: Cases = {"sketch, every unit, degree 1": ("basis", 1, 1)}
    study = digits(given.optimizer, epochs, num_sets)
    compare(study, {**pilot_cases(directions), **every_unit}, given.peers, given.environments)
    if given.names is None:
        print("\nThe names transformer is skipped: give --names FILE.")
        return
    every_unit["sketch, every unit and the common mode, degree 3"] = ("basis+common", 1, 3)
    study = names(given.names, count, num_sets)
    compare(study, {**pilot_cases(directions // 2), **every_unit}, given.peers, given.environments)


if __name__ == "__main__":
    main()
