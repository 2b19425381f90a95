"""Single examples as units: error of predicted deletions against the number of directions, by design and estimator.

1,000 digits, a 64-32-10 tanh net, 30 epochs of batches of 50, float64; deletions of 1, 5, 20 and 100 random examples,
50 of each, all really retrained. Printed are the linear datamodeling score and the relative error of the changes of
200 losses, and how many of the true changes lie within the 90 % intervals.

    python examples/benchmarks/single_examples.py [--directions 16 64 128 256] [--degree 2] [--optimizer sgd]
        [--cases "gradient of a pilot" ..] [--quick]
"""

import argparse
import copy
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from models import QUIET
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import DeletionPredictor, GradientFeatures, Sketch, SketchCallback, StableAdamW
from lightning_sketch.metrics import IntervalCoverage, LinearDatamodelingScore, RelativeChangeError

TRAIN, TEST, BATCH = 1000, 200, 50
SIZES = (1, 5, 20, 100)
# name -> (design, whether its directions or its prior need the gradients of a pilot run, estimator)
CASES = {
    "sphere, mean": ("sphere", None, "mean"),
    "orthonormal, kernel": ("orthonormal", None, "kernel"),
    "orthonormal, gradient prior": ("orthonormal", "prior", "kernel"),
    "gradient at init, gradient prior": ("gradient", "prior", "kernel"),
    "gradient of a pilot": ("gradient", "design", "kernel"),
    "gradient of a pilot, and common": ("gradient+common", "design", "kernel"),
}


class Net(pl.LightningModule):
    """Two layers, and a record of the batches that it saw."""

    def __init__(self, optimizer: str, steps: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.optimizer, self.steps = optimizer, steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        optimizer = StableAdamW(self.parameters(), lr=0.01, betas=(0.85, 0.99), eps=1e-3, weight_decay=0)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / self.steps)
        return [optimizer], [{"scheduler": decay, "interval": "step"}]


