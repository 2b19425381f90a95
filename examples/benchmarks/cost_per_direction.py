"""(a) Cost of one direction in units of one plain gradient, against the operation count.

A product of the primal with a coefficient is one real product, of two coefficients one (real directions) or four
(complex ones), so a direction of degree R costs at least ``2R + R(R-1)/2`` real or ``4R + 2R(R-1)`` complex.

Directions are carried in passes, as many at a time as `SketchCallback` chooses.

    python examples/benchmarks/cost_per_direction.py [--cases gpt] [--degrees 1 2] [--directions 8] [--real]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from models import CASES


def seconds(run: Callable[[], None], repeats: int) -> float:
    """Median CPU time of a run, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--degrees", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--directions", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--real", action="store_true", help="real directions instead of complex ones")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| model | degree | directions | plain gradients per direction | limit | ratio |\n|---|---|---|---|---|---|")
    for name in given.cases:
        case = CASES[name]()
        plain = case.plain()
        for degree in given.degrees:
            limit = 2 * degree + degree * (degree - 1) / 2 if given.real else 4 * degree + 2 * degree * (degree - 1)
            for directions in given.directions:
                jets = seconds(case.in_passes(degree, directions, given.real), given.repeats)
                cost = jets / seconds(plain, 5 * given.repeats) / directions
                kind = "real" if given.real else "complex"
                row = f"| {case.name} | {degree} | {directions} {kind} | {cost:.1f} | {limit:g} | {cost / limit:.2f} |"
                print(row, flush=True)


if __name__ == "__main__":
    main()
