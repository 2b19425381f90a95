"""Elementwise functions up to degree 100, where rounding, cancellation and cost would show.

Oracle: values of ``f(x_0 + sum_r c_r z^r)`` on a circle, in mpmath at 60 digits, and Cauchy's integral by the
trapezoidal rule, whose error falls geometrically. The coefficients ``c_r`` do not decay, so that those of the result
grow like the inverse of the distance to the nearest singularity. No code is shared with the library.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mp, mpc, mpf
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sketch.jets import JetTensor, series
from lightning_sketch.jets.equations import evaluate
from lightning_sketch.jets.rules import activations, pointwise, powers

DEGREE = 100
POINTS, RADIUS, DIGITS = 128, "0.4", 60
ORDERS = [0, *range(1, 13), 20, 37, 50, 75, 99, 100]  # the orders that are compared
ENTRIES = 2

# the two entries of the primal
CENTRES = {
    "about zero": [-0.6, 0.45],
    "at zero": [0.0, 0.3],
    "positive": [0.8, 1.7],
    "small": [-0.3, 0.4],
    "large": [-3.1, 2.6],
    "above one": [1.9, 2.4],
}


@functools.cache
def draw(where: str, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Primals ``(2,)`` and coefficients ``(100, P, 1, 2)`` of unit size, or less where the domain is narrow."""
    generator = torch.Generator().manual_seed(len(where) + parts)
    x0 = torch.tensor(CENTRES[where], dtype=torch.float64)
    size = 0.2 if where in ("small", "above one") else 0.4
    return x0, size * (2 * torch.rand(DEGREE, parts, 1, ENTRIES, generator=generator, dtype=torch.float64) - 1)


@functools.cache
def circle(where: str, parts: int, entry: int) -> list[Any]:
    """``x(z)`` on the circle."""
    x0, c = draw(where, parts)
    with mp.workdps(DIGITS):
        series = [mpc(x0[entry].item())]
        series += [mpc(*(c[r, p, 0, entry].item() for p in range(parts))) for r in range(DEGREE)]
        return [mpmath.polyval(series[::-1], z) for z in nodes()]


@functools.cache
def nodes() -> list[Any]:
    with mp.workdps(DIGITS):
        return [mpf(RADIUS) * mpmath.expjpi(mpf(2 * j) / POINTS) for j in range(POINTS)]


@functools.cache
def weights() -> dict[int, list[Any]]:
    with mp.workdps(DIGITS):
        return {r: [z**-r / POINTS for z in nodes()] for r in ORDERS}


def expected(f: Callable[[Any], Any], where: str, parts: int) -> torch.Tensor:
    """Coefficients ``(orders, 2)``, complex."""
    with mp.workdps(DIGITS):
        values = [[f(x) for x in circle(where, parts, e)] for e in range(ENTRIES)]
        found = [[complex(mpmath.fdot(w, v)) for v in values] for w in weights().values()]
    return torch.tensor(found, dtype=torch.complex128)


def jets(
    f: Callable[[Any], Any], where: str, parts: int, degree: int = DEGREE, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Orders 0 to the degree that the library gives, ``(degree + 1, 2)``."""
    x0, c = draw(where, parts)
    y = f(JetTensor(x0.to(dtype), c[:degree].to(dtype)))
    assert y.dtype == dtype
    block = y.coefficients[:, :, 0].to(torch.complex128)
    return torch.cat((y.primal[None], block[:, 0] + (1j * block[:, 1] if parts == 2 else 0)))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest error, relative to the size of its order."""
    n = sum(r < ours.shape[0] for r in ORDERS)
    theirs = theirs[:n]
    return float(((ours[ORDERS[:n]] - theirs).abs() / theirs.abs().amax(1, keepdim=True)).max())


def slope(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``f'`` by autograd, through the adjoints that it calls by name."""

    def derivative(x: Any) -> Any:
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf).sum(), leaf)
        return grad

    return derivative


def invert(f: Callable[[Any], Any], df: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The inverse function near zero, by Newton's iteration."""

    def inverse(x: Any) -> Any:
        y = x
        for _ in range(9):
            y -= (f(y) - x) / df(y)
        return y

    return inverse


def density(x: Any) -> Any:
    return mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mpmath.pi)


def normal_cdf(x: Any) -> Any:
    return mpmath.erfc(-x / mpmath.sqrt(2)) / 2


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def angle(x: Any) -> Any:
    return 2 * mpmath.sqrt(2 / mpmath.pi) * (x + mpf(0.044715) * x**3)


def angle_slope(x: Any) -> Any:
    return 2 * mpmath.sqrt(2 / mpmath.pi) * (1 + 3 * mpf(0.044715) * x**2)


