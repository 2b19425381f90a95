"""What would a digit classifier do without some of its data sources?

One training run with ``SketchCallback`` answers for any set of sources; each answer is compared with retraining.

    python examples/digits.py [--out DIR]

Takes about half a minute on two cores. Writes the sketch and a figure to DIR (``digits_output`` by default).
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import DeletionPredictor, Reweight, Sketch, SketchCallback, StableAdamW
from lightning_sketch.plotting import plot_predicted_against_retrained

matplotlib.use("Agg")

SOURCES = 50
EPOCHS = 6
BATCH = 48
TRAIN = 1437  # the other 360 images are the test set
WITHDRAWN = {"7": [7], "7, 31": [7, 31], "2, 7, 18, 31, 44": [2, 7, 18, 31, 44]}


class DigitClassifier(pl.LightningModule):
    """A network of one hidden layer; nothing in it knows of the sketch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = StableAdamW(self.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0)
        steps = self.trainer.estimated_stepping_batches
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def load_data() -> tuple[TensorDataset, np.ndarray, tuple[Tensor, Tensor]]:
    """Return the training set, the source of each of its images, and the test batch."""
    digits = load_digits()
    generator = np.random.default_rng(0)
    order = generator.permutation(len(digits.target))
    images = torch.as_tensor(digits.data[order] / 16)
    labels = torch.as_tensor(digits.target[order])
    sources = generator.integers(0, SOURCES, TRAIN)
    return TensorDataset(images[:TRAIN], labels[:TRAIN]), sources, (images[TRAIN:], labels[TRAIN:])


def train(dataset: TensorDataset, callback: pl.Callback, progress: bool = False, seed: int = 0) -> DigitClassifier:
    """Train from the same seed, with one callback more."""
    pl.seed_everything(seed, verbose=False)
    model = DigitClassifier()
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        precision="64-true",
        accelerator="cpu",
        callbacks=[callback],
        enable_progress_bar=progress,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    return model


def test_losses(model: DigitClassifier, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of every test image."""
    with torch.no_grad():
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def main() -> None:
    """Train once with the sketch, predict three deletions, retrain for each, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("digits_output"), help="where sketch and figure go")
    out = parser.parse_args().out
    warnings.filterwarnings("ignore", module=r"lightning\.")
    console = Console()
    dataset, sources, test_batch = load_data()

    console.print("[bold]1. One training run, with the sketch carried along[/bold]")
    started = time.perf_counter()
    sketch_dir = out / "sketch"
    model = train(dataset, SketchCallback(sketch_dir, design="basis+common", degree=3, units=sources), progress=True)
    sketch_seconds = time.perf_counter() - started

    console.print("\n[bold]2. Predict deletions from the sketch alone[/bold]")
    sketch = Sketch.load(sketch_dir)
    console.print(f"  {sketch!r}", highlight=False, soft_wrap=True)
    started = time.perf_counter()
    effect = DeletionPredictor(sketch, DigitClassifier()).prepare(test_batch)
    prepare_seconds = time.perf_counter() - started
    predictions, query_seconds = {}, []
    for name, units in WITHDRAWN.items():
        started = time.perf_counter()
        predictions[name] = effect.delete(units=units)
        query_seconds.append(time.perf_counter() - started)
    first, *later = (1000 * seconds for seconds in query_seconds)
    console.print(
        f"  {prepare_seconds:.2f} s to prepare 360 test images, {first:.0f} ms for the first deletion, "
        f"{max(later):.1f} ms for another",
        soft_wrap=True,
    )

    console.print("\n[bold]3. Retrain without them, to compare[/bold]")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the Trainer has said it all once
    baseline = test_losses(model, test_batch)
    retrained = {}
    started = time.perf_counter()
    for name, units in WITHDRAWN.items():
        console.print(f"  retraining without sources {name} ...")
        retrained[name] = test_losses(train(dataset, Reweight(units=sources, delete=units)), test_batch) - baseline
    retrain_seconds = (time.perf_counter() - started) / len(WITHDRAWN)

    table = Table(title="\nTest loss (nats) when sources are deleted")
    for heading in ("deleted sources", "test image", "before", "predicted change", "retrained"):
        justify = "left" if heading in ("deleted sources", "test image") else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    summary = []
    for name, p in predictions.items():
        true = retrained[name]
        # The mean of correlated errors is at most the mean error.
        deviation = torch.hypot(p.stderr, p.truncation)
        rows = [("mean of all 360", baseline.mean(), p.change.mean(), deviation.mean(), true.mean())]
        for i in true.abs().topk(3).indices.tolist():
            kind = f"{i} (a {int(test_batch[1][i])})"
            rows.append((kind, baseline[i], p.change[i], deviation[i], true[i]))
        for position, (kind, before, change, error, truth) in enumerate(rows):
            last = position == len(rows) - 1
            cells = (f"{before:.4f}", f"{change:+.4f} ± {error:.4f}", f"{truth:+.4f}")
            table.add_row(name if position == 0 else "", kind, *cells, end_section=last)
        error = (p.change - true).norm() / true.norm()
        first_order = (p.by_degree[0] - baseline - true).norm() / true.norm()
        errors = f"relative error {100 * error:.2f} % (first order alone: {100 * first_order:.1f} %)"
        summary.append(f"  without {name}: {errors}")
    console.print(table)
    console.print("± is one standard error, the orders left out included. Over all 360 test images:")
    console.print("\n".join(summary), highlight=False)

    figure, panels = plt.subplots(1, len(WITHDRAWN), figsize=(12, 4), layout="constrained")
    for panel, (name, p) in zip(panels, predictions.items(), strict=True):
        plot_predicted_against_retrained(p.change, retrained[name], p.stderr, ax=panel, label="degree 3")
        first_order = p.by_degree[0] - baseline
        plot_predicted_against_retrained(first_order, retrained[name], ax=panel, label="first order alone")
        panel.set_title(f"deleted: {name}")
        panel.set_xlabel("change of test loss after retraining (nats)")
        panel.set_ylabel("predicted change (nats)")
    figure.savefig(out / "predicted_against_retrained.png", dpi=100)

    crossover = (sketch_seconds + prepare_seconds + query_seconds[0]) / retrain_seconds
    console.print(
        f"\nThe sketched run took {sketch_seconds:.1f} s, a retraining {retrain_seconds:.2f} s: for a model this small "
        f"the sketch overtakes retraining after about {crossover:.0f} questions.\n"
        f"Figure: {out / 'predicted_against_retrained.png'}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
