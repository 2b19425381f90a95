"""Figure 3: the loss predicted from random directions along the deletion of the names with an ``x``.

    python examples/paper/figure3.py [--names FILE] [--quick] [--out DIR]

500 directions of degree 3 that know nothing of the deletion. The paper's estimator, the mean over directions, and the
kernel estimator read the same sketch.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from experiment import FRACTIONS, Clock, parse

DEGREE = 3
ESTIMATORS = ("mean", "kernel")


def main() -> None:
    """Train with the sketch, retrain along the ray, print and draw what both estimators predict."""
    run = parse(__doc__, "figure3")
    directions = 50 if run.quick else 500
    clock = Clock()
    sketch = run.sketch(directions, DEGREE)
    effect = run.effect(sketch)
    print(f"sketch of {directions} directions, degree {DEGREE}: {clock}")
    clock_of_retraining = Clock()
    true = run.retrain()
    print(f"{len(FRACTIONS)} retrainings: {clock_of_retraining}")

    change = true[-1] - true[0]
    print(f"change at s = 1: {change:+.4f} nats, from {true[0]:.4f} to {true[-1]:.4f}")
    print("| estimator | degree | predicted change | standard error | truncation | error, % of the true change |")
    print("|---|---|---|---|---|---|")
    for estimator in ESTIMATORS:
        for degree in range(1, DEGREE + 1):
            p = effect.delete(weights=run.deleted, estimator=estimator, degree=degree)
            cells = (p.change, p.stderr, p.truncation, 100 * abs(p.change - change) / abs(change))
            row = "{:+.4f} | {:.4f} | {:.4f} | {:.1f}".format(*map(float, cells))
            print(f"| {estimator} | {degree} | {row} |")

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for ax, estimator in zip(panels, ESTIMATORS, strict=True):
        deleted = np.flatnonzero(run.deleted).tolist()
        effect.plot_ray(deleted, ax=ax, estimator=estimator, truth=(FRACTIONS, true))
        ax.set_title(f"{estimator} over {directions} directions")
        ax.set_xlabel("deletion $s$ of the names with an x")
        ax.set_ylabel("loss on max (nats)")
    figure.savefig(run.out / "figure3.png", dpi=100)
    print(f"all: {clock}\nFigure: {run.out / 'figure3.png'}")


if __name__ == "__main__":
    main()
