"""Time of deletion queries once an output is prepared.

1,000 deletions of 100 outputs, 101 real directions, degree 3; and all single deletions of 1,000 units, 360 outputs.

python examples/benchmarks/deletion_queries.py
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from lightning_sketch.directions import make_directions
from lightning_sketch.prediction import Effect

UNITS, OUTPUTS, DEGREE, DELETIONS = 50, 100, 3, 1000
MANY_UNITS, MANY_OUTPUTS = 1000, 360
MANY_DESIGNS = {"orthonormal": 256, "basis": 1, "basis+common": 1}  # with how many random directions


def seconds(directions: np.ndarray, outputs: int, run: Callable[[Effect], object], prepared: bool = False) -> float:
    """Best of five, each with an effect of its own; factors made on first use are counted unless ``prepared``."""
    shape = (DEGREE, len(directions), outputs)
    times = []
    for seed in range(5):
        coefficients = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        effect = Effect(
            torch.zeros(outputs, dtype=torch.float64), coefficients + 0j, directions, np.arange(directions.shape[1])
        )
        if prepared:
            effect.delete([0])
        start = time.perf_counter()
        run(effect)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    directions = make_directions(1, "basis+common", UNITS).array
    generator = np.random.default_rng(0)
    sets = [generator.choice(UNITS, generator.integers(1, 13), replace=False).tolist() for _ in range(DELETIONS)]
    one = seconds(directions, OUTPUTS, lambda effect: effect.delete(sets[0]))
    print("| 1,000 deletions by | seconds | the first deletion (with the factors) = 1 |\n|---|---|---|")
    for name, run in {
        "`delete_many`": lambda effect: effect.delete_many(sets),
        "`delete`, one by one": lambda effect: [effect.delete(units) for units in sets],
    }.items():
        taken = seconds(directions, OUTPUTS, run)
        print(f"| {name} | {taken:.3f} | {taken / one:.1f} |")
    print("\n| design | directions | factors | `leave_one_out` | `rank(10)` | `most_influential(10)` |\n|" + 6 * "---|")
    for design, count in MANY_DESIGNS.items():
        directions = make_directions(count, design, MANY_UNITS).array
        factors = seconds(directions, MANY_OUTPUTS, lambda effect: effect.delete([0]))
        times = [
            seconds(directions, MANY_OUTPUTS, run, prepared=True)
            for run in (Effect.leave_one_out, Effect.rank, lambda effect: effect.most_influential(10))
        ]
        print(f"| `{design}` | {len(directions)} | {factors:.2f} | {' | '.join(f'{t:.2f}' for t in times)} |")


if __name__ == "__main__":
    main()
