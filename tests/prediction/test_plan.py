"""Planning, against random symmetric tensors whose norms are known.

Oracles work in the whole tensor space, ``n^r`` numbers, and share no formula with the package.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sketch import ConfigurationError, plan
from lightning_sketch.directions import count_directions, first_order_error, make_directions
from lightning_sketch.prediction.estimators import KernelEstimator

N = 6


def rank_one(vectors, r):
    """``v^(x r)`` of every row, ``(K, n^r)``."""
    result = vectors
    for _ in range(r - 1):
        result = np.einsum("ka,kb->kab", result, vectors).reshape(len(vectors), -1)
    return result


def symmetric(rng, count, n, r, norm=1.0):
    """Tensors of no direction but of one norm, ``(count, n^r)``."""
    raw = rng.standard_normal((count, *[n] * r))
    tensors = sum(raw.transpose(0, *order) for order in itertools.permutations(range(1, r + 1))).reshape(count, -1)
    return norm * tensors / np.linalg.norm(tensors, axis=1, keepdims=True)


def measured(psi, r):
    """Orthonormal rows that span the measured part of the tensor space."""
    tensors = rank_one(psi, r)
    _, values, rows = np.linalg.svd(np.concatenate([tensors.real, tensors.imag]), full_matrices=False)
    return rows[values > 1e-9 * values[0]]


def deletion(d, n=N):
    return (np.arange(n) < d).astype(float)[None]


def rms(values):
    return math.sqrt(np.mean(np.square(values)))


def simulated_error(psi, d, norms, n=N, count=4000, seed=0):
    """RMS error, relative to the RMS change, of predicting from what ``psi`` measures and taking the rest for zero."""
    rng = np.random.default_rng(seed)
    error, change = np.zeros(count), np.zeros(count)
    for r, (norm, directions) in enumerate(zip(norms, psi, strict=True), start=1):
        tensors, x = symmetric(rng, count, n, r, norm), rank_one(deletion(d, n), r)[0]
        seen = np.zeros_like(x) if directions is None else measured(directions, r).T @ (measured(directions, r) @ x)
        change += tensors @ x
        error += tensors @ (x - seen)
    return rms(error) / rms(change)


def row(planned, design):
    (found,) = [p for p in planned.alternatives if p.design == design]
    return found


@pytest.mark.parametrize("d", [1, 2, 5, 6])
@pytest.mark.parametrize("design", ["basis", "basis+common"])
def test_errors_of_fixed_designs_are_those_of_random_tensors(design, d):
    """Oracle: the projection of random tensors of three orders on the directions."""
    norms = [1.0, 2.0, 3.0]
    found = row(plan(N, error=1e-6, deletion_size=d, profile=np.log2(norms)), design)
    psi = make_directions(1, design, N).array
    used = [psi if r <= found.degree else None for r in (1, 2, 3)]
    assert found.directions == len(psi)
    assert found.expected_error == pytest.approx(simulated_error(used, d, norms), rel=0.04, abs=1e-7)


def test_orders_left_out_are_missed():
    """Oracle: simulation without the second order, which a lower target asks for."""
    norms = [1.0, 0.5]
    planned = plan(N, error=0.4, deletion_size=2, profile=np.log2(norms), num_sets=4)
    assert (planned.design, planned.directions, planned.degree) == ("indicator", 4, 1)
    basis = make_directions(1, "basis", N).array
    assert planned.expected_error == pytest.approx(simulated_error([basis, None], 2, norms), rel=0.04)
    finer = plan(N, error=0.1, deletion_size=2, profile=np.log2(norms), num_sets=4)
    assert (finer.design, finer.degree, finer.expected_error) == ("indicator", 2, 0.0)


@pytest.mark.parametrize("error", [0.3, 0.5, 0.8])
def test_random_directions_are_as_many_as_the_callback_announces(error):
    """Oracle: ``first_order_error``, which the callback prints; one direction fewer is not enough."""
    found = row(plan(40, error=error), "orthonormal")
    assert found.expected_error == pytest.approx(first_order_error(2 * found.directions, 40))
    assert found.expected_error <= error < first_order_error(2 * found.directions - 2, 40)
    assert found.directions == math.ceil(20 / (1 + error**2))


@pytest.mark.parametrize("degree", [1, 2])
def test_random_directions_miss_no_more_than_planned(degree):
    """Oracle: simulated projections; the plan's unbiased estimate misses ``sqrt(n/m)`` more at first order."""
    n, norms = 12, [1.0, 0.3][:degree]
    found = row(plan(n, error=0.75, profile=np.log2(norms)), "orthonormal")
    assert found.degree == 1
    used = [[make_directions(found.directions, "orthonormal", n, seed=seed).array, None][:degree] for seed in range(40)]
    simulated = rms([simulated_error(psi, 1, norms, n, 100, seed) for seed, psi in enumerate(used)])
    assert 0.8 * found.expected_error < simulated <= found.expected_error


