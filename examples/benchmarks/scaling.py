"""CPU time of a tracked step against the number of directions, the degree and the number of units.

The laws: affine in the directions K, as ``4R + 2R(R-1)`` in the degree R, blind to the number of units n (of which a
step indexes those in its batch). Everything that the callback does in a step is counted, the plain step is subtracted.

    python examples/benchmarks/scaling.py [--case mlp] [--directions 8 128] [--degrees 1 8] [--units 100 1000000]
"""

import argparse
import logging
import tempfile
import warnings

import lightning.pytorch as pl
import torch
from microgpt_steps import StepTimes
from models import CASES, train

from lightning_sketch import SketchCallback


def step_seconds(name: str, steps: int, degree: int, directions: int, units: int) -> float:
    """Shortest CPU time from the end of a batch to the end of the next; untracked if there are no directions."""
    pl.seed_everything(0, verbose=False)
    case = CASES[name]()
    examples = torch.arange(steps * len(case.inputs))
    rows = examples % len(case.inputs)
    clock = StepTimes()
    callbacks: list[pl.Callback] = [clock]
    with tempfile.TemporaryDirectory() as dirpath:
        if directions:
            along = torch.randn(directions, units, dtype=torch.complex128).numpy() / units**0.5
            of_example = (examples * 7919 % units).tolist()
            of_example[-1] = units - 1
            callbacks.insert(0, SketchCallback(dirpath, along, degree, units=of_example))
        train(case, rows, callbacks)
    return float(torch.tensor(clock.times).diff()[1:].min())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="mlp", choices=list(CASES))
    parser.add_argument("--directions", nargs="+", type=int, default=[8, 16, 32, 64, 128])
    parser.add_argument("--degrees", nargs="+", type=int, default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--units", nargs="+", type=int, default=[100, 10_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2, help="every point is measured so often, the shortest counts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    first, fewest = given.directions[0], given.units[0]
    grids = {
        "directions": [((2, k, fewest), k) for k in given.directions],
        "degree": [((r, first, fewest), r * (r + 1)) for r in given.degrees],
        "units": [((2, first, n), 1) for n in given.units],
    }
    points = [(1, 0, 0), *dict.fromkeys(point for grid in grids.values() for point, _ in grid)]
    taken = dict.fromkeys(points, float("inf"))
    for _ in range(given.rounds):
        for point in points:
            taken[point] = min(taken[point], step_seconds(given.case, given.steps if point[1] else 30, *point))
    plain = taken.pop(points[0])
    print(f"{given.case}, degree 2, {first} complex directions, {fewest} units unless said.\n")
    print("| what grows | to | plain steps per step | time, the smallest = 1 | law |\n|---|---|---|---|---|")
    for column, (what, grid) in zip((1, 0, 2), grids.items(), strict=True):
        smallest, law_of_smallest = taken[grid[0][0]] - plain, grid[0][1]
        for point, law in grid:
            more = taken[point] - plain
            row = f"{more / plain:.0f} | {more / smallest:.2f} | {law / law_of_smallest:g}"
            print(f"| {what} | {point[column]:,} | {row} |")


if __name__ == "__main__":
    main()
