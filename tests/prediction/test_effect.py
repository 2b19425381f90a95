"""Effect and Prediction, on outputs that are known polynomials of the deletion weights."""

import math

import numpy as np
import pytest
import torch

from lightning_sketch.directions import make_directions
from lightning_sketch.errors import ConfigurationError
from lightning_sketch.prediction import Effect, Prediction
from lightning_sketch.prediction.estimators import KernelEstimator

UNITS = np.array([0, 0, 1, 2, 2, 2, -1, 3])  # eight examples in four units, one of them not deletable


class Polynomial:
    """``f(x)_o = f0_o + sum_r w_ro (v_o . x)^r`` of shape ``out``."""

    def __init__(self, out, n=4, degree=3, seed=0):
        rng = np.random.default_rng(seed)
        size = math.prod(out)
        self.out, self.n = out, n
        self.vectors, self.weights = rng.standard_normal((size, n)), rng.standard_normal((degree, size))
        self.baseline = rng.standard_normal(size)

    def terms(self, x):
        """``(R, K, O)``."""
        inner = np.asarray(x) @ self.vectors.T
        return np.stack([w * inner ** (r + 1) for r, w in enumerate(self.weights)])

    def effect(self, design="basis+sphere", count=20, dtype=torch.float64, units=None, seed=0):
        psi = make_directions(count, design, self.n, seed=seed).array
        coefficients = torch.from_numpy(self.terms(psi)).reshape(len(self.weights), len(psi), *self.out)
        units = np.arange(self.n) if units is None else units
        return Effect(torch.from_numpy(self.baseline).reshape(self.out).to(dtype), coefficients, psi, units)