def test_the_kernel_estimator_errs_as_planned():
    """Oracle: the estimator itself, on three outputs of every one of many random functions."""
    d, rng = 3, np.random.default_rng(1)
    psi, x = make_directions(1, "basis+common", N).array, deletion(d)
    tensors = [symmetric(rng, 2000, N, r) for r in (1, 2)]
    coefficients, truth = (
        np.stack([rank_one(v, r) @ t.T for r, t in enumerate(tensors, start=1)]) for v in (psi, x.astype(complex))
    )
    terms, stderr = KernelEstimator(psi, coefficients)(x, 2)
    relative = rms((terms - truth.real).sum(axis=0)) / rms(truth.real.sum(axis=0))
    found = row(plan(N, error=0.01, deletion_size=d, profile=[0, 0]), "basis+common")
    assert found.expected_error == pytest.approx(relative, rel=0.05)
    assert found.expected_error == pytest.approx(rms(stderr) / rms(truth.real.sum(axis=0)), rel=0.05)


def samples(rng, tensor, x, r, count):
    """``e_jr`` of ``count`` sphere directions, by its definition."""
    n = x.shape[1]
    psi = rng.standard_normal((count, n)) + 1j * rng.standard_normal((count, n))
    psi /= np.linalg.norm(psi, axis=1, keepdims=True)
    return math.comb(n + r - 1, r) * np.real(rank_one(psi, r) @ tensor * np.conj(psi @ x[0]) ** r)


@pytest.mark.parametrize(("r", "tightness"), [(1, 0.3), (2, 0.97), (3, 0.95)])
def test_the_variance_bound_holds_and_the_worst_tensor_attains_it(r, tightness):
    """Oracle: the sample variance along random tensors and along ``1_D^(x r)``, for which order 2 and 3 attain it."""
    n, d, rng = 4, 2, np.random.default_rng(2)
    profile = [-40.0] * (r - 1) + [0.0]
    found = row(plan(n, error=0.3, failure_probability=0.05, deletion_size=d, profile=profile), "sphere")
    groups = math.ceil(8 * math.log(r / 0.05))
    assert found.degree == r
    assert found.directions % groups == 0
    typical = math.sqrt(d**r / math.comb(n + r - 1, r))
    bound = (found.expected_error * typical / 2) ** 2 * found.directions / groups  # of one direction's variance
    x = deletion(d, n)
    aligned = rank_one(x, r)[0] / d ** (r / 2)
    for tensor in [*symmetric(rng, 3, n, r), aligned]:
        variance = samples(rng, tensor, x, r, 200_000).var()
        assert variance < 1.02 * bound
    assert variance > tightness * bound


@pytest.mark.parametrize("r", [1, 2])
def test_the_median_of_means_fails_no_more_often_than_planned(r):
    """Oracle: 200 sketches of the planned size of the worst function, in the groups of the theorem."""
    n, d, failure, rng = 4, 2, 0.2, np.random.default_rng(3)
    profile = [-40.0] * (r - 1) + [0.0]
    found = row(plan(n, error=0.6, failure_probability=failure, deletion_size=d, profile=profile), "sphere")
    groups = math.ceil(8 * math.log(r / failure))
    x = deletion(d, n)
    tensor = rank_one(x, r)[0] / d ** (r / 2)
    typical = math.sqrt(d**r / math.comb(n + r - 1, r))
    e = samples(rng, tensor, x, r, 200 * found.directions)
    medians = np.median(e.reshape(200, groups, -1).mean(axis=2), axis=1)
    failed = np.abs(medians - tensor @ rank_one(x, r)[0]) > found.expected_error * typical
    assert failed.mean() <= failure


def test_with_a_failure_probability_exact_designs_win_and_the_bound_is_shown():
    """Oracle: the table's own numbers; ``K = g (2 sqrt(v C_1) / error)^2`` by hand, ``v = n/(n+1)``."""
    planned = plan(1000, error=0.1, failure_probability=1e-3)
    assert (planned.design, planned.directions, planned.expected_error) == ("basis", 1000, 0.0)
    sphere = row(planned, "sphere")
    assert sphere.directions == 56 * math.ceil(400 * 1000 * 1000 / 1001)
    assert sphere.meets_target
    assert "orthonormal" not in repr(planned)


def test_a_bound_holds_what_is_left_out_too():
    """Oracle: the second order's share by hand; what the directions leave is the rest of the target."""
    found = row(plan(50, error=0.3, failure_probability=0.01, deletion_size=2, profile=[0, -2]), "sphere")
    first, second = 2 / 50, 4 / (50 * 51 / 2) / 16
    left_out = math.sqrt(second / (first + second))
    deviation = math.sqrt(50 / 51 * 2 / (first + second))
    assert found.degree == 1
    assert found.directions == 37 * math.ceil((2 * deviation / (0.3 - left_out)) ** 2)
    assert found.expected_error == pytest.approx(0.3, abs=1e-4)