class Batches(pl.Callback):
    """The rows of every batch."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(batch[2].clone())


class Study:
    """The data, the run and the truths."""

    def __init__(self, optimizer: str, epochs: int, num_sets: int) -> None:
        inputs, targets = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(inputs))[: TRAIN + TEST]
        x, y = torch.tensor(inputs[order] / 16), torch.tensor(targets[order])
        self.train = TensorDataset(x[:TRAIN], y[:TRAIN], torch.arange(TRAIN))
        self.test = x[TRAIN:], y[TRAIN:]
        self.optimizer, self.epochs = optimizer, epochs
        self.steps = epochs * TRAIN // BATCH
        batches = Batches()
        self.fit(batches)
        rng = np.random.default_rng(1)
        self.sets = {size: np.zeros((num_sets, TRAIN)) for size in SIZES}
        for size, deleted in self.sets.items():
            for row in deleted:
                row[rng.choice(TRAIN, size, replace=False)] = 1
        x_all = np.concatenate([np.zeros((1, TRAIN)), *self.sets.values()])
        losses = self.retrain(torch.from_numpy(x_all), batches.rows)
        self.truth = dict(zip(SIZES, (losses[1:] - losses[0]).reshape(len(SIZES), num_sets, TEST), strict=True))

    def fit(self, *callbacks: pl.Callback) -> Net:
        """The run, always the same."""
        pl.seed_everything(0, verbose=False)
        module = Net(self.optimizer, self.steps)
        trainer = pl.Trainer(
            max_epochs=self.epochs, accelerator="cpu", precision="64-true", callbacks=list(callbacks), **QUIET
        )
        trainer.fit(module, DataLoader(self.train, batch_size=BATCH, shuffle=True))
        return module

    def retrain(self, x: Tensor, batches: list[Tensor]) -> Tensor:
        """Train once for each row of deletion weights, all together; return the test losses, ``(D, TEST)``."""
        pl.seed_everything(0, verbose=False)
        module = Net(self.optimizer, self.steps).double()
        params = {n: p.detach().expand(len(x), *p.shape).clone() for n, p in module.named_parameters()}
        flat = [torch.nn.Parameter(p) for p in params.values()]
        twin = copy.copy(module)
        twin.parameters = lambda *_, **__: iter(flat)  # type: ignore[method-assign]
        made = twin.configure_optimizers()
        optimizer, scheduler = (made, None) if self.optimizer == "sgd" else (made[0][0], made[1][0]["scheduler"])

        def losses(p: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(module.net, p, (inputs,)), targets, reduction="none")

        def loss(p: dict[str, Tensor], weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
            return (losses(p, inputs, targets) * weights).mean()

        def named() -> dict[str, Tensor]:
            return {n.removeprefix("net."): p.detach() for n, p in zip(params, flat, strict=True)}

        for rows in batches:
            inputs, targets, _ = self.train[rows]
            gradients = vmap(grad(loss), in_dims=(0, 0, None, None))(named(), 1 - x[:, rows], inputs, targets)
            for p, g in zip(flat, gradients.values(), strict=True):
                p.grad = g
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return vmap(losses, in_dims=(0, None, None))(named(), *self.test)


def main() -> None:
    """Print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--directions", type=int, nargs="+", default=[16, 64, 128, 256, 512, 1000], help="real measurements"
    )
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--optimizer", choices=["adam", "sgd"], default="adam")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="few directions, epochs and sets")
    parser.add_argument("--figure", default="single_examples.png")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    counts = [8, 16] if given.quick else given.directions
    start = time.perf_counter()
    study = Study(given.optimizer, 2 if given.quick else 30, 10 if given.quick else 50)
    print(f"{4 * len(study.sets[1])} retrainings, all at once: {time.perf_counter() - start:.0f} s.\n")
    scores: dict[str, list[tuple[int, list[float], list[float]]]] = {}
    print("| case | measurements | " + " | ".join(f"LDS {s} / error / coverage" for s in SIZES) + " | run |")
    print("|---|---|" + "---|" * (len(SIZES) + 1))
    with tempfile.TemporaryDirectory() as directory:
        pilot = Path(directory) / "pilot"
        study.fit(GradientFeatures(pilot))
        for case in given.cases:
            design, gradients, estimator = CASES[case]
            for measurements in counts:
                complex_ = design in ("sphere", "orthonormal")
                start = time.perf_counter()
                dirpath = Path(directory) / f"{design}-{gradients == 'design'}-{measurements}"
                if not dirpath.exists():
                    features = pilot if gradients == "design" else None
                    count = measurements // 2 if complex_ or "common" in design else measurements
                    module = study.fit(SketchCallback(dirpath, count, given.degree, design=design, features=features))
                seconds = time.perf_counter() - start
                predictor = DeletionPredictor(Sketch.load(dirpath), module, features=pilot if gradients else None)
                effect = predictor.prepare(study.test)
                lds, error, coverage = [], [], []
                for size, x in study.sets.items():
                    prediction, true = effect.delete_many(x, estimator=estimator), study.truth[size]
                    lds.append(float(LinearDatamodelingScore()(prediction.change, true)))
                    error.append(float(RelativeChangeError()(prediction.change, true)))
                    coverage.append(float(IntervalCoverage()(prediction.interval(0.9), true + prediction.baseline)))
                columns = zip(lds, error, coverage, strict=True)
                cells = " | ".join(f"{a:.3f} / {b:.1%} / {c:.0%}" for a, b, c in columns)
                print(f"| {case} | {measurements} | {cells} | {seconds:.0f} s |", flush=True)
                scores.setdefault(case, []).append((measurements, lds, error))
    draw(scores, given.figure)


def draw(scores: dict[str, list[tuple[int, list[float], list[float]]]], path: str) -> None:
    """Score and error for sets of 20 against the number of measurements."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), constrained_layout=True)
    place = SIZES.index(20)
    markers = "osD^vP"
    for (case, rows), marker in zip(scores.items(), markers, strict=False):
        counts = [row[0] for row in rows]
        axes[0].plot(counts, [row[1][place] for row in rows], marker=marker, label=case)
        axes[1].plot(counts, [row[2][place] for row in rows], marker=marker, label=case)
    axes[0].set(ylabel="linear datamodeling score", ylim=(None, 1))
    axes[1].set(ylabel="relative error of the predicted change", yscale="log")
    for ax in axes:
        ax.set(xlabel="real measurements (two per complex direction)", xscale="log")
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle("Deleting 20 of 1,000 examples")
    figure.savefig(path, dpi=120)
    print(f"\nFigure: {path}")


if __name__ == "__main__":
    main()
