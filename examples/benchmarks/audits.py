"""Does the audit's verdict from a sketch agree with its verdict from real retraining?

40 cases on digits: four deletions, each with ten models that have forgotten too little, enough, too much, or at random.

PYTHONPATH=examples python examples/benchmarks/audits.py
"""

import argparse
import copy
import logging
import tempfile
import warnings
from collections import Counter

import numpy as np
import torch
from digits import load_data, train
from torch import nn
from torch.utils.data import DataLoader, Subset
from unlearn_digits import FORGOTTEN_CLASS, PARTS, RANDOM, make_units

from lightning_sketch import DeletionPredictor, Reweight, Sketch, SketchCallback
from lightning_sketch.unlearning import IAU, IMU, CounterfactualDistillation, GradientAscent, SketchStep, audit

FIRST = RANDOM + FORGOTTEN_CLASS * PARTS
DELETIONS = {
    "a fifth of a class": [FIRST],
    "two fifths of a class": [FIRST, FIRST + 1],
    "35 random examples": [0],
    "70 random examples": [0, 1],
}


def between(original: nn.Module, other: nn.Module, share: float) -> nn.Module:
    """Return the original, moved by a share of the way to another model."""
    moved = copy.deepcopy(original)
    with torch.no_grad():
        for p, q in zip(moved.parameters(), other.parameters(), strict=True):
            p.lerp_(q, share)
    return moved


def perturbed(original: nn.Module, other: nn.Module) -> nn.Module:
    """Return the original, moved in a random direction as far as another model is."""
    generator = torch.Generator().manual_seed(1)
    before, after = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (original, other))
    noise = torch.randn(before.shape, generator=generator, dtype=before.dtype)
    moved = copy.deepcopy(original)
    nn.utils.vector_to_parameters(before + noise * (after - before).norm() / noise.norm(), moved.parameters())
    return moved


def main() -> None:
    """Train once with the sketch, retrain for every deletion, audit every model against either reference."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    warnings.filterwarnings("ignore", module=r"lightning\.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dataset, _, test = load_data()
    units = make_units(dataset.tensors[1])
    agreed, verdicts = 0, Counter()
    with tempfile.TemporaryDirectory() as dirpath:
        original = train(dataset, SketchCallback(dirpath, design="basis+common", degree=3, units=units))
        sketch = Sketch.load(dirpath)
        predictor = DeletionPredictor(sketch, original, "logits")
        for deletion, delete in DELETIONS.items():
            gone = np.isin(units, delete)
            forget = DataLoader(Subset(dataset, np.flatnonzero(gone).tolist()), batch_size=8)
            kept = np.flatnonzero(~gone).tolist()
            retrained = train(dataset, Reweight(units=units, delete=delete))
            unlearners = {
                "ascent, lr 1e-3": GradientAscent(lr=1e-3, epochs=2),
                "ascent, over-forgotten": GradientAscent(lr=0.05, epochs=20),
                "IMU, lr 3e-3": IMU(lr=3e-3, epochs=5),
                "IAU, lr 1e-3": IAU(lr=1e-3),
                "IAU, lr 2e-3": IAU(lr=2e-3),
                "distillation": CounterfactualDistillation(sketch, delete),
            }
            retain = DataLoader(Subset(dataset, kept), batch_size=256)
            models = {name: u.unlearn(original, forget, retain).module for name, u in unlearners.items()}
            step = SketchStep(sketch, delete).unlearn(original, forget).module
            models |= {
                "unchanged": original,
                "0.4 of the sketch's step": between(original, step, 0.4),
                "1.4 of the sketch's step": between(original, step, 1.4),
                "random perturbation": perturbed(original, retrained),
            }
            sets = {"forget": forget, "retain": dataset[kept[:100]], "test": test}
            for name, module in models.items():
                true = audit(original, module, **sets, reference=retrained)
                predicted = audit(original, module, **sets, predictor=predictor, delete=delete)
                agreed += true.verdict == predicted.verdict
                verdicts[true.verdict] += 1
                print(f"| {deletion} | {name} | {true.verdict} | {predicted.verdict} |", flush=True)
    print(f"{agreed} of {sum(verdicts.values())} agree; by retraining: {dict(verdicts)}")


if __name__ == "__main__":
    main()
