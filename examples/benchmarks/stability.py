"""Is the stability monitor right? Growth, trusted deletion size and the error there, over optimizers and models.

    python examples/benchmarks/stability.py [--models MLP CNN transformer] [--seed N] [--quick]

Digits, 50 units of about 29 examples, six epochs, float64. Each cell trains with a monitor of the whole run and with
one of windows, and measures the error of degree 3, exact along every deletion (design "indicator"), against really
retraining without the units: three random sets of the size that the monitor trusts, and of four times as many.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from models import QUIET
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import DeletionPredictor, Reweight, Sketch, SketchCallback, StabilityMonitor, StableAdamW
from lightning_sketch.callbacks.stability import Measurement
from lightning_sketch.prediction.stability import TOLERANCE

UNITS, EPOCHS, BATCH, TRAIN = 50, 6, 48, 1437
STEPS = EPOCHS * (TRAIN // BATCH)
SETS = 3
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"ReLU": nn.ReLU, "GELU": nn.GELU, "tanh": nn.Tanh}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params, model: torch.optim.SGD(params, lr=0.1 if model == "MLP" else 0.01, momentum=0.9),
    "AdamW": lambda params, model: torch.optim.AdamW(params, lr=0.01),
    "StableAdamW": lambda params, model: StableAdamW(params, lr=0.01 if model != "transformer" else 0.003, eps=1e-3),
    "RMSprop": lambda params, model: torch.optim.RMSprop(params, lr=0.001),
}
Cell = tuple[str, str, str]  # optimizer, activation, model


class Transformer(nn.Module):
    """One pre-norm layer over the eight rows of an image."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, 16), nn.Parameter(0.1 * torch.randn(8, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.before_attention, self.before_mlp = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), activation, nn.Linear(32, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(1, (8, 8))) + self.place
        normed = self.before_attention(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        x = x + self.mlp(self.before_mlp(x))
        logits: Tensor = self.head(x.mean(1))
        return logits


def network(activation: str, model: str) -> nn.Module:
    act = ACTIVATIONS[activation]
    if model == "MLP":
        return nn.Sequential(nn.Linear(64, 64), act(), nn.Linear(64, 10))
    if model == "CNN":
        convolutions = (nn.Conv2d(1, 8, 3), act(), nn.Conv2d(8, 16, 3, stride=2), act(), nn.Flatten())
        return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *convolutions, nn.Linear(64, 10))
    return Transformer(act())


class Classifier(pl.LightningModule):
    """A small network and one of the optimizers, its learning rate falling linearly."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        self.net = network(*cell[1:])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict:
        optimizer = OPTIMIZERS[self.cell[0]](self.parameters(), self.cell[2])
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


class Study:
    """The data, and runs of one cell."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = np.random.default_rng(seed)
        x, y = load_digits(return_X_y=True)
        order = self.generator.permutation(len(y))
        images, labels = torch.tensor(x[order] / 16), torch.tensor(y[order])
        self.train = TensorDataset(images[:TRAIN], labels[:TRAIN])
        self.test = images[TRAIN:], labels[TRAIN:]
        self.units = self.generator.integers(0, UNITS, TRAIN)

    def losses(self, module: pl.LightningModule, batch: object = None) -> Tensor:
        return F.cross_entropy(module.net(self.test[0]), self.test[1], reduction="none")

    def fit(self, cell: Cell, *callbacks: pl.Callback) -> Classifier:
        pl.seed_everything(self.seed, verbose=False)
        module = Classifier(cell)
        trainer = pl.Trainer(
            max_epochs=EPOCHS, accelerator="cpu", precision="64-true", callbacks=list(callbacks), **QUIET
        )
        trainer.fit(module, DataLoader(self.train, batch_size=BATCH, shuffle=True, drop_last=True))
        return module

    def monitored(self, cell: Cell, window: int | None) -> list[Measurement]:
        monitor = StabilityMonitor(50, window, output=self.losses, units=self.units)
        self.fit(cell, monitor)
        return monitor.history

    def errors(self, cell: Cell, sizes: Sequence[int]) -> list[float]:
        """Relative error of degree 3 for each size, over all sets and test losses."""
        sets = [self.generator.choice(UNITS, size, replace=False).tolist() for size in sizes for _ in range(SETS)]
        with tempfile.TemporaryDirectory() as directory:
            design = SketchCallback(directory, 1, 3, design="indicator", deletion_sets=sets, units=self.units)
            module = self.fit(cell, design)
            predictor = DeletionPredictor(Sketch.load(directory), module, self.losses)
            predicted = predictor.prepare(self.test).coefficients.real.sum(0).numpy()
        base = self.losses(module)
        true = torch.stack([self.losses(self.fit(cell, Reweight(self.units, s))) - base for s in sets])
        missed = (predicted - true.detach().numpy()).reshape(len(sizes), -1)
        changes = true.detach().numpy().reshape(len(sizes), -1)
        return (np.linalg.norm(missed, axis=1) / np.linalg.norm(changes, axis=1)).tolist()

    def metasmoothness(self, cell: Cell) -> float:
        """Agreement in sign of two consecutive half deletions, weighted by the first (arXiv 2503.13751)."""
        deleted = np.zeros(UNITS)
        deleted[self.generator.choice(UNITS, UNITS // 10, replace=False)] = 1
        f = [self.losses(self.fit(cell, Reweight(self.units, weights=list(h * deleted)))).detach() for h in (0, 0.5, 1)]
        first, second = f[1] - f[0], f[2] - f[1]
        return float((first.sign() * second.sign() * first.abs()).sum() / first.abs().sum())


def row(study: Study, cell: Cell) -> tuple[bool, bool]:
    """Print a cell; return whether the trusted size is right, and whether the growths agree in sign."""
    whole, windows = study.monitored(cell, None)[-1].profile, study.monitored(cell, 10)
    window = max(m.profile.growth for m in windows)
    kinks = cell[1] == "ReLU"
    trusted = 0 if kinks else whole.trusted_units()
    at, four = study.errors(cell, (max(1, trusted), min(4 * max(1, trusted), UNITS - 1)))
    right = (not trusted or at <= TOLERANCE) and (four > TOLERANCE or whole.growth <= 0)
    verdict = ("too careful" if not trusted and at <= TOLERANCE else "yes") if right else "no"
    agree = (window > 0) == (whole.growth > 0)
    print(
        f"| {' | '.join(cell)} | {whole.growth:+.2f} | {window:+.2f} | {trusted} | {at:.2g} | {four:.2g} | "
        f"{study.metasmoothness(cell):.3f} | {verdict} | {'yes' if agree else 'no'} |",
        flush=True,
    )
    return right, agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["MLP", "CNN", "transformer"])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two cells")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    study = Study(given.seed)
    cells = [(o, a, m) for m in given.models for o in OPTIMIZERS for a in ACTIVATIONS]
    if given.quick:
        cells = [("AdamW", "GELU", "MLP"), ("StableAdamW", "GELU", "MLP")]
    print(
        "| optimizer | activation | model | growth, bits per order | worst window | trusted units of 50 | error there |"
        " at four times | metasmoothness | right | windows agree |\n|" + "---|" * 11
    )
    verdicts = [row(study, cell) for cell in cells]
    right, agree = (sum(column) for column in zip(*verdicts, strict=True))
    print(f"\nRight in {right} of {len(cells)} cells; growth of windows of the same sign in {agree}.")


if __name__ == "__main__":
    main()