@pytest.mark.parametrize("out", [(), (3,), (2, 3), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_deletion_of_any_output_shape_and_dtype(out, dtype):
    """Oracle: the polynomial, which 24 directions determine; every field's value, shape and dtype."""
    polynomial = Polynomial(out)
    effect = polynomial.effect(dtype=dtype)
    x = [0, 1, 0, 1]
    prediction = effect.delete(units=[3, 1])
    terms = polynomial.terms(np.array([x]))[:, 0].reshape(3, *out)
    tolerance = {"atol": 1e-9 if dtype == torch.float64 else 1e-5, "rtol": 1e-6}
    partial_sums = polynomial.baseline.reshape(out) + np.cumsum(terms, axis=0)
    np.testing.assert_allclose(prediction.by_degree, partial_sums, **tolerance)
    np.testing.assert_allclose(prediction.change, terms.sum(axis=0), **tolerance)
    np.testing.assert_allclose(prediction.value, polynomial.baseline.reshape(out) + terms.sum(axis=0), **tolerance)
    assert (prediction.truncation > 0).all()
    assert prediction.reliable.shape == ()
    assert prediction.reliable.dtype == torch.bool
    np.testing.assert_allclose(prediction.stderr, np.zeros(out), atol=1e-5)
    for field in (prediction.baseline, prediction.value, prediction.change, prediction.stderr, prediction.truncation):
        assert field.dtype == dtype
        assert field.shape == out
    assert prediction.by_degree.dtype == dtype
    assert prediction.by_degree.shape == (3, *out)
    assert effect.degree == 3
    assert effect.num_units == 4


@pytest.mark.parametrize("estimator", ["auto", "kernel", "mean", "median_of_means"])
@pytest.mark.parametrize("degree", [None, 1, 2])
def test_delete_many_stacks_single_deletions(estimator, degree):
    """Oracle: `delete`, one set at a time, by units and by weights."""
    effect = Polynomial((2, 3)).effect("sphere", 6)
    sets = [[0], [], [3, 1], [0, 1, 2, 3]]
    many = effect.delete_many(sets, estimator=estimator, degree=degree)
    x = np.zeros((4, 4))
    for row, units in zip(x, sets, strict=True):
        row[units] = 1
    for weights in (x, torch.from_numpy(x), x.astype(int)):
        by_weights = effect.delete_many(weights, estimator=estimator, degree=degree)
        torch.testing.assert_close(by_weights.value, many.value)
    assert many.by_degree.shape == (degree or 3, 4, 2, 3)
    assert many.value.shape == (4, 2, 3)
    for i, units in enumerate(sets):
        one = effect.delete(units, estimator=estimator, degree=degree)
        for field in ("value", "change", "stderr", "truncation", "resummed"):
            torch.testing.assert_close(getattr(many, field)[i], getattr(one, field))
        torch.testing.assert_close(many.by_degree[:, i], one.by_degree)
        assert many.reliable[i] == one.reliable
    torch.testing.assert_close(many.value[1], effect.baseline, atol=0, rtol=0)
    torch.testing.assert_close(many.stderr[1], torch.zeros(2, 3, dtype=torch.float64), atol=0, rtol=0)


def test_weights_scale_each_order_by_its_power():
    """Oracle: homogeneity, ``<F_r, (s x)^r> = s^r <F_r, x^r>``, with fractions and negative weights."""
    effect = Polynomial((3,)).effect()
    x = np.array([1.0, 0.5, 0, -0.25])
    one, half = effect.delete(weights=x), effect.delete(weights=-x / 2)

    def terms(prediction):
        return torch.cat([prediction.baseline[None], prediction.by_degree]).diff(dim=0)

    for r in (1, 2, 3):
        torch.testing.assert_close(terms(half)[r - 1], (-0.5) ** r * terms(one)[r - 1], atol=1e-10, rtol=1e-8)


def test_examples_are_deleted_by_whole_units():
    """Oracle: deleting the units themselves."""
    effect = Polynomial((3,)).effect(units=UNITS)
    by_examples = effect.delete(examples=[5, 2, 4, 3])
    torch.testing.assert_close(by_examples.value, effect.delete(units=[1, 2]).value)
    single = Polynomial((3,)).effect()
    torch.testing.assert_close(single.delete(examples=[3]).value, single.delete(units=[3]).value)


def test_interval_holds_sampling_error_and_truncation():
    """Oracle: the formula with the textbook quantiles 1.959964 and 1.644854."""
    prediction = Polynomial((3,), n=8).effect("sphere", 5).delete([0, 2])
    assert min(prediction.stderr.min(), prediction.truncation.min()) > 0
    for level, z in ((0.95, 1.959964), (0.90, 1.644854)):
        low, high = prediction.interval(level)
        half = z * (prediction.stderr**2 + prediction.truncation**2).sqrt()
        torch.testing.assert_close(low, prediction.value - half, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(high, prediction.value + half, rtol=1e-5, atol=1e-6)
    for level in (0, 1, 95):
        with pytest.raises(ConfigurationError, match="`level`"):
            prediction.interval(level)


def test_interval_of_a_value_that_is_not_finite_is_the_whole_line():
    value, half = torch.tensor([1.0, torch.inf, -torch.inf, 1.0]), torch.tensor([0.5, torch.inf, 1.0, torch.inf])
    zero = torch.zeros(4)
    low, high = Prediction(zero, value, value, half, value[None], zero, torch.tensor(False), value).interval()
    assert low[1:].tolist() == [-torch.inf] * 3
    assert high[1:].tolist() == [torch.inf] * 3
    assert low[0] < 1 < high[0]


def test_a_lower_degree_is_the_head_of_the_series():
    """Oracle: the higher degree's terms."""
    effect = Polynomial((3,)).effect()
    full, second = effect.delete([1, 2]), effect.delete([1, 2], degree=2)
    torch.testing.assert_close(second.by_degree, full.by_degree[:2])
    torch.testing.assert_close(second.value, full.by_degree[1])


def test_repr_is_short_and_human():
    """Oracle: the sentence itself."""
    coefficients = torch.tensor([[[2.0, 4.0]], [[0.2, 0.4]]], dtype=torch.complex128)  # terms fall by 1/10
    effect = Effect(torch.zeros(2), coefficients, np.eye(1), np.zeros(1, dtype=int))
    assert repr(effect.delete([0])) == "Prediction(shape=(2,), mean change=3.3 +- 0, truncation=0.03)"
    doubtful = repr(effect.delete(weights=[6.0]))  # terms fall by 6/10: those left out may be as large as the last
    assert doubtful == "Prediction(shape=(2,), mean change=28.8 +- 0, truncation=8.1; unreliable, better retrain)"
    many = repr(effect.delete_many(np.array([[0.1], [6.0], [4.0]])))
    assert many.endswith("; 1 of 3 unreliable, better retrain)")
    first = repr(effect.delete([0], degree=1))
    assert first.endswith("; unreliable, use degree 2 or more, or retrain)")


def test_the_failure_probability_reaches_the_median_of_means():
    """Oracle: the estimates of two probabilities, which differ, and that of the default, which the mean's is not."""
    effect = Polynomial((3,), n=8).effect("sphere", 200)
    few = effect.delete([0, 2], estimator="median_of_means", failure_probability=0.5)
    many = effect.delete([0, 2], estimator="median_of_means")
    assert (few.change != many.change).all()
    again = effect.delete_many([[0, 2]], estimator="median_of_means", failure_probability=0.5)
    torch.testing.assert_close(again.change[0], few.change, atol=0, rtol=0)
    with pytest.raises(ConfigurationError, match="`failure_probability`"):
        effect.delete([0], estimator="median_of_means", failure_probability=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": [4]}, "`units` holds .4.: this sketch has units 0 to 3"),
        ({"units": [-1]}, "`units`"),
        ({"units": [1, 1]}, "`units` holds .*twice"),
        ({"units": 3}, "`units`"),
        ({"units": [[1], [2, 3]]}, "`units`"),
        ({"units": [0.5]}, "`units`"),
        ({"units": ["a"]}, "`units`"),
        ({"units": [True, False]}, "`units`"),
        ({"examples": [8]}, "`examples`"),
        ({"examples": [-1]}, "`examples`"),
        ({"examples": [2, 2]}, "`examples` holds .*twice"),
        ({"examples": [6]}, "`examples` holds 6, which belongs to no unit"),
        ({"examples": [2, 3, 4]}, "`examples` holds 2 of the 3 examples of unit 2"),
        ({"weights": [1, 0, 0]}, r"`weights` has shape \(3,\)"),
        ({"weights": np.zeros((1, 4))}, "`weights`"),
        ({"weights": [1, 0, 0, np.nan]}, "`weights` holds NaN"),
        ({"weights": [1, 0, 0, np.inf]}, "`weights`"),
        ({"weights": ["a", 0, 0, 0]}, "`weights`"),
        ({}, "exactly one of `units`, `examples` and `weights`, not 0"),
        ({"units": [0], "examples": [0]}, "exactly one of .* not 2"),
        ({"units": [0], "weights": np.zeros(4)}, "exactly one of .* not 2"),
        ({"units": [0], "degree": 0}, "`degree` is 0: this sketch has degrees 1 to 3"),
        ({"units": [0], "degree": 4}, "`degree`"),
        ({"units": [0], "degree": 1.5}, "`degree`"),
        ({"units": [0], "estimator": "best"}, "`estimator`"),
        ({"units": [0], "estimator": "mean"}, "`estimator='mean'`"),
    ],
)
def test_impossible_deletions_are_refused(arguments, message):
    """Oracle: the argument's name in the message."""
    with pytest.raises(ConfigurationError, match=message):
        Polynomial((3,)).effect(units=UNITS).delete(**arguments)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([[0], [4]], "`units`"),
        ([[0, 0]], "`units`"),
        ([0, 1], "`units`"),
        (np.zeros((2, 3)), r"`weights` has shape \(2, 3\)"),
        (np.zeros(4), "`weights`"),
        (np.array(1.0), "`weights`"),
        (np.full((1, 4), np.nan), "`weights`"),
    ],
)
def test_impossible_lists_of_deletions_are_refused(sets, message):
    """Oracle: the argument's name in the message."""
    with pytest.raises(ConfigurationError, match=message):
        Polynomial((3,)).effect().delete_many(sets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": torch.zeros(3, dtype=torch.int64)}, "`baseline` is torch.int64"),
        ({"baseline": torch.zeros(2)}, "`coefficients` has shape"),
        ({"baseline": torch.tensor([0.0, 0.0, math.nan])}, "holds NaN"),
        ({"coefficients": torch.zeros(3, 2, 3, dtype=torch.complex128)}, "`coefficients` has shape"),
        ({"coefficients": torch.zeros(0, 4, 3, dtype=torch.complex128)}, "`coefficients` has shape"),
        ({"coefficients": torch.full((3, 4, 3), complex(0, math.inf))}, "holds NaN"),
        ({"coefficients": torch.full((3, 4, 3), complex(math.nan, 0))}, "holds NaN"),
        ({"directions": np.full((4, 4), np.nan)}, "holds NaN"),
        ({"directions": np.zeros(4)}, "`directions` has shape"),
        ({"units": np.array([0, 4])}, "`units` must"),
        ({"units": np.array([0.0, 1.0])}, "`units` must"),
    ],
)
def test_an_effect_of_parts_that_do_not_fit_is_refused(change, message):
    """Oracle: the argument's name in the message."""
    good = {
        "baseline": torch.zeros(3),
        "coefficients": torch.zeros(3, 4, 3, dtype=torch.complex128),
        "directions": np.eye(4),
        "units": np.arange(4),
    }
    Effect(**good)
    with pytest.raises(ConfigurationError, match=message):
        Effect(**{**good, **change})


