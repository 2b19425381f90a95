"""Time of a deletion query once an output is prepared: 1,000 deletions of 100 outputs, 101 real directions, degree 3.

python examples/benchmarks/deletion_queries.py
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from lightning_sketch.directions import make_directions
from lightning_sketch.prediction import Effect

UNITS, OUTPUTS, DEGREE, DELETIONS = 50, 100, 3, 1000


def seconds(run: Callable[[Effect], object]) -> float:
    """Best of five, each with an effect of its own: what is factorised on first use is counted."""
    directions = make_directions(1, "basis+common", UNITS).array
    shape = (DEGREE, len(directions), OUTPUTS)
    times = []
    for seed in range(5):
        coefficients = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        effect = Effect(torch.zeros(OUTPUTS, dtype=torch.float64), coefficients + 0j, directions, np.arange(UNITS))
        start = time.perf_counter()
        run(effect)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the table."""
    generator = np.random.default_rng(0)
    sets = [generator.choice(UNITS, generator.integers(1, 13), replace=False).tolist() for _ in range(DELETIONS)]
    one = seconds(lambda effect: effect.delete(sets[0]))
    print("| 1,000 deletions by | seconds | the first deletion (with the factors) = 1 |\n|---|---|---|")
    for name, run in {
        "`delete_many`": lambda effect: effect.delete_many(sets),
        "`delete`, one by one": lambda effect: [effect.delete(units) for units in sets],
    }.items():
        taken = seconds(run)
        print(f"| {name} | {taken:.3f} | {taken / one:.1f} |")


if __name__ == "__main__":
    main()
