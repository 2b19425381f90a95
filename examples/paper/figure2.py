"""Figure 2: true loss along the deletion of the names with an ``x``, and its Taylor series of degrees 1 to 6.

    python examples/paper/figure2.py [--names FILE] [--quick] [--out DIR]

One direction, the deletion itself, so the series is exact and all error is that of the orders left out.
"""

import matplotlib

matplotlib.use("Agg")
import numpy as np
from experiment import FRACTIONS, Clock, parse

DEGREE = 6


def main() -> None:
    """Train with the sketch, retrain along the ray, print both and draw them."""
    run = parse(__doc__, "figure2")
    clock = Clock()
    sketch = run.sketch(run.deleted[None], DEGREE)
    effect = run.effect(sketch)
    print(f"sketch of 1 direction, degree {DEGREE}: {clock}")
    clock_of_retraining = Clock()
    true = run.retrain()
    print(f"{len(FRACTIONS)} retrainings: {clock_of_retraining}")

    series = effect.delete_many(np.outer(FRACTIONS, run.deleted)).by_degree.numpy()  # (degree, fractions)
    degrees = range(1, DEGREE + 1)
    print(f"| s | true loss, nats | {' | '.join(f'degree {r}' for r in degrees)} |\n|{'---|' * (DEGREE + 2)}")
    for s, loss, row in zip(FRACTIONS, true, series.T, strict=True):
        print(f"| {s:.1f} | {loss:.4f} | {' | '.join(f'{value:.4f}' for value in row)} |")
    change = true[-1] - true[0]
    print(f"change at s = 1: {change:+.4f} nats\n| degree | error at s = 1, % of the true change |\n|---|---|")
    for r in degrees:
        print(f"| {r} | {100 * abs(series[r - 1, -1] - true[-1]) / abs(change):.2f} |")

    figure, ax = effect.plot_ray(np.flatnonzero(run.deleted).tolist(), truth=(FRACTIONS, true))
    ax.set_xlabel("deletion $s$ of the names with an x")
    ax.set_ylabel("loss on max (nats)")
    figure.savefig(run.out / "figure2.png", dpi=100)
    print(f"all: {clock}\nFigure: {run.out / 'figure2.png'}")


if __name__ == "__main__":
    main()
