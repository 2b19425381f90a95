"""The stability profile against symmetric tensors and series that are known in closed form."""

import itertools
import math

import numpy as np
import pytest

from lightning_sketch import ConfigurationError
from lightning_sketch.directions import make_directions, random_signs
from lightning_sketch.prediction.stability import profile_of_sizes, stability_profile


def symmetric(n: int, order: int, generator: np.random.Generator) -> np.ndarray:
    """A random symmetric tensor ``(n,) * order``."""
    raw = generator.normal(size=(n,) * order)
    return sum(raw.transpose(axes) for axes in itertools.permutations(range(order))) / math.factorial(order)


def contract(tensor: np.ndarray, psi: np.ndarray) -> complex:
    for _ in range(tensor.ndim):
        tensor = tensor @ psi
    return complex(tensor)


def test_norms_are_those_of_the_tensors() -> None:
    """Oracle: Frobenius norms, from 20,000 directions on the complex sphere."""
    generator = np.random.default_rng(0)
    tensors = [symmetric(5, order, generator) for order in (1, 2, 3)]
    psi = make_directions(20000, "sphere", 5, seed=1).array
    coefficients = [np.einsum("ka,a->k", psi, tensors[0])]
    coefficients.append(np.einsum("ka,kb,ab->k", psi, psi, tensors[1]))
    coefficients.append(np.einsum("ka,kb,kc,abc->k", psi, psi, psi, tensors[2]))
    profile = stability_profile(np.array(coefficients), psi)
    expected = [math.log2(np.linalg.norm(t)) for t in tensors]
    assert profile.log2_norms == pytest.approx(expected, abs=0.03)
    assert profile.degree == 3
    assert profile.num_units == 5


def test_the_length_of_directions_and_the_outputs_do_not_matter() -> None:
    """Oracle: the same tensors seen along directions of other lengths; two outputs of equal size are one."""
    generator = np.random.default_rng(1)
    first, second = symmetric(4, 1, generator), symmetric(4, 2, generator)
    psi = make_directions(6, "orthonormal", 4).array
    longer = psi * np.array([[3.0], [0.1], [1], [2], [1], [7]])
    profiles = []
    for directions in (psi, longer):
        c = np.array([[contract(t, p) for p in directions] for t in (first, second)])
        profiles.append(stability_profile(np.stack([c, -1j * c], axis=2), directions))
        assert profiles[-1].log2_norms == pytest.approx(stability_profile(c, directions).log2_norms, abs=1e-12)
    assert profiles[0].log2_norms == pytest.approx(profiles[1].log2_norms, abs=1e-12)
    assert profiles[0].spread == pytest.approx(profiles[1].spread, abs=1e-12)


def test_growth_and_spread_of_given_sizes() -> None:
    """Oracle: numbers chosen by hand; one unit, so that norms are sizes."""
    sizes = np.array([[1.0, 3.0], [4.0, 4.0], [8.0, 6.0]])
    profile = profile_of_sizes(sizes, np.ones((2, 1)))
    squares = (4.0**sizes).mean(axis=1)
    assert profile.log2_norms == pytest.approx(np.log2(squares) / 2)
    assert profile.growth == pytest.approx((np.log2(squares)[2] - np.log2(squares)[0]) / 4)
    assert profile.spread == pytest.approx(1.0)


def test_orders_that_vanish() -> None:
    profile = stability_profile(np.array([[2.0], [0.0], [0.0]]), np.ones((1, 1)))
    assert profile.log2_norms.tolist() == [1.0, -math.inf, -math.inf]
    assert math.isnan(profile.growth)
    assert profile.error([1, 2]).tolist() == [0, 0]
    assert profile.spread == 0
    assert "log2 norms 1.0, -inf" in repr(profile)


def test_the_range_of_high_orders() -> None:
    """Oracle: a geometric series whose 300th term is 2^-3000, beyond double precision when squared."""
    orders = np.arange(1, 301)
    c = 2.0 ** (-3.0 * orders)
    profile = stability_profile(c[:, None], np.ones((1, 1)))
    assert profile.log2_norms == pytest.approx(-3.0 * orders)
    assert profile.growth == pytest.approx(-3)


@pytest.mark.parametrize(("ratio", "tolerance"), [(0.2, 0.1), (0.05, 0.01), (0.5, 0.3), (0.01, 0.5)])
def test_trusted_units_of_a_geometric_series(ratio: float, tolerance: float) -> None:
    """Oracle: terms ``ratio^r`` a unit length without a common mode, summed by hand."""
    n, degree = 400, 3
    psi = random_signs(2, n, 0).array[:2]
    profile = stability_profile(np.array([[ratio**r] * 2 for r in range(1, degree + 1)]), psi)

    def error(d: int) -> float:
        rho = ratio * math.sqrt(d)
        if rho >= 1:
            return math.inf
        left_out = sum(rho**r for r in range(degree + 1, 5000))
        return left_out / math.sqrt(sum(rho ** (2 * r) for r in range(1, degree + 1)))

    expected = max((d for d in range(1, n // 2 + 1) if all(error(e) <= tolerance for e in range(1, d + 1))), default=0)
    assert profile.trusted_units(tolerance) == expected
    sizes = np.array([1, 2, expected])
    assert profile.error(sizes) == pytest.approx([error(d) for d in sizes], rel=1e-6)


def test_the_common_mode() -> None:
    """Oracle: ``f = g(sum x)``, whose deletions of ``d`` units are those of the common mode, ``d / sqrt(n)`` long."""
    n, slope = 100, 0.03
    psi = random_signs(4, n, 1).array
    c = np.array([(slope * psi.sum(axis=1)) ** r for r in (1, 2, 3)])
    c[:, :4] = 0
    profile = stability_profile(c, psi)
    sizes = np.array([1, 10, 20])
    assert profile.terms(sizes) == pytest.approx(np.array([(slope * sizes) ** r for r in (1, 2, 3)]))


def test_real_sign_patterns_see_what_units_do_by_themselves() -> None:
    """Oracle: ``f = sum_u x_u^2``: the second order of every deletion is its number of units."""
    psi = random_signs(3, 50, 0).array
    profile = stability_profile(np.array([np.zeros(4), (psi**2).sum(axis=1)]), psi)
    assert profile.terms([1, 7])[1] == pytest.approx([1, 7], rel=0.02)


def test_random_signs() -> None:
    found = random_signs(3, 64, 5)
    assert found.array.shape == (4, 64)
    assert np.allclose(np.abs(found.array), 1 / 8)
    assert found.real.all()
    assert (found.array[3] == 1 / 8).all()
    assert len({row.tobytes() for row in found.array}) == 4
    assert np.array_equal(found.array, random_signs(3, 64, 5).array)
    assert not np.array_equal(found.array[:3], random_signs(3, 64, 6).array[:3])


@pytest.mark.parametrize(
    ("coefficients", "directions"),
    [((2, 3), (4, 5)), ((3,), (3, 5)), ((2, 3), (3,)), ((0, 3), (3, 5))],
)
def test_shapes_that_do_not_fit(coefficients: tuple[int, ...], directions: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="give \\(R, K, \\*out\\) and \\(K, n\\)"):
        stability_profile(np.ones(coefficients), np.ones(directions))