def test_half_as_many_complex_directions_as_units_are_exact_rounded_up():
    """Oracle: ``2 K >= n``."""
    for n, count in ((6, 3), (7, 4), (1, 1)):
        found = row(plan(n, error=0.01), "orthonormal")
        assert (found.directions, found.expected_error) == (count, 0.0)


def test_none_within_as_many_measurements_as_units_is_said():
    """Oracle: the words, and the least error of the table."""
    planned = plan(50, error=0.05, deletion_size=5, profile=[0, 2, 3])
    assert not planned.meets_target
    assert planned.expected_error == min(p.expected_error for p in planned.alternatives)
    assert "none meets it with as many measurements as units" in repr(planned)
    bounded = plan(50, error=0.05, deletion_size=5, profile=[0, 2, 3], failure_probability=0.01)
    assert row(bounded, "sphere").meets_target  # but with billions of directions
    assert not bounded.meets_target


def test_costs_count_the_operations():
    """Oracle: 2R + R(R-1)/2 and 4R + 2R(R-1) by hand."""
    planned = plan(10, error=1e-6, deletion_size=10, profile=[0, 0, 0], num_sets=3)
    costs = {p.design: (p.degree, p.cost) for p in planned.alternatives}
    assert costs["indicator"] == (3, 3 * 9)
    assert costs["basis+common"] == (3, 21 * 9)
    assert row(plan(10, error=0.9), "orthonormal").cost == 4 * row(plan(10, error=0.9), "orthonormal").directions


sizes = st.integers(1, 300)


@given(st.data(), sizes, st.floats(0.01, 0.99), st.lists(st.floats(-30, 30), min_size=1, max_size=5))
def test_every_plan_is_the_cheapest_of_a_table_in_order(data, n, error, profile):
    """Oracle: what the docstring says, for any arguments."""
    d = data.draw(st.integers(1, n))
    planned = plan(n, error=error, deletion_size=d, profile=profile)
    rows = planned.alternatives
    assert [p.cost for p in rows] == sorted(p.cost for p in rows)
    assert all(0 <= p.expected_error <= 1 + 1e-9 and 1 <= p.degree <= len(profile) for p in rows)
    meeting = [p for p in rows if p.meets_target]
    assert planned.cost == (min(p.cost for p in meeting) if meeting else planned.cost)
    assert planned.meets_target == bool(meeting)
    for p in rows:
        recipe = {"design": p.design, "count": p.directions, "deletion_sets": None}
        assert count_directions(recipe, n) == p.directions
    shifted = plan(n, error=error, deletion_size=d, profile=[p + 3 for p in profile])  # the output in other units
    assert shifted.expected_error == pytest.approx(planned.expected_error, abs=1e-6)
    assert shifted.design == planned.design
    looser = plan(n, error=(1 + error) / 2, deletion_size=d, profile=profile)
    assert not planned.meets_target or looser.cost <= planned.cost


def test_high_orders_of_many_units_do_not_overflow():
    """Oracle: numbers between 0 and 1; the dimensions are beyond float64."""
    profile = [-2.0 * r for r in range(100)]
    for failure_probability in (None, 0.01):
        planned = plan(
            10**6, error=1e-9, deletion_size=500, profile=profile, failure_probability=failure_probability, num_sets=2
        )
        assert all(0 <= p.expected_error <= 1 for p in planned.alternatives)
        assert planned.design == "indicator"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n_units": 0}, "`n_units` is 0"),
        ({"n_units": 2.0}, "`n_units` is 2.0"),
        ({"error": 0}, "`error` is 0"),
        ({"error": 1.0}, "`error` is 1.0"),
        ({"error": "10%"}, "`error` is '10%'"),
        ({"failure_probability": 0}, "`failure_probability` is 0"),
        ({"failure_probability": 1.5}, "`failure_probability` is 1.5"),
        ({"deletion_size": 11}, "`deletion_size` is 11, and there are 10 units"),
        ({"deletion_size": 0.5}, "`deletion_size` is 0.5"),
        ({"profile": []}, "`profile` is"),
        ({"profile": [[1.0]]}, "`profile` is"),
        ({"profile": [0.0, float("nan")]}, "`profile` is"),
        ({"profile": "steep"}, "`profile` is 'steep'"),
        ({"num_sets": 0}, "`num_sets` is 0"),
    ],
)
def test_impossible_arguments_are_refused(arguments, named):
    """Oracle: the argument's name in the message."""
    with pytest.raises(ConfigurationError, match=named):
        plan(**{"n_units": 10, **arguments})