def test_factors_are_made_once_per_order_and_only_when_asked(monkeypatch):
    """Oracle: a count of factorisations."""
    made, factor = [], KernelEstimator._factor
    monkeypatch.setattr(KernelEstimator, "_factor", lambda self, r: made.append(r) or factor(self, r))
    effect = Polynomial((3,)).effect()
    assert made == []
    effect.delete([0], degree=1)
    assert made == [1]
    effect.delete([1])
    effect.delete_many([[0], [2]])
    assert made == [1, 2, 3]


def test_what_directions_hardly_measure_is_not_reliable() -> None:
    """Oracle: a quadratic function with more second order in the deletion than random directions show."""
    n, members = 200, np.arange(20)
    generator = np.random.default_rng(1)
    gradient, noise = 0.003 * generator.normal(size=n), generator.normal(size=(n, n))
    gradient[members] += 0.013
    deleted = np.zeros(n)
    deleted[members] = 1
    hessian = 0.0005 * np.outer(deleted, deleted) + 0.002 * np.eye(n) + 0.00025 * (noise + noise.T)
    psi = make_directions(100, "orthonormal", n, seed=1).array
    coefficients = np.stack([psi @ gradient, np.einsum("ka,ab,kb->k", psi, hessian, psi), np.zeros(100)])
    p = Effect(torch.zeros(()).double(), torch.from_numpy(coefficients), psi, np.arange(n)).delete(members.tolist())
    missed = gradient @ deleted + deleted @ hessian @ deleted - float(p.change)
    assert missed > 10 * float(p.stderr)
    assert not p.reliable
