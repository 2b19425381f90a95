"""How good are predictions, and their error bars? Sketches against really retraining, in several settings.

    python examples/benchmarks/predictions.py [--quick] [--seed N] [--names FILE] [--settings "names transformer" ..]

Each setting trains once with the sketch and retrains for every deletion, with the same batches and initial weights.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from models import QUIET
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import DeletionPredictor, Sketch, SketchCallback, StableAdamW
from lightning_sketch.prediction import Effect

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from microgpt import BOS, IGNORED, MicroGPT, NamesDataset, collate_names, load_names

UNITS, EPOCHS, BATCH, TRAIN = 50, 6, 48, 1437
NAMES, NAMES_BATCH, NAMES_TEST = 1000, 10, 100
STEPS = EPOCHS * (TRAIN // BATCH)
SIZES = (1, 2, 5, 12)
RETRAIN_TOGETHER = 10
WHOLE_CLASS = "class"


@dataclass(frozen=True)
class Setting:
    """What differs from the digits study: which units, which optimizer, which model, which directions."""

    units: str = "random"  # or "classes": five in each class; "unequal": log-normal sizes
    optimizer: str = "adam"  # or "sgd": momentum 0.9
    model: str = "mlp"  # or "cnn", or "names": the transformer of examples/paper
    design: str = "basis+common"
    directions: int = 1


SETTINGS = {
    "random sources": Setting(),
    "units within classes": Setting(units="classes"),
    "units of unequal size": Setting(units="unequal"),
    "SGD with momentum": Setting(optimizer="sgd"),
    "CNN": Setting(model="cnn"),
    "names transformer": Setting(model="names"),
    "random sources, 20 orthonormal": Setting(design="orthonormal", directions=20),
    "units within classes, 40 orthonormal": Setting(units="classes", design="orthonormal", directions=40),
}
QUICK = ("random sources", "units within classes")


class Classifier(pl.LightningModule):
    """A small network, trained on rows ``(image, label, index)``."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        if setting.model == "cnn":
            convolutions = (nn.Conv2d(1, 8, 3), nn.GELU(), nn.Conv2d(8, 16, 3, stride=2), nn.GELU(), nn.Flatten())
            self.net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *convolutions, nn.Linear(64, 10))
        else:
            self.net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
        self.rows: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: object, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self.rows.append(batch[2].clone())

    def configure_optimizers(self) -> dict:
        if self.setting.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        else:
            optimizer = StableAdamW(self.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def sketched(
    model: pl.LightningModule,
    loader: DataLoader,
    epochs: int,
    test: Any,
    setting: Setting,
    units: np.ndarray,
    seed: int,
    output: Any = "loss",
) -> Effect:
    """Train with a sketch; return the effect of deletions on the output."""
    with tempfile.TemporaryDirectory() as directory:
        callback = SketchCallback(directory, setting.directions, 3, design=setting.design, units=units, seed=seed)
        trainer = pl.Trainer(max_epochs=epochs, precision="64-true", accelerator="cpu", callbacks=[callback], **QUIET)
        trainer.fit(model, loader)
        return DeletionPredictor(Sketch.load(directory), model, output).prepare(test)


class Study:
    """One sketched run, and retraining of any deletions.

    Args:
        setting: what to train.
        seed: of the split, the units and the run.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        digits, generator = load_digits(), np.random.default_rng(1000 + seed)
        order = generator.permutation(len(digits.target))
        images, labels = torch.as_tensor(digits.data[order] / 16), torch.as_tensor(digits.target[order])
        self.train, self.test = (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])
        self.units = _units(setting.units, self.train[1].numpy(), generator)
        self.generator = generator
        pl.seed_everything(seed, verbose=False)
        self.model = Classifier(setting).double()
        self.initial = {name: p.detach().clone() for name, p in self.model.net.named_parameters()}
        loader = DataLoader(
            TensorDataset(*self.train, torch.arange(TRAIN)), batch_size=BATCH, shuffle=True, drop_last=True
        )
        test = (*self.test, torch.arange(len(self.test[1])))
        self.effect = sketched(self.model, loader, EPOCHS, test, setting, self.units, seed)

    def random_deletions(self, size: int, count: int) -> np.ndarray:
        """Return deletion weights ``(count, UNITS)``: every unit once for size 1, random sets else."""
        x = np.zeros((count, UNITS))
        for i, row in enumerate(x):
            row[[i % UNITS] if size == 1 else self.generator.choice(UNITS, size, replace=False)] = 1
        return x

    def true_changes(self, x: np.ndarray) -> np.ndarray:
        """Return the changes of the test losses, ``(len(x), tests)``, on retraining with deletion weights ``x``."""
        everything = np.concatenate([x, np.zeros((1, UNITS))])
        weights = torch.as_tensor(1 - everything)[:, torch.as_tensor(self.units)]
        losses = torch.cat([self._retrain(part) for part in weights.split(RETRAIN_TOGETHER)])
        return (losses[:-1] - losses[-1]).numpy()

    def _retrain(self, weights: Tensor) -> Tensor:
        """Return the test losses ``(D, tests)`` after training with example weights ``(D, TRAIN)``."""
        net, sgd = self.model.net, self.model.setting.optimizer == "sgd"

        def losses(parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(net, parameters, (images,)), labels, reduction="none")

        def objective(parameters: dict[str, Tensor], images: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
            return (weight * losses(parameters, images, labels)).mean()

        gradient = torch.func.vmap(torch.func.grad(objective), in_dims=(0, None, None, 0))
        parameters = {name: p.expand(len(weights), *p.shape).clone() for name, p in self.initial.items()}
        first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for step, rows in enumerate(self.model.rows):
            gradients = gradient(parameters, self.train[0][rows], self.train[1][rows], weights[:, rows])
            rate = 1 - step / STEPS
            for name, g in gradients.items():
                if sgd:
                    first[name] = 0.9 * first[name] + g
                    update = 0.1 * first[name]
                else:
                    first[name] = 0.9 * first[name] + 0.1 * g
                    second[name] = 0.99 * second[name] + 0.01 * g**2
                    scaled = second[name] / (1 - 0.99 ** (step + 1)) + 1e-3
                    update = 1e-2 * first[name] / (1 - 0.9 ** (step + 1)) / scaled.sqrt()
                parameters[name] = parameters[name] - rate * update
        with torch.no_grad():
            return torch.func.vmap(losses, in_dims=(0, None, None))(parameters, *self.test)


class NamesStudy:
    """One sketched run of the names transformer, one pass over the names, and retraining of any deletions.

    Args:
        setting: which directions.
        seed: of the units and the run.
        names: a file of names, one a line.
    """

    def __init__(self, setting: Setting, seed: int, names: Path) -> None:
        self.generator = np.random.default_rng(1000 + seed)
        given = load_names(names, NAMES + NAMES_TEST)
        train, test = given[:NAMES], given[NAMES:]
        self.units = self.generator.integers(0, UNITS, len(train))
        self.batches = collate_names(list(NamesDataset(train))).split(NAMES_BATCH)
        self.test = collate_names(list(NamesDataset(test)))
        pl.seed_everything(seed, verbose=False)
        self.model = MicroGPT(steps=len(self.batches)).double()
        self.initial = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        loader = DataLoader(NamesDataset(train), NAMES_BATCH, collate_fn=collate_names)
        self.effect = sketched(self.model, loader, 1, self.test, setting, self.units, seed, name_losses)

    random_deletions = Study.random_deletions
    true_changes = Study.true_changes

    def _retrain(self, weights: Tensor) -> Tensor:
        def call(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
            return torch.func.functional_call(self.model, parameters, (tokens,))

        def objective(parameters: dict[str, Tensor], names: Tensor, weight: Tensor) -> Tensor:
            losses, kept = token_losses(lambda tokens: call(parameters, tokens), names)
            return (weight[:, None] * losses).sum() / kept.sum()

        def test_losses(parameters: dict[str, Tensor]) -> Tensor:
            losses, kept = token_losses(lambda tokens: call(parameters, tokens), self.test)
            return losses.sum(1) / kept.sum(1)

        gradient = torch.func.vmap(torch.func.grad(objective), in_dims=(0, None, 0))
        parameters = {name: p.expand(len(weights), *p.shape).clone() for name, p in self.initial.items()}
        first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        weight_of = weights.split(NAMES_BATCH, dim=1)
        for step, names in enumerate(self.batches):
            rate = self.model.lr * (1 - step / len(self.batches))
            for name, g in gradient(parameters, names, weight_of[step]).items():
                first[name] = 0.85 * first[name] + 0.15 * g
                second[name] = 0.99 * second[name] + 0.01 * g**2
                scaled = second[name] / (1 - 0.99 ** (step + 1)) + 1e-3
                parameters[name] = parameters[name] - rate * first[name] / (1 - 0.85 ** (step + 1)) / scaled.sqrt()
        with torch.no_grad():
            return torch.func.vmap(test_losses)(parameters)


def token_losses(forward: Callable[[Tensor], Tensor], names: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``-log p`` of every token, 0 at the padding, and where there is none of it, ``(B, L - 1)``."""
    inputs, targets = names[:, :-1], names[:, 1:]
    kept = targets != IGNORED
    logits = forward(inputs.masked_fill(inputs == IGNORED, BOS))
    chosen = F.log_softmax(logits, -1).gather(-1, targets.masked_fill(~kept, 0)[..., None])[..., 0]
    return -chosen * kept, kept


def name_losses(module: MicroGPT, names: Tensor) -> Tensor:
    """Return the mean loss over the tokens of every name, ``(B,)``."""
    losses, kept = token_losses(module, names)
    return losses.sum(1) / kept.sum(1)


def _units(kind: str, labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    if kind == "classes":
        return labels * (UNITS // 10) + generator.integers(0, UNITS // 10, TRAIN)
    if kind == "unequal":
        shares = generator.lognormal(0, 1, UNITS)
        units = generator.choice(UNITS, TRAIN, p=shares / shares.sum())
        units[:UNITS] = np.arange(UNITS)  # none is empty
        return units
    return generator.integers(0, UNITS, TRAIN)


def _relative(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(predicted - true) / np.linalg.norm(true))


def _lds(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the rank correlation over deletions, averaged over test losses."""
    return float(np.mean([spearmanr(p, t).statistic for p, t in zip(predicted.T, true.T, strict=True)]))


def rows(name: str, setting: Setting, seed: int, count: int, names: Path | None) -> None:
    """Print a setting's rows, one for each size and one for all."""
    if setting.model == "names":
        assert names is not None
        study: Study | NamesStudy = NamesStudy(setting, seed, names)
    else:
        study = Study(setting, seed)
    cases = {str(size): study.random_deletions(size, count) for size in SIZES}
    if setting.units == "classes":
        cases[WHOLE_CLASS] = np.kron(np.eye(10), np.ones(UNITS // 10))
    covered_of_all = []
    for size, x in cases.items():
        p, true = study.effect.delete_many(x), study.true_changes(x)
        first = (p.by_degree[0] - p.baseline).numpy()
        third, resummed = p.change.numpy(), (p.resummed - p.baseline).numpy()
        low, high = p.interval(0.9)
        value = true + p.baseline.numpy()
        covered = (low.numpy() <= value) & (value <= high.numpy())
        if size != WHOLE_CLASS:
            covered_of_all.append(covered)
        good = p.reliable.numpy()
        ratio = "-"
        if good.any():
            ratio = f"{_relative(third[good], true[good]) / _relative(first[good], true[good]):.2f}"
        errors = " | ".join(f"{100 * _relative(change, true):.1f}" for change in (first, third, resummed))
        print(
            f"| {name} | {size} | {errors} | {_lds(first, true):.3f} | {_lds(third, true):.3f} | "
            f"{100 * covered.mean():.0f} | {100 * good.mean():.0f} | {ratio} |",
            flush=True,
        )
    print(f"| {name} | all sizes | | | | | | {100 * np.concatenate(covered_of_all).mean():.1f} | | |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two settings, 20 deletions of each size")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--names", type=Path, help="a text file of names, one a line, for the names transformer")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(
        "| setting | units deleted of 50 | error, first order, % | degree 3, % | resummed, % | LDS, first order | "
        "LDS, degree 3 | coverage at 90 % | reliable, % | degree 3 / first order where reliable |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in given.settings:
        if SETTINGS[name].model == "names" and given.names is None:
            print(f"{name}: skipped, give --names FILE")
        elif not given.quick or name in QUICK:
            rows(name, SETTINGS[name], given.seed, 20 if given.quick else 50, given.names)


if __name__ == "__main__":
    main()
