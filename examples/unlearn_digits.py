"""Make a digit classifier forget: every method beside the others, beside retraining, and beside what a sketch predicts.

One training run with ``SketchCallback``. Then a part of one class is to be forgotten, and then random examples.

    python examples/unlearn_digits.py [--out DIR]

Takes about a minute on one core. Writes the sketch and a figure to DIR (``unlearn_digits_output`` by default).
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from digits import DigitClassifier, load_data, train
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_sketch import DeletionPredictor, Reweight, Sketch, SketchCallback
from lightning_sketch.influence import KernelInfluence
from lightning_sketch.unlearning import (
    IAU,
    IMU,
    AuditReport,
    CounterfactualDistillation,
    GradientAscent,
    KernelStep,
    SketchStep,
    Unlearner,
    audit,
)

PARTS = 5  # of every class
FORGOTTEN_CLASS = 3
RANDOM = 2  # units of random examples, each of 2.5 % of all


def make_units(labels: Tensor) -> np.ndarray:
    """Return the unit of each training example: first units of random examples, then five parts of every class."""
    units = np.full(len(labels), -1)
    size = len(labels) // 40
    units[: RANDOM * size] = np.arange(RANDOM * size) // size
    for digit in range(10):
        rows = np.flatnonzero((labels.numpy() == digit) & (units < 0))
        units[rows] = RANDOM + digit * PARTS + np.arange(len(rows)) % PARTS
    return units


def methods(
    sketch: Sketch, model: DigitClassifier, influence: KernelInfluence, delete: list[int], rows: list[int]
) -> list[Unlearner]:
    """Return every method, with its own defaults."""
    return [
        GradientAscent(),
        IMU(),
        IAU(),
        KernelStep(influence, rows),
        SketchStep(sketch, delete),
        CounterfactualDistillation(sketch, delete),
    ]


def draw(reports: dict[str, dict[str, tuple[AuditReport, AuditReport]]], path: Path) -> None:
    """Draw forget and test losses of every method, with what passes beside the retrained model."""
    figure, panels = plt.subplots(2, len(reports), figsize=(11, 6), sharey=True, sharex="row", layout="constrained")
    for column, (deletion, of_methods) in zip(panels.T, reports.items(), strict=True):
        for panel, name in zip(column, ("forget_loss", "test_loss"), strict=True):
            against_retrained, against_predicted = next(iter(of_methods.values()))
            retrained = against_retrained.values["reference"][name].value
            effect = against_retrained.values["reference"]["forget_loss"].value
            effect -= against_retrained.values["original"]["forget_loss"].value
            allowed = against_retrained.tolerance * effect
            panel.axvspan(retrained - allowed, retrained + allowed, color="0.9", label="passes beside retraining")
            panel.axvline(retrained, color="0.4", linewidth=1, label="retrained")
            predicted = against_predicted.values["reference"][name]
            panel.errorbar(
                predicted.value,
                len(of_methods),
                xerr=[[predicted.value - predicted.low], [predicted.high - predicted.value]],
                fmt="D",
                color="0.1",
                label="predicted by the sketch",
            )
            values = [pair[0].values["unlearned"][name].value for pair in of_methods.values()]
            panel.plot(values, range(len(values)), "o", color="0.1")
            panel.set_yticks(range(len(values) + 1), [*of_methods, "prediction"])
            panel.set_xlabel(f"{name.replace('_', ' ')} (nats)")
        column[0].set_title(f"forget {deletion}")
    panels[0, 0].legend(frameon=False)
    panels[0, 0].invert_yaxis()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Train once with the sketch, unlearn two sets by every method, retrain, audit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("unlearn_digits_output"), help="where sketch and figure go")
    out = parser.parse_args().out
    warnings.filterwarnings("ignore", module=r"lightning\.")
    console = Console(width=120)
    dataset, _, (images, labels) = load_data()
    units = make_units(dataset.tensors[1])
    held_out, test = (images[:180], labels[:180]), (images[180:], labels[180:])  # for stopping; for the audit

    console.print("[bold]1. One training run, with the sketch carried along[/bold]")
    started = time.perf_counter()
    callback = SketchCallback(out / "sketch", design="basis+common", degree=3, units=units)
    model = train(dataset, callback, progress=True)
    sketch = Sketch.load(out / "sketch")
    predictor = DeletionPredictor(sketch, model, "logits")
    console.print(f"  {time.perf_counter() - started:.1f} s: {sketch!r}", highlight=False, soft_wrap=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the Trainer has said it all once
    started = time.perf_counter()
    # Six epochs are no minimum: the ridge stands for stopping early, about n / (steps * effective learning rate).
    influence = KernelInfluence.from_module(model, dataset.tensors, loss="softmax", ridge=50.0)
    console.print(f"  {time.perf_counter() - started:.1f} s for the kernel of the trained model")

    console.print("\n[bold]2. Forget by every method, retrain, and audit against either reference[/bold]")
    first = RANDOM + FORGOTTEN_CLASS * PARTS
    deletions = {
        f"two fifths of the {FORGOTTEN_CLASS}s": [first, first + 1],
        "random examples": list(range(RANDOM)),
    }
    reports: dict[str, dict[str, tuple[AuditReport, AuditReport]]] = {}
    table = Table(title="Unlearned models beside retraining")
    table.add_column("method", no_wrap=True)
    for heading in ("forget loss", "test loss", "forget KL", "AUROC", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("by retraining", no_wrap=True)
    table.add_column("by the sketch", no_wrap=True)
    for deletion, delete in deletions.items():
        rows = np.flatnonzero(np.isin(units, delete)).tolist()
        kept = np.flatnonzero(~np.isin(units, delete)).tolist()
        forget, retain = DataLoader(Subset(dataset, rows), batch_size=8), DataLoader(Subset(dataset, kept), 256)
        started = time.perf_counter()
        retrained = train(dataset, Reweight(units=units, delete=delete))
        trials = {"(unchanged)": (model, 0.0), "(retrained)": (retrained, time.perf_counter() - started)}
        # Held out are images of the same classes, since other classes may be easier.
        alike = torch.isin(held_out[1], dataset.tensors[1][rows])
        same_classes = (held_out[0][alike], held_out[1][alike])
        for method in methods(sketch, model, influence, delete, rows):
            report = method.unlearn(model, forget, retain, held_out=same_classes, progress=False)
            trials[report.method] = report.module, report.seconds
        reports[deletion] = {}
        table.add_row(f"forget {deletion} ({len(rows)})")
        data = {"forget": forget, "retain": dataset[kept[:300]], "test": test}
        for name, (module, seconds) in trials.items():
            true = audit(model, module, **data, reference=retrained)
            predicted = audit(model, module, **data, predictor=predictor, delete=delete)
            reports[deletion][name] = true, predicted
            numbers = true.values["unlearned"]
            columns = ("forget_loss", "test_loss", "forget_kl", "auroc_loss")
            cells = [f"{numbers[column].value:.3g}" for column in columns]
            table.add_row(f"  {name}", *cells, f"{seconds:.2f}", true.verdict, predicted.verdict)
        table.add_section()
    console.print(table)
    pairs = [pair for of_methods in reports.values() for pair in of_methods.values()]
    agreeing = sum(true.verdict == predicted.verdict for true, predicted in pairs)
    draw(reports, out / "unlearned.png")
    console.print(
        "KL is from the retrained model, in nats; AUROC: of telling the examples to forget from test examples of the "
        "same classes by their loss.\n"
        "The last two columns are the audit's verdicts. GradientAscent and IMU take no step where the forget loss is "
        "already that of held-out images.\n"
        "For models this small, retraining is the better way.\n"
        f"The sketch's verdict is that of retraining in {agreeing} of {len(pairs)} cases.\n"
        f"Figure: {out / 'unlearned.png'}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
