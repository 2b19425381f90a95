"""All leave-one-out predictions by the dual against the primal solver, and what deletions cost one by one.

A logistic regression with 300 examples, and as many features as there are parameters; Newton steps, float64. Both times
are of everything from the trained module to the predictions: Jacobian, factor, solves.

python examples/benchmarks/dual_influence.py
"""

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_sketch.influence import KernelInfluence

EXAMPLES, TEST_POINTS, RIDGE = 300, 50, 1.0
PARAMETERS = (1000, 2000, 4000, 8000)
SET_SIZE, SETS = 10, 20
T = TypeVar("T")


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Return what ``run`` returns, and the processor's seconds it took."""
    start = time.process_time()
    return run(), time.process_time() - start


def trained(parameters: int) -> tuple[nn.Module, tuple[Tensor, Tensor], Tensor]:
    """Return a trained module, its data and test points."""
    torch.manual_seed(0)
    x = torch.randn(EXAMPLES + TEST_POINTS, parameters, dtype=torch.float64) / parameters**0.5
    y = (10 * x @ torch.randn(parameters, dtype=torch.float64) / parameters**0.5 > 0).double()
    train_x, train_y = x[:EXAMPLES], y[:EXAMPLES]
    kernel, dual = train_x @ train_x.T, torch.zeros(EXAMPLES, dtype=torch.float64)
    for _ in range(30):  # Newton's method in the dual coefficients
        p = (kernel @ dual).sigmoid()
        left = RIDGE * torch.eye(EXAMPLES, dtype=torch.float64) + (p * (1 - p))[:, None] * kernel
        dual -= torch.linalg.solve(left, p - train_y + RIDGE * dual)
    module = nn.Linear(parameters, 1, bias=False, dtype=torch.float64)
    module.weight.data = (train_x.T @ dual)[None]
    return module, (train_x, train_y), x[EXAMPLES:]


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    module, data, test = trained(100)
    KernelInfluence.from_module(module, data, loss="logistic", ridge=RIDGE).prepare(test).leave_one_out()  # warm up
    print("| parameters | primal / dual, all leave-one-out | greatest difference / change | groups: primal / dual |")
    print("|---|---|---|---|")
    for parameters in PARAMETERS:
        module, data, test = trained(parameters)
        sets = [torch.randperm(EXAMPLES)[:SET_SIZE].tolist() for _ in range(SETS)]
        alone, seconds, seconds_of_sets = {}, {}, {}
        for solver in ("dual", "primal"):

            def prepared(solver=solver, module=module, data=data, test=test):
                influence = KernelInfluence.from_module(module, data, loss="logistic", ridge=RIDGE, solver=solver)
                return influence.prepare(test)

            alone[solver], seconds[solver] = timed(lambda p=prepared: p().leave_one_out().change)
            effect = prepared()
            effect.delete(sets[0])  # makes the factor
            _, seconds_of_sets[solver] = timed(lambda e=effect, s=sets: e.delete_many(s))
        error = (alone["dual"] - alone["primal"]).abs().max() / alone["primal"].abs().max()
        print(
            f"| {parameters:,} | {seconds['primal'] / seconds['dual']:.1f} | {float(error):.0e} | "
            f"{seconds_of_sets['primal'] / seconds_of_sets['dual']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
