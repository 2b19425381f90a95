"""(e) One gradient on jets of degree up to 100: cost against the operation count, and error of the coefficients.

The limit of complex directions is ``4R + 2R(R-1)`` plain gradients each. The error is that of the highest order of the
gradient along one direction, against a plain complex gradient at points ``z`` of a circle (Cauchy's formula), which
shares no code with the jets; the oracle's own error is the difference of two circles.

    python examples/benchmarks/high_degree.py [--quick] [--degrees 1 2 3 5 10 20 50 100] [--directions 4]
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import scipy.special
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sketch.jets import JetTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from microgpt import HEADS, MicroGPT, NamesDataset

Params = dict[str, Tensor]


@dataclass
class Problem:
    """Losses of the examples of one batch, for any torch arithmetic and once more for complex numbers.

    Attributes:
        name: for the table.
        params: at the expansion point, float64.
        losses: one per example, from the parameters.
        complex_losses: the same function of complex parameters.
        spread: standard deviation of the first-order coefficients; what follows halves with the order.
    """

    name: str
    params: Params
    losses: Callable[[Params], Tensor]
    complex_losses: Callable[[Params], Tensor]
    spread: float


def mlp() -> Problem:
    """64-128-128-10 with tanh, batch of 64."""
    sizes = [64, 128, 128, 10]
    params = {}
    for layer, (inside, outside) in enumerate(pairwise(sizes)):
        params[f"w{layer}"] = torch.randn(outside, inside) / inside**0.5
        params[f"b{layer}"] = 0.1 * torch.randn(outside)
    x, y = torch.randn(64, 64), torch.randint(0, 10, (64,))

    def losses(p: Params) -> Tensor:
        h = torch.tanh(F.linear(x.to(p["b0"].dtype), p["w0"], p["b0"]))
        h = torch.tanh(F.linear(h, p["w1"], p["b1"]))
        return F.cross_entropy(F.linear(h, p["w2"], p["b2"]), y, reduction="none")

    def complex_losses(p: Params) -> Tensor:
        h = torch.tanh(x.to(torch.complex128) @ p["w0"].T + p["b0"])
        h = torch.tanh(h @ p["w1"].T + p["b1"])
        return _complex_cross_entropy(h @ p["w2"].T + p["b2"], y)

    return Problem("MLP", params, losses, complex_losses, 0.02)


def names_transformer() -> Problem:
    """One name through the transformer of ``examples/paper/microgpt.py``."""
    model = MicroGPT()
    (tokens,) = NamesDataset(["alexandria"])
    inputs, targets = tokens[None, :-1], tokens[1:]

    def losses(p: Params) -> Tensor:
        logits = functional_call(model, p, (inputs,))
        return F.cross_entropy(logits.flatten(0, 1), targets).unsqueeze(0)

    def complex_losses(p: Params) -> Tensor:
        length = len(targets)
        x = _complex_rms_norm(p["wte.weight"][inputs[0]] + p["wpe.weight"][:length])
        h = _complex_rms_norm(x)
        q, k, v = (
            (h @ p[f"attn_w{name}.weight"].T).unflatten(-1, (HEADS, -1)).transpose(0, 1) for name in ("q", "k", "v")
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        attention = torch.exp(scores) * torch.ones(length, length).tril()
        mixed = (attention / attention.sum(-1, keepdim=True)) @ v
        x = x + mixed.transpose(0, 1).flatten(-2) @ p["attn_wo.weight"].T
        h = _ComplexGelu.apply(_complex_rms_norm(x) @ p["mlp_fc1.weight"].T)
        logits = (x + h @ p["mlp_fc2.weight"].T) @ p["lm_head.weight"].T
        return _complex_cross_entropy(logits, targets).mean(0, keepdim=True)

    return Problem(
        "names transformer", {n: p.detach() for n, p in model.named_parameters()}, losses, complex_losses, 0.02
    )


def _complex_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log(torch.exp(logits).sum(-1)) - logits[torch.arange(len(targets)), targets]


def _complex_rms_norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)


class _ComplexGelu(torch.autograd.Function):
    """``x Phi(x)`` by scipy's error function of complex numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        phi = torch.from_numpy(0.5 * (1 + scipy.special.erf(x.numpy() / math.sqrt(2))))
        ctx.save_for_backward(phi + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi))
        return x * phi

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].conj()


@dataclass
class Curves:
    """``params + sum_r coefficients_r z^r`` and weights ``1 + tilt z`` of the examples; exact in float32.

    Attributes:
        coefficients: ``(R, 2, K, *S)`` by name.
        tilt: ``(2, K, B)``.
    """

    coefficients: Params
    tilt: Tensor


def draw_curves(problem: Problem, degree: int, directions: int) -> Curves:
    """Random curves whose coefficients halve with the order."""
    falling = problem.spread * 0.5 ** torch.arange(degree)
    coefficients = {
        name: torch.randn(degree, 2, directions, *p.shape) * falling.reshape(-1, *[1] * (p.ndim + 2))
        for name, p in problem.params.items()
    }
    return Curves(coefficients, 0.1 * torch.randn(2, directions, len(problem.losses(problem.params))))


