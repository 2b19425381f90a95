"""Single examples as units: error of predicted deletions against the number of directions, by design and estimator.

1,000 digits, a 64-32-10 tanh net, 30 epochs of batches of 50, float64; deletions of 1, 5, 20 and 100 random examples,
50 of each, all really retrained. Printed are the linear datamodeling score and the relative error of the changes of
200 losses, and how many of the true changes lie within the 90 % intervals.

    python examples/benchmarks/single_examples.py [--directions 16 64 128 256] [--degree 2] [--optimizer sgd]
        [--cases "gradient of a pilot" ..] [--quick]
"""

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
from studies import digits

from lightning_sketch import DeletionPredictor, GradientFeatures, Sketch, SketchCallback
from lightning_sketch.metrics import IntervalCoverage, LinearDatamodelingScore, RelativeChangeError

SIZES = (1, 5, 20, 100)
# Points of the pilot run where its gradients are recorded.
POINTS = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 7 / 32, 1 / 4, 5 / 16, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1)
PROJECTION = 8192
METAGRADIENT = "exact first order (metagradient)"
# name -> (design, whether its directions or its prior need the gradients of a pilot run, estimator)
CASES = {
    METAGRADIENT: ("basis", None, "kernel"),
    "sphere, mean": ("sphere", None, "mean"),
    "orthonormal, kernel": ("orthonormal", None, "kernel"),
    "orthonormal, gradient prior": ("orthonormal", "prior", "kernel"),
    "gradient at init, gradient prior": ("gradient", "prior", "kernel"),
    "gradient of a pilot": ("gradient", "design", "kernel"),
    "gradient of a pilot, and common": ("gradient+common", "design", "kernel"),
}


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
    study = digits(given.optimizer, 2 if given.quick else 30, 10 if given.quick else 50)
    print(f"{4 * len(study.sets[1])} retrainings, all at once: {time.perf_counter() - start:.0f} s.\n")
    scores: dict[str, list[tuple[int, list[float], list[float]]]] = {}
    print("| case | measurements | " + " | ".join(f"LDS {s} / error / coverage" for s in SIZES) + " | run |")
    print("|---|---|" + "---|" * (len(SIZES) + 1))
    with tempfile.TemporaryDirectory() as directory:
        pilot = Path(directory) / "pilot"
        study.fit(GradientFeatures(pilot, at=POINTS, projection=PROJECTION))
        for case in given.cases:
            design, gradients, estimator = CASES[case]
            for measurements in counts if case != METAGRADIENT else [len(study.train)]:
                complex_ = design in ("sphere", "orthonormal")
                start = time.perf_counter()
                dirpath = Path(directory) / f"{design}-{gradients == 'design'}-{measurements}"
                if not dirpath.exists():
                    features = pilot if gradients == "design" else None
                    count = measurements // 2 if complex_ or "common" in design else measurements
                    degree = 1 if case == METAGRADIENT else given.degree
                    module = study.fit(SketchCallback(dirpath, count, degree, design=design, features=features))
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
    metagradient = scores.pop(METAGRADIENT, [])
    for _, lds, error in metagradient:
        axes[0].axhline(lds[place], color="black", linestyle="--", label=METAGRADIENT)
        axes[1].axhline(error[place], color="black", linestyle="--")
    for (case, rows), marker in zip(scores.items(), markers, strict=False):
        counts = [row[0] for row in rows]
        axes[0].plot(counts, [row[1][place] for row in rows], marker=marker, label=case)
        axes[1].plot(counts, [row[2][place] for row in rows], marker=marker, label=case)
    axes[0].set(ylabel="linear datamodeling score", ylim=(None, 1))
    axes[1].set(ylabel="relative error of the predicted change", yscale="log")
    for ax in axes:
        ax.set(xlabel="real measurements (two per complex direction)", xscale="log")
        ticks = sorted({row[0] for rows in scores.values() for row in rows})
        ax.set_xticks(ticks, [str(count) for count in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle("Deleting 20 of 1,000 examples")
    figure.savefig(path, dpi=90)
    print(f"\nFigure: {path}")


if __name__ == "__main__":
    main()
