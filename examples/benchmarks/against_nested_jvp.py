"""(b) One gradient on jets against nested ``torch.func.jvp`` under ``vmap``, where that is right (no normalisation).

The baseline differentiates ``z -> grad L(theta_0 + theta_1 z + ... + theta_R z^R)`` R times at ``z = 0``. It has no
complex directions: a complex one of degree R takes R + 1 real ones (the coefficients of a binary form).

    python examples/benchmarks/against_nested_jvp.py [--degree 3] [--directions 8]
"""

import argparse
import math

import torch
from cost_per_direction import seconds
from models import Case, gpt, mlp
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sketch.jets import JetTensor


def nested(case: Case, params: dict[str, torch.Tensor], coefficients: dict[str, torch.Tensor], degree: int):
    """Derivatives of order ``degree`` of the gradient along every curve; ``coefficients`` are ``(K, R, *S)``."""

    def one(curve: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def gradient(z: torch.Tensor) -> dict[str, torch.Tensor]:
            moved = {n: p + sum(c * z ** (r + 1) for r, c in enumerate(curve[n])) for n, p in params.items()}
            return grad(case.loss)(moved)

        function = gradient
        for _ in range(degree):
            function = (lambda f: lambda z: jvp(f, (z,), (torch.ones_like(z),))[1])(function)
        return function(torch.zeros(()))

    with sdpa_kernel(SDPBackend.MATH):
        return vmap(one)(coefficients)


def check(case: Case, degree: int) -> float:
    """Largest relative difference between the two at the top order, in float64."""
    model = case.model.double()
    inputs = case.inputs.double() if case.inputs.is_floating_point() else case.inputs
    double = Case(case.name, model, inputs, case.targets)
    params = {n: p.detach() for n, p in model.named_parameters()}
    curves = {n: 1e-1 * torch.randn(2, degree, *p.shape, dtype=p.dtype) for n, p in params.items()}
    theirs = nested(double, params, curves, degree)
    blocks = {n: c.transpose(0, 1).unsqueeze(1).contiguous() for n, c in curves.items()}
    jets = {n: JetTensor(p, blocks[n], requires_grad=True) for n, p in params.items()}
    with sdpa_kernel(SDPBackend.MATH):
        ours = torch.autograd.grad(double.loss(jets), list(jets.values()))
    worst = 0.0
    for name, g in zip(params, ours, strict=True):
        top = g.coefficients[-1, 0] * math.factorial(degree)
        worst = max(worst, float((top - theirs[name]).norm() / theirs[name].norm()))
    case.model.float()
    return worst


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--degree", type=int, default=3)
    parser.add_argument("--directions", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| model | directions | nested jvp / jets | difference (float64) |\n|---|---|---|---|")
    for case in (mlp(), gpt(norm=False)):
        difference = check(case, given.degree)
        params = {n: p.detach() for n, p in case.model.named_parameters()}
        curves = {n: 1e-3 * torch.randn(given.directions, given.degree, *p.shape) for n, p in params.items()}
        baseline = seconds(lambda: nested(case, params, curves, given.degree) and None, given.repeats)  # noqa: B023
        for real in (True, False):
            jets = seconds(case.jets(given.degree, given.directions, real), given.repeats)
            ratio = baseline * (1 if real else given.degree + 1) / jets
            kind = "real" if real else "complex"
            print(f"| {case.name} | {given.directions} {kind} | {ratio:.1f} | {difference:.0e} |", flush=True)


if __name__ == "__main__":
    main()