def softplus(x: Any) -> Any:
    return mpmath.log1p(mpmath.exp(x))


Case = tuple[Callable[[Any], Any], Callable[[Any], Any], str]
FUNCTIONS: dict[str, Case] = {
    "exp": (torch.exp, mpmath.exp, "about zero"),
    "exp2": (torch.exp2, lambda x: mpf(2) ** x, "about zero"),
    "expm1": (torch.expm1, mpmath.expm1, "about zero"),
    "log": (torch.log, mpmath.log, "positive"),
    "log2": (torch.log2, lambda x: mpmath.log(x) / mpmath.log(2), "positive"),
    "log10": (torch.log10, mpmath.log10, "positive"),
    "log1p": (torch.log1p, mpmath.log1p, "positive"),
    "sin": (torch.sin, mpmath.sin, "about zero"),
    "cos": (torch.cos, mpmath.cos, "about zero"),
    "tan": (torch.tan, mpmath.tan, "about zero"),
    "sinh": (torch.sinh, mpmath.sinh, "about zero"),
    "cosh": (torch.cosh, mpmath.cosh, "about zero"),
    "asin": (torch.asin, mpmath.asin, "small"),
    "acos": (torch.acos, mpmath.acos, "small"),
    "atan": (torch.atan, mpmath.atan, "about zero"),
    "asinh": (torch.asinh, mpmath.asinh, "about zero"),
    "acosh": (torch.acosh, mpmath.acosh, "above one"),
    "atanh": (torch.atanh, mpmath.atanh, "small"),
    "tanh": (torch.tanh, mpmath.tanh, "about zero"),
    "tanh far out": (torch.tanh, mpmath.tanh, "large"),
    "sigmoid": (torch.sigmoid, sigmoid, "large"),
    "erf": (torch.erf, mpmath.erf, "about zero"),
    "erfc": (torch.erfc, mpmath.erfc, "about zero"),
    "silu": (F.silu, lambda x: x * sigmoid(x), "large"),
    "gelu": (F.gelu, lambda x: x * normal_cdf(x), "about zero"),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda x: x * sigmoid(angle(x)), "about zero"),
    "softplus": (F.softplus, softplus, "large"),
    "softplus, steep": (lambda x: F.softplus(x, 3.0), lambda x: softplus(3 * x) / 3, "about zero"),
    "softplus above its threshold": (lambda x: F.softplus(x, 3.0, 1.0), lambda x: x, "positive"),
    "logsigmoid": (F.logsigmoid, lambda x: -softplus(-x), "large"),
    "tanh'": (slope(torch.tanh), lambda x: 1 - mpmath.tanh(x) ** 2, "about zero"),
    "silu'": (slope(F.silu), lambda x: sigmoid(x) + x * sigmoid(x) * sigmoid(-x), "about zero"),
    "gelu'": (slope(F.gelu), lambda x: normal_cdf(x) + x * density(x), "about zero"),
    "gelu tanh'": (
        slope(lambda x: F.gelu(x, approximate="tanh")),
        lambda x: sigmoid(angle(x)) * (1 + x * sigmoid(-angle(x)) * angle_slope(x)),
        "about zero",
    ),
    "softplus'": (slope(lambda x: F.softplus(x, 2.0)), lambda x: sigmoid(2 * x), "about zero"),
    "logsigmoid'": (slope(F.logsigmoid), lambda x: sigmoid(-x), "about zero"),
    "sqrt": (torch.sqrt, mpmath.sqrt, "positive"),
    "rsqrt": (torch.rsqrt, lambda x: 1 / mpmath.sqrt(x), "positive"),
    "reciprocal": (torch.reciprocal, lambda x: 1 / x, "positive"),
    "x^1": (lambda x: x**1, lambda x: x, "positive"),
    "x^2": (lambda x: x**2, lambda x: x**2, "about zero"),
    "x^3 at zero": (lambda x: x**3, lambda x: x**3, "at zero"),
    "x^7": (lambda x: x**7, lambda x: x**7, "about zero"),
    "x^2.5": (lambda x: x**2.5, lambda x: x**2.5, "positive"),
    "x^-1.5": (lambda x: x**-1.5, lambda x: x**-1.5, "positive"),
    "x^-3": (lambda x: x**-3, lambda x: x**-3, "positive"),
    "x^p": (
        lambda x: x ** torch.full((2,), 1.3).to(x.dtype),
        lambda x: x ** mpf(torch.full((), 1.3).item()),
        "positive",
    ),
    "1.7^x": (lambda x: 1.7**x, lambda x: mpf(1.7) ** x, "about zero"),
    "x^x": (lambda x: x**x, lambda x: x**x, "positive"),
    "erfinv": (
        torch.erfinv,
        invert(mpmath.erf, lambda y: 2 / mpmath.sqrt(mpmath.pi) * mpmath.exp(-y * y)),
        "small",
    ),
    "erfcx": (torch.special.erfcx, lambda x: mpmath.exp(x * x) * mpmath.erfc(x), "about zero"),
    "log_ndtr": (torch.special.log_ndtr, lambda x: mpmath.log(normal_cdf(x)), "about zero"),
    "product": (lambda x: x * (x + 0.5), lambda x: x * (x + 0.5), "about zero"),
    "square": (lambda x: x * x, lambda x: x * x, "about zero"),
    "quotient": (lambda x: (x - 2) / (x + 0.5), lambda x: (x - 2) / (x + 0.5), "positive"),
    "softmax": (
        lambda x: torch.stack((x, -2 * x, 0 * x)).softmax(0)[0],
        lambda x: mpmath.exp(x) / (mpmath.exp(x) + mpmath.exp(-2 * x) + 1),
        "about zero",
    ),
    "log_softmax": (
        lambda x: torch.stack((x, -2 * x, 0 * x)).log_softmax(0)[1],
        lambda x: -2 * x - mpmath.log(mpmath.exp(x) + mpmath.exp(-2 * x) + 1),
        "about zero",
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    """Oracle: mpmath; in double and in single precision, at every degree that takes another path."""
    ours, theirs, where = FUNCTIONS[name]
    for parts in (1, 2):
        answer = expected(theirs, where, parts)
        for degree in (1, 3, 6, 7, 100):
            assert error(jets(ours, where, parts, degree), answer) < 1e-12, (parts, degree)
        assert error(jets(ours, where, parts, DEGREE, torch.float32), answer) < 2e-4, parts


def scalar(x0: float) -> JetTensor:
    """The series ``x_0 + z``."""
    c = torch.zeros(DEGREE, 1, 1, dtype=torch.float64)
    c[0] = 1
    return JetTensor(torch.tensor(x0, dtype=torch.float64), c)


CLOSED_FORMS: dict[str, tuple[Callable[[Any], Any], float, Callable[[int], float]]] = {
    "exp 2x": (lambda x: (2 * x).exp(), 0.0, lambda r: 2**r / math.factorial(r)),
    "log": (torch.log, 1.0, lambda r: -((-1) ** r) / r),
    "sqrt": (torch.sqrt, 1.0, lambda r: float(mpmath.binomial(0.5, r))),
    "rsqrt": (torch.rsqrt, 1.0, lambda r: float(mpmath.binomial(-0.5, r))),
    "x^2.5": (lambda x: x**2.5, 1.0, lambda r: float(mpmath.binomial(2.5, r))),
    "reciprocal": (torch.reciprocal, 1.0, lambda r: (-1) ** r),
    "quotient": (lambda x: x / (2 - x * x), 0.0, lambda r: 2.0 ** -((r + 1) // 2) if r % 2 else 0.0),
    "sin": (torch.sin, 0.0, lambda r: (-1) ** (r // 2) / math.factorial(r) if r % 2 else 0.0),
    "cosh": (torch.cosh, 0.0, lambda r: 0.0 if r % 2 else 1 / math.factorial(r)),
    "atan": (torch.atan, 0.0, lambda r: (-1) ** (r // 2) / r if r % 2 else 0.0),
    "atanh": (torch.atanh, 0.0, lambda r: 1 / r if r % 2 else 0.0),
    "tan": (
        torch.tan,
        0.0,
        lambda r: (
            float(abs(mpmath.bernoulli(r + 1)) * mpf(2) ** (r + 1) * (mpf(2) ** (r + 1) - 1) / mpmath.factorial(r + 1))
            if r % 2
            else 0.0
        ),
    ),
    "erf": (
        torch.erf,
        0.0,
        lambda r: 2 / math.sqrt(math.pi) * (-1) ** (r // 2) / (math.factorial(r // 2) * r) if r % 2 else 0.0,
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form(name):
    """Oracle: the Taylor coefficients that tables give, every one to 13 digits, down to 1e-158."""
    f, x0, coefficient = CLOSED_FORMS[name]
    ours = f(scalar(x0)).coefficients.flatten().tolist()
    for r, value in enumerate(ours, 1):
        assert value == pytest.approx(coefficient(r), rel=2e-13, abs=0), r


def test_series_that_are_zero():
    """Oracle: roots of the series zero are zero, at every degree; natural powers of a moving zero are products."""
    _, c = draw("about zero", 2)
    x = JetTensor(torch.zeros(2, dtype=torch.float64), c.clone())
    for root in (torch.sqrt, lambda t: t**0.25, lambda t: t**1.5, lambda t: t ** torch.tensor([0.5, 2.5])):
        y = root(x)
        assert not y.primal.any()
        assert not y.coefficients.any()
    assert (x**0).primal.tolist() == [1, 1]
    assert not (x**0).coefficients.any()
    y = x ** torch.tensor([0.0, 9.0])
    assert not y.coefficients[..., 0].any()
    h = torch.complex(*c[:, :, 0, 1].unbind(1))
    power = torch.zeros(DEGREE + 1, dtype=torch.complex128)
    power[0] = 1
    for _ in range(9):
        power = torch.stack([sum((power[r - i] * h[i - 1] for i in range(1, r + 1)), power[0] * 0) for r in range(101)])
    torch.testing.assert_close(torch.complex(*y.coefficients[:, :, 0, 1].unbind(1)), power[1:])
    bases = torch.tensor([0.0, 1.3], dtype=torch.float64)
    y = bases ** (x + 1)
    assert not y.coefficients[..., 0].any()
    torch.testing.assert_close(y.coefficients[..., 1], (1.3 ** (x + 1)).coefficients[..., 1])


def test_a_masked_entry_of_softmax():
    """Oracle: the softmax without that entry."""
    x0, c = draw("about zero", 2)
    x = JetTensor(x0, c.clone())
    for f in (torch.softmax, torch.log_softmax):
        y = f(torch.cat((x, torch.full((1,), -torch.inf, dtype=torch.float64))), 0)
        torch.testing.assert_close(y.coefficients[..., :2], f(x, 0).coefficients, rtol=1e-13, atol=0)


@pytest.mark.parametrize("degree", [6, 7, 20])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("f", [torch.tanh, F.gelu, torch.sqrt, lambda x: x**-0.5, lambda x: x * x / (x + 1)])
def test_entries_and_directions_do_not_mix(f, parts, degree):
    """Oracle: the same function of single entries along single directions; memory order is kept."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(2, 3, 2, 2, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last) + 0.5
    c = 0.3 * torch.randn(degree, parts, 3, 2, 3, 2, 2, generator=generator, dtype=torch.float64)
    y = f(JetTensor(x0, c))
    assert y.stride() == x0.stride()
    for at in ((0, 0, 0, 0), (1, 2, 0, 1), (0, 1, 1, 1)):
        for k in range(3):
            single = f(JetTensor(x0[at].clone(), c[(..., *at)][:, :, k : k + 1].clone()))
            torch.testing.assert_close(y.coefficients[(..., *at)][:, :, k], single.coefficients[:, :, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Oracle: single precision, rounded."""
    x0, c = draw("positive", 2)
    kept = torch.float32 if dtype == torch.float16 else dtype
    x = JetTensor(x0.to(dtype), c[:20].to(kept))
    for f in (torch.tanh, F.gelu, torch.sqrt, torch.exp):
        y, z = f(x), f(JetTensor(x.primal.float(), x.coefficients.float()))
        assert (y.dtype, y.coefficients.dtype) == (dtype, kept)
        torch.testing.assert_close(y.coefficients.float(), z.coefficients, rtol=2**-8, atol=1e-2)


def test_input_is_neither_changed_nor_shared():
    """Oracle: a copy made before."""
    x0, c = draw("positive", 1)
    for f in (torch.exp, lambda x: x**1, lambda x: x**3, torch.sqrt, lambda x: F.softplus(x, 1.0, 0.5)):
        x = JetTensor(x0.clone(), c.clone())
        f(x).mul_(2)
        assert torch.equal(x.coefficients, c)


class Operators(TorchDispatchMode):
    """Counts what is run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


STATEMENTS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    name: functools.partial(evaluate, statement)
    for name, statement in {
        "exp": pointwise.exp,
        "log": pointwise.log,
        "tan": pointwise.tan,
        "tanh": activations.tanh,
        "gelu": activations.gelu_normal,
        "gelu tanh'": activations.gelu_tanh_slope,
        "sqrt": lambda x: powers.power(x, 0.5),
        "rsqrt": lambda x: powers.power(x, -0.5),
        "x^7": lambda x: powers.power(x, 7),
    }.items()
} | {
    "product": lambda x0, h: series.add_cauchy(h * 0, h, h),
    "square": lambda x0, h: series.add_square(h * 0, h),
    "quotient": lambda x0, h: series.divide(h, x0, x0, h, x0.shape),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_operators_grow_like_the_degree(name):
    """Oracle: twice the degree runs twice the operators, so that no operator is run for each pair of orders."""
    x0, c = draw("positive", 2)
    counts = []
    for degree in (50, 100):
        with Operators() as operators:
            STATEMENTS[name](x0, c[:degree])
        counts.append(operators.count)
    assert counts[1] < 2.1 * counts[0]
