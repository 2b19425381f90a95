"""Methods of unlearning on digits, beside retraining, over seeds: what they keep, and how far from retraining they end.

Two deletions, 5 % of the examples at random and two fifths of a class (another class for every seed). First the utility
(mean of the accuracies on retained and on test images) that ascent leaves when the accuracy on the images to forget has
fallen to a level. Then the divergence of every method's predictions from those of the retrained model, with the rate of
each competitor chosen so that this very divergence is least.

PYTHONPATH=examples python examples/benchmarks/unlearning.py [--seeds 5]
"""

import argparse
import logging
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from digits import DigitClassifier, load_data, train
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from unlearn_digits import PARTS, RANDOM, make_units

from lightning_sketch import Reweight, Sketch, SketchCallback
from lightning_sketch.metrics import PredictionKL
from lightning_sketch.unlearning import IAU, IMU, CounterfactualDistillation, GradientAscent, SketchStep, Unlearner

LEVELS = (0.75, 0.5, 0.25)
EPOCHS = 60
ASCENTS: dict[str, Callable[[int], Unlearner]] = {
    "ascent of the head, uniform": lambda epochs: GradientAscent(lr=1e-3, epochs=epochs, trainable="head"),
    "IMU, weights shuffled": lambda epochs: IMU(lr=1e-3, epochs=epochs, weights="shuffle"),
    "IMU": lambda epochs: IMU(lr=1e-3, epochs=epochs),
    "IMU, weights for each batch": lambda epochs: IMU(lr=1e-3, epochs=epochs, recompute="batch"),
    "ascent of all parameters": lambda epochs: GradientAscent(lr=1e-3, epochs=epochs),
}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
COMPETITORS: dict[str, Callable[[float], Unlearner]] = {
    "ascent of all parameters": lambda lr: GradientAscent(lr=lr, epochs=3),
    "ascent of the head": lambda lr: GradientAscent(lr=lr, epochs=3, trainable="head"),
    "IMU": lambda lr: IMU(lr=lr, epochs=3),
    "IAU": lambda lr: IAU(lr=lr),
}
Results = dict[tuple[str, ...], list[float]]


@torch.no_grad()
def accuracy(model: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).double().mean())


@torch.no_grad()
def divergence(model: DigitClassifier, reference: DigitClassifier, images: Tensor) -> float:
    """Return the mean KL divergence from the reference's predictions, in nats."""
    return float(PredictionKL()(model(images), reference(images)))


def digits_of(seed: int) -> tuple[TensorDataset, np.ndarray, dict[str, list[int]]]:
    """Return the data in an order of the seed, the unit of each example, and the units of each deletion."""
    dataset, _, _ = load_data()
    dataset = TensorDataset(*dataset[np.random.default_rng(seed).permutation(len(dataset))])
    first = RANDOM + seed % 10 * PARTS
    deletions = {"5 % at random": list(range(RANDOM)), "two fifths of a class": [first, first + 1]}
    return dataset, make_units(dataset.tensors[1]), deletions


def utilities(
    ascent: Callable[[int], Unlearner],
    original: DigitClassifier,
    forget: tuple[Tensor, Tensor],
    kept: tuple[tuple[Tensor, Tensor], ...],
) -> np.ndarray:
    """Return the mean accuracy on the sets ``kept`` where that on ``forget`` has fallen to each of ``LEVELS``."""
    loader = DataLoader(TensorDataset(*forget), batch_size=8)
    path = []
    for epochs in range(EPOCHS + 1):
        model = ascent(epochs).unlearn(original, loader, progress=False).module if epochs else original
        path.append((-accuracy(model, *forget), np.mean([accuracy(model, *data) for data in kept])))
        if -path[-1][0] < LEVELS[-1]:
            break
    forgotten, utility = np.array(path).T
    return np.interp(np.negative(LEVELS), np.maximum.accumulate(forgotten), utility)


def main() -> None:
    """Train, unlearn and retrain for every seed, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    test = load_data()[2]
    left: Results = defaultdict(list)
    distances: Results = defaultdict(list)
    for seed in range(1, parser.parse_args().seeds + 1):
        dataset, units, deletions = digits_of(seed)
        with tempfile.TemporaryDirectory() as dirpath:
            original = train(dataset, SketchCallback(dirpath, design="basis+common", degree=3, units=units), seed=seed)
            sketch = Sketch.load(dirpath)
            for case, delete in deletions.items():
                gone = np.isin(units, delete)
                forget, retain = dataset[gone], dataset[~gone]
                for name, ascent in ASCENTS.items():
                    for level, value in zip(LEVELS, utilities(ascent, original, forget, (retain, test)), strict=True):
                        left[case, name, f"{level:.0%}"].append(100 * float(value))

                retrained = train(dataset, Reweight(units=units, delete=delete), seed=seed)
                methods: dict[str, list[Unlearner]] = {
                    f"{name}, best rate": [method(lr) for lr in RATES] for name, method in COMPETITORS.items()
                }
                methods["SketchStep"] = [SketchStep(sketch, delete)]
                methods["CounterfactualDistillation"] = [CounterfactualDistillation(sketch, delete)]
                loaders = DataLoader(TensorDataset(*forget), 8), DataLoader(TensorDataset(*retain), 256)
                models = {"unchanged": [original]} | {
                    name: [m.unlearn(original, *loaders, progress=False).module for m in tried]
                    for name, tried in methods.items()
                }
                for name, tried in models.items():
                    for where, (images, _) in {"forget": forget, "test": test}.items():
                        least = min(divergence(model, retrained, images) for model in tried)
                        distances[case, name, where].append(1000 * least)
    print("Utility, % (mean and standard deviation over seeds), when the accuracy on the images to forget is at")
    show(left)
    print("\nKL divergence from the retrained model, in 1e-3 nats (mean and standard deviation over seeds), on")
    show(distances)
    closer = []
    for (case, name, where), values in distances.items():
        if name.endswith("best rate"):
            closer += np.less(distances[case, "CounterfactualDistillation", where], values).tolist()
    print(f"\nDistillation is closer than ascent, IMU or IAU in {sum(closer)} of {len(closer)} comparisons.")


def show(results: Results) -> None:
    """Print a table of one row per deletion and method."""
    columns = list(dict.fromkeys(key[2] for key in results))
    print(f"| deletion | method | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for case, name in dict.fromkeys(key[:2] for key in results):
        cells = [np.array(results[case, name, column]) for column in columns]
        print(f"| {case} | {name} | {' | '.join(f'{c.mean():.3g} ± {c.std(ddof=1):.2g}' for c in cells)} |")


if __name__ == "__main__":
    main()
