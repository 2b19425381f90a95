"""The orders left out, on series whose tails are known."""

import math

import numpy as np
import pytest

from lightning_sketch.prediction.tail import resum, tail


def geometric(rng, ratio, degree, outputs, orders=60):
    """Return terms ``ratio^r z_r`` of orders 1 to ``degree`` with independent normal ``z_r``, and the rest's sum."""
    terms = ratio ** np.arange(1, orders + 1)[:, None, None] * rng.standard_normal((orders, 1, outputs))
    return terms[:degree], terms[degree:].sum(axis=0)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("degree", [2, 3, 5])
def test_the_tail_of_a_series_of_random_signs(ratio, degree):
    """Oracle: 20,000 drawn series; the stated deviation is the sum's, and a Gaussian interval covers it."""
    terms, rest = geometric(np.random.default_rng(0), ratio, degree, 20_000)
    deviation, reliable = tail(terms, np.zeros_like(terms), np.ones(20_000))
    assert np.sqrt((deviation**2).mean()) == pytest.approx(np.sqrt((rest**2).mean()), rel=0.05)
    assert 0.85 < (np.abs(rest) < 1.645 * deviation).mean() < 0.93
    gain = math.sqrt(sum(ratio ** (2 * r) for r in range(2, degree + 1)))
    assert reliable.tolist() == [ratio ** (degree + 1) / (1 - ratio) < gain]


def test_the_tail_against_the_formula():
    """Oracle: the definition for one deletion, by hand; the largest ratio counts, and half comes from the profile."""
    terms = np.array([[[3.0, 4.0]], [[1.2, 1.6]], [[0.24, 0.32]]])
    deviation, reliable = tail(terms, np.zeros((3, 1, 2)), np.array([1.0, 1.0]))
    last = np.sqrt((np.array([0.24, 0.32]) ** 2 + 0.4**2 / 2) / 2)
    np.testing.assert_allclose(deviation[0], 0.4 / math.sqrt(1 - 0.4**2) * last, rtol=1e-12)
    assert reliable.all()
    errors = np.zeros((3, 1, 2))
    errors[1] = [[1.2, 1.6]]  # as large as the second term: so are ratio and gain
    deviation, reliable = tail(terms, errors, np.array([1.0, 1.0]))
    ratio = 0.4 * math.sqrt(2)
    np.testing.assert_allclose(deviation[0], ratio / math.sqrt(1 - ratio**2) * last, rtol=1e-12)
    assert reliable.all()
    errors[1] *= 1.4
    assert not tail(terms, errors, np.array([1.0, 1.0]))[1].any()


@pytest.mark.parametrize("ratio", [0.9, 1.0, 3.0])
def test_a_series_that_does_not_converge_is_not_reliable(ratio):
    """Oracle: its ratio; the deviation stays finite and at least twice the last term."""
    terms = ratio ** np.arange(3)[:, None, None] * np.ones((1, 1, 4))
    deviation, reliable = tail(terms, np.zeros_like(terms), np.ones(4))
    assert not reliable.any()
    assert np.isfinite(deviation).all()
    assert (deviation > 2 * terms[-1]).all()


@pytest.mark.parametrize(("last", "expected"), [(0.02, True), (0.04, True), (0.1, False)])
def test_ratios_that_grow_are_taken_to_grow_on(last, expected):
    """Oracle: by hand. Ratios of 0.2, then 0.1, 0.2 or 0.5; only the last grows, to 1.25, where no series converges."""
    terms = np.array([1.0, 0.2, last])[:, None, None] * np.ones((1, 1, 4))
    deviation, reliable = tail(terms, np.zeros_like(terms), np.ones(4))
    assert reliable.tolist() == [expected]
    ratio = max(0.2, last / 0.2)
    np.testing.assert_allclose(deviation[0], ratio / math.sqrt(1 - ratio**2) * last, rtol=1e-12)


def test_terms_that_vanish():
    """Oracle: no deletion has no tail and is reliable; a first order of zero under a second one has no ratio."""
    terms = np.zeros((3, 2, 4))
    terms[1, 1] = 1
    deviation, reliable = tail(terms, np.zeros_like(terms), np.zeros(4))
    assert not deviation[0].any()
    assert reliable.tolist() == [True, False]
    assert tail(np.zeros((2, 3, 0)), np.zeros((2, 3, 0)), np.zeros(0))[0].shape == (3, 0)


def test_one_order_says_nothing_of_the_next():
    """Oracle: the term itself, and no trust."""
    terms = np.array([[[2.0, 2.0], [0.0, 0.0]]])
    deviation, reliable = tail(terms, np.zeros_like(terms), np.ones(2))
    np.testing.assert_allclose(deviation, terms[0])
    assert not reliable.any()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_scale_of_outputs_does_not_matter(scale):
    """Oracle: the same series at scale one; squares of these are beyond float64."""
    terms, _ = geometric(np.random.default_rng(1), 0.3, 3, 5)
    one, many = (
        tail(terms, 0.1 * np.abs(terms), np.ones(5)),
        tail(scale * terms, scale * 0.1 * np.abs(terms), np.ones(5)),
    )
    np.testing.assert_allclose(many[0], scale * one[0], rtol=1e-12)
    np.testing.assert_array_equal(many[1], one[1])


def test_resumming_continues_a_geometric_series():
    """Oracle: ``v / (1 - r z)``: the next order, so that the error falls from ``r^(R+1)`` to ``r^(R+2)``."""
    v = np.random.default_rng(2).standard_normal(50)
    ratios = np.array([0.2, 0.4])
    terms = ratios[:, None] ** np.arange(1, 4)[:, None, None] * v
    reliable = np.array([True, True])
    np.testing.assert_allclose(resum(terms, reliable), ratios[:, None] ** 4 * v, rtol=1e-12)
    np.testing.assert_array_equal(resum(terms, np.array([False, True]))[0], 0)


@pytest.mark.parametrize(("angle", "used"), [(0.4, True), (0.5, False), (math.pi, False)])
def test_resumming_only_terms_of_one_direction(angle, used):
    """Oracle: two terms at an angle, of cosine 0.92, 0.88 and -1; only the projection counts."""
    terms = np.array([[[1.0, 0.0]], [[0.1 * math.cos(angle), 0.1 * math.sin(angle)]]])
    expected = 0.1 * math.cos(angle) * terms[1] if used else np.zeros((1, 2))
    np.testing.assert_allclose(resum(terms, np.array([True])), expected, rtol=1e-12)


def test_nothing_to_resum():
    """Oracle: zeros, for one order, one output, and terms that vanish."""
    assert not resum(np.ones((1, 2, 3)), np.array([True, True])).any()
    assert not resum(np.array([[[1.0]], [[0.1]]]), np.array([True])).any()
    assert not resum(np.zeros((3, 1, 4)), np.array([True])).any()
