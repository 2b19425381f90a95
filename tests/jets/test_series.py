"""Series arithmetic against the scalar reference jets, one number at a time, up to degree 8."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as shapes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import scalar_jet
from oracles.scalar_jet import ScalarJet

from lightning_sketch.jets import JetTensor

from .oracle import assert_right, make_curve

DEGREE = 8


def draw(*shape: int, parts: int = 2, directions: int = 2, degree: int = DEGREE, low: float = 0.4) -> JetTensor:
    """Positive primals, and coefficients small enough that no order dominates."""
    x = low + torch.rand(shape, dtype=torch.float64)
    return JetTensor(x, 0.4 * torch.randn(degree, parts, directions, *shape, dtype=torch.float64))


def scalars(x: JetTensor) -> list[ScalarJet]:
    """One scalar jet per direction and entry."""
    block = x.coefficients.flatten(3) if x.ndim else x.coefficients.unsqueeze(3)
    parts = block[:, 0] + 1j * (block[:, 1] if block.shape[1] == 2 else 0)
    return [
        ScalarJet([x.primal.flatten()[e].item(), *(complex(v) for v in parts[:, k, e])])
        for k in range(parts.shape[1])
        for e in range(parts.shape[2])
    ]


def assert_agrees(y: JetTensor, expected: list[ScalarJet]) -> None:
    for ours, theirs in zip(scalars(y), expected, strict=True):
        for a, b in zip(ours.c, theirs.c, strict=True):
            assert abs(a - b) <= 1e-11 * (1 + abs(b)) + 1e-11 * max(abs(c) for c in theirs.c)


CHAINS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "product": (lambda x, y: x * y * x, lambda x, y: x * y * x),
    "square": (lambda x, y: (x + y) * (x + y), lambda x, y: (x + y) * (x + y)),
    "square of one": (lambda x, y: x * x, lambda x, y: x * x),
    "quotient": (lambda x, y: x / (y + 1) - 1 / x, lambda x, y: x / (y + 1) - 1 / x),
    "power": (lambda x, y: x**2.5 + y**-1 + x**3, lambda x, y: x**2.5 + y**-1 + x**3),
    "exp log": (lambda x, y: (x.log() * y).exp(), lambda x, y: scalar_jet.exp(scalar_jet.log(x) * y)),
    "pow": (lambda x, y: x**y, lambda x, y: scalar_jet.exp(scalar_jet.log(x) * y)),
    "sqrt": (lambda x, y: (x * y + 1).sqrt(), lambda x, y: scalar_jet.sqrt(x * y + 1)),
    "rsqrt": (lambda x, y: (x + y).rsqrt(), lambda x, y: (x + y) ** -0.5),
    "sigmoid": (lambda x, y: torch.sigmoid(x - 3 * y), lambda x, y: scalar_jet.sigmoid(x - 3 * y)),
    "tanh": (lambda x, y: torch.tanh(x * y), lambda x, y: scalar_jet.tanh(x * y)),
    "erf": (lambda x, y: torch.erf(x - y), lambda x, y: scalar_jet.erf(x - y)),
    "gelu": (lambda x, y: torch.nn.functional.gelu(x - y), lambda x, y: scalar_jet.gelu(x - y)),
    "silu": (lambda x, y: torch.nn.functional.silu(x), lambda x, y: x * scalar_jet.sigmoid(x)),
    "softplus": (
        lambda x, y: torch.nn.functional.softplus(x),
        lambda x, y: scalar_jet.log(1 + scalar_jet.exp(x)),
    ),
    "gelu tanh": (
        lambda x, y: torch.nn.functional.gelu(x, approximate="tanh"),
        lambda x, y: 0.5 * x * (1 + scalar_jet.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    ),
    "softmax": (
        lambda x, y: torch.stack([x, y]).softmax(0)[0],
        lambda x, y: scalar_jet.exp(x) / (scalar_jet.exp(x) + scalar_jet.exp(y)),
    ),
    "log_softmax": (
        lambda x, y: torch.stack([x, y]).log_softmax(0)[1],
        lambda x, y: y - scalar_jet.log(scalar_jet.exp(x) + scalar_jet.exp(y)),
    ),
    "norm": (
        lambda x, y: torch.stack([x, y], -1).norm(dim=-1),
        lambda x, y: scalar_jet.sqrt(x * x + y * y),
    ),
    "a long chain": (
        lambda x, y: ((x * y).sqrt() / (1 + (-x).exp())).tanh().mul(y.log()).exp() - x * x / y,
        lambda x, y: (
            scalar_jet.exp(scalar_jet.tanh(scalar_jet.sqrt(x * y) / (1 + scalar_jet.exp(-x))) * scalar_jet.log(y))
            - x * x / y
        ),
    ),
}


@pytest.mark.parametrize("parts", [1, 2], ids=["real", "complex"])
@pytest.mark.parametrize("name", CHAINS)
def test_chain_of_scalar_functions(name, parts):
    """Oracle: the scalar reference."""
    torch.manual_seed(0)
    ours, theirs = CHAINS[name]
    x, y = draw(3, parts=parts), draw(3, parts=parts)
    assert_agrees(ours(x, y), [theirs(a, b) for a, b in zip(scalars(x), scalars(y), strict=True)])


@pytest.mark.parametrize("name", ["product", "quotient", "a long chain"])
@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_degrees(name, degree):
    """Oracle: the scalar reference."""
    torch.manual_seed(1)
    ours, theirs = CHAINS[name]
    x, y = draw(2, degree=degree), draw(2, degree=degree)
    assert_agrees(ours(x, y), [theirs(a, b) for a, b in zip(scalars(x), scalars(y), strict=True)])


def test_matrix_product():
    """Oracle: the scalar reference, summed over the inner dimension."""
    torch.manual_seed(2)
    a, b = draw(2, 3), draw(3, 2)
    x, y = scalars(a), scalars(b)
    entries = [
        sum((x[6 * k + 3 * i + m] * y[6 * k + 2 * m + j] for m in range(3)), ScalarJet([0] * (DEGREE + 1)))
        for k in range(2)
        for i in range(2)
        for j in range(2)
    ]
    assert_agrees(a @ b, entries)
    assert_agrees((a.unsqueeze(0) @ b.unsqueeze(0))[0], entries)


def test_roots_of_the_series_that_is_identically_zero():
    """Oracle: zero; and where the primal alone is zero the result is finite too."""
    x = draw(3)
    x[0] = 0.0
    for root in (torch.sqrt, lambda t: t**0.25, lambda t: t.norm(dim=0), lambda t: t**1.5):
        y = root(x.unsqueeze(0) if root is not torch.sqrt else x).reshape(-1)[0]
        assert y.primal == 0
        assert not y.coefficients.any()
    assert_agrees(x.sqrt(), [scalar_jet.sqrt(s) for s in scalars(x)])


@pytest.mark.parametrize("degree", [2, 3, 6])
@pytest.mark.parametrize("primal", [1e-9, 1e-20, 1e-28, 1e-33])
def test_powers_and_logarithms_of_small_numbers(primal, degree):
    """Oracle: in ``x_0 (1 + z)`` the series is that of ``1 + z``, however small ``x_0``; a second moment often is."""
    x = JetTensor(torch.tensor(primal), torch.tensor([primal] + [0.0] * (degree - 1)).reshape(degree, 1, 1))
    for power in (0.5, -0.5, -1.0, 0.3):
        functions = [lambda t, p=power: t**p, lambda t, p=power: t ** torch.tensor(p)]
        functions += {0.5: [torch.sqrt], -0.5: [torch.rsqrt], -1.0: [torch.reciprocal]}.get(power, [])
        binomial = torch.cumprod(torch.tensor([(power - k) / (k + 1) for k in range(degree)]), 0)
        for function in functions:
            found = function(x).coefficients.flatten().double() / primal**power
            torch.testing.assert_close(found, binomial.double(), rtol=2e-5, atol=2e-5)
    logarithm = torch.tensor([(-1.0) ** (k + 1) / k for k in range(1, degree + 1)])
    for function, base in ((torch.log, math.e), (torch.log2, 2.0), (torch.log10, 10.0)):
        torch.testing.assert_close(function(x).coefficients.flatten(), logarithm / math.log(base), rtol=2e-5, atol=2e-5)


BROADCAST = shapes.mutually_broadcastable_shapes(num_shapes=2, min_dims=0, max_dims=3, max_side=3)
OPERATORS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: torch.sub(a, b, alpha=0.5),
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (b * b + 1),
    "where": lambda a, b: torch.where(b > 0.3, a, b),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.3),
    "lerp": lambda a, b: torch.lerp(a, b, 0.4),
    "in place": lambda a, b: (a + torch.zeros_like(a + b)).mul_(b).add_(b, alpha=2).div_(b * b + 1),
}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(both=BROADCAST, constant=st.sampled_from(["neither", "first", "second"]))
@pytest.mark.parametrize("name", OPERATORS)
def test_broadcasting(name, both, constant):
    """Oracle: polynomials fitted to torch."""
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(s, generator=generator, dtype=torch.float64) for s in both.input_shapes]
    curves = [make_curve(p, 3, 1, 1, generator) for p in points]
    if constant == "neither":
        assert_right(lambda xs: [OPERATORS[name](*xs)], curves)
    elif constant == "first":
        assert_right(lambda xs: [OPERATORS[name](points[0] if name != "in place" else xs[0] * 0, xs[0])], curves[1:])
    else:
        assert_right(lambda xs: [OPERATORS[name](xs[0], points[1])], curves[:1])
