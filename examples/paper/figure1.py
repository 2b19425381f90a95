"""Figure 1: norms of the derivatives of training to degree 100, measured along 12 random directions.

    python examples/paper/figure1.py [--names FILE] [--quick] [--out DIR]

``log2 ||F_r||`` against ``r``, ``||F_r||^2 = C(n+r-1, r) E|c_r|^2``: training is stable in the sense of the paper where
it grows at most linearly.
"""

import math

import matplotlib

matplotlib.use("Agg")
import numpy as np
from experiment import Clock, parse

from lightning_sketch.plotting import plot_stability_profile
from lightning_sketch.prediction.stability import stability_profile


def main() -> None:
    """Train with the sketch, print the profile and draw it."""
    run = parse(__doc__, "figure1")
    directions, degree = (4, 20) if run.quick else (12, 100)
    clock = Clock()
    sketch = run.sketch(directions, degree)
    effect = run.effect(sketch)
    print(f"sketch of {directions} directions, degree {degree}: {clock}")
    coefficients = effect.coefficients.numpy()
    profile = stability_profile(coefficients, sketch.directions)

    n, orders = sketch.num_units, np.arange(1, degree + 1)
    binomials = np.array([math.log2(math.comb(n + r - 1, r)) / 2 for r in orders.tolist()])
    each = np.log2(np.abs(coefficients)) + binomials[:, None]  # (R, K)
    print(f"all finite: {bool(np.isfinite(each).all())}; spread over directions {profile.spread:.2f} bits")
    print("| order | log2 norm | lowest direction | highest direction |\n|---|---|---|---|")
    for r in sorted({1, 2, 3, 5, *range(10, degree + 1, 10)}):
        norm, row = profile.log2_norms[r - 1], each[r - 1]
        print(f"| {r} | {norm:.2f} | {row.min():.2f} | {row.max():.2f} |")
    print("| orders | growth, bits per order |\n|---|---|")
    for part in np.array_split(orders, 4):
        slope = np.polyfit(part, profile.log2_norms[part - 1], 1)[0]
        print(f"| {part[0]} to {part[-1]} | {slope:.3f} |")

    figure, ax = plot_stability_profile(profile)
    ax.plot(orders, each, color="0.6", linewidth=0.5, zorder=1)
    figure.savefig(run.out / "figure1.png", dpi=100)
    print(f"all: {clock}\nFigure: {run.out / 'figure1.png'}")


if __name__ == "__main__":
    main()