def gradient_on_jets(
    problem: Problem, curves: Curves, degree: int, directions: int, dtype: torch.dtype
) -> Callable[[], tuple[Tensor, ...]]:
    """Return one gradient on jets."""
    params = {}
    for name, p in problem.params.items():
        block = curves.coefficients[name][:degree, :, :directions].to(dtype)
        params[name] = JetTensor(p.to(dtype, copy=True), block.contiguous(), requires_grad=True)
    tilt = curves.tilt[:, :directions].to(dtype)
    weights = JetTensor(
        torch.ones(tilt.shape[-1], dtype=dtype),
        torch.cat([tilt[None], torch.zeros(degree - 1, *tilt.shape, dtype=dtype)]),
    )

    def gradient() -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.grad((problem.losses(params) * weights).mean(), list(params.values()))

    return gradient


def plain_gradient(problem: Problem, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """Return one plain gradient."""
    params = {name: p.to(dtype, copy=True).requires_grad_() for name, p in problem.params.items()}
    return lambda: torch.autograd.grad(problem.losses(params).mean(), list(params.values()))


def on_circle(problem: Problem, curves: Curves, orders: list[int], radius: float, points: int) -> dict[int, Tensor]:
    """Coefficients of the gradient along the first direction by Cauchy's formula, flat and complex, by order."""
    p0 = {name: p.to(torch.complex128) for name, p in problem.params.items()}
    along = {name: torch.complex(*c[:, :, 0].double().unbind(1)) for name, c in curves.coefficients.items()}
    tilt = torch.complex(*curves.tilt[:, 0].double())
    totals: dict[int, Any] = dict.fromkeys(orders, 0)
    for j in range(points):
        z = radius * torch.exp(torch.tensor(2j * math.pi * j / points, dtype=torch.complex128))
        powers = z ** torch.arange(1, len(next(iter(along.values()))) + 1)
        params = {name: (p + torch.tensordot(powers, along[name], 1)).requires_grad_() for name, p in p0.items()}
        loss = (problem.complex_losses(params) * (1 + tilt * z)).mean()
        # what torch calls the gradient of the real part is the conjugate of the derivative
        found = torch.cat([g.flatten() for g in torch.autograd.grad(loss.real, list(params.values()))]).conj()
        for order in orders:
            totals[order] = totals[order] + found * z ** (-order) / points
    return totals


def circles(problem: Problem, curves: Curves, tops: dict[int, Tensor], points: int) -> list[dict[int, Tensor]]:
    """Coefficients of the orders of ``tops`` from two circles inside the radius of convergence.

    The radius is a guess from the growth of ``tops``; a wrong one shows in the difference of the two circles.
    """
    *_, before, last = [1, *tops] if len(tops) == 1 else tops
    growth = float(tops[last].norm() / tops[before].norm()) ** (1 / max(last - before, 1))
    share = max(0.5, 1e-3 ** (1 / last))
    return [on_circle(problem, curves, list(tops), r / growth, points) for r in (share, 0.97 * share)]


def top_order(gradient: tuple[Any, ...]) -> Tensor:
    """The highest order along the first direction, flat and complex."""
    parts = torch.cat([g.coefficients[-1, :, 0].flatten(1) for g in gradient], 1).double()
    return torch.complex(parts[0], parts[1])


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Shortest CPU time of some runs, and what the last returned."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = run()
        times.append(time.process_time() - start)
    return min(times), result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--degrees", nargs="+", type=int, default=[1, 2, 3, 5, 10, 20, 50, 100])
    parser.add_argument("--directions", type=int, default=4)
    parser.add_argument("--points", type=int, default=1024, help="on the circle of the oracle")
    parser.add_argument("--seconds", type=float, default=300, help="a degree is the last if it took longer")
    parser.add_argument("--quick", action="store_true", help="degrees up to 10 and fewer points")
    given = parser.parse_args()
    degrees = [r for r in sorted(given.degrees) if r <= 10 or not given.quick]
    points = 256 if given.quick else given.points
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        "| model | dtype | degree | plain gradients per direction | limit | ratio | error of the top order | "
        "of the oracle |\n|---|---|---|---|---|---|---|---|"
    )
    for problem in (mlp(), names_transformer()):
        curves = draw_curves(problem, max(degrees), given.directions)
        oracle: list[dict[int, Tensor]] = []
        for dtype in (torch.float64, torch.float32):
            plain, _ = timed(plain_gradient(problem, dtype), 20)
            rows, tops = [], {}
            for degree in degrees:
                jets = gradient_on_jets(problem, curves, degree, given.directions, dtype)
                taken, found = timed(jets, 3 if degree <= 10 else 1)
                tops[degree] = top_order(found)
                rows.append((degree, taken / plain / given.directions, 2 * degree * (degree + 1)))
                if taken > given.seconds:
                    break
            if not oracle:
                oracle = circles(problem, curves, tops, points)
            for degree, cost, limit in rows:
                truth = oracle[0][degree]
                error, own = (float((x - truth).norm() / truth.norm()) for x in (tops[degree], oracle[1][degree]))
                print(
                    f"| {problem.name} | {str(dtype).removeprefix('torch.')} | {degree} | {cost:.1f} | {limit} | "
                    f"{cost / limit:.2f} | {error:.0e} | {own:.0e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
