"""Losses regressed through their margins, on losses whose margins are known.

The oracles are closed forms, and Taylor coefficients by Cauchy's integral (a Fourier transform over a circle).
"""

import itertools

import numpy as np
import pytest
import torch

from lightning_sketch.directions import make_directions
from lightning_sketch.prediction import Effect
from lightning_sketch.prediction.estimators import KernelEstimator
from lightning_sketch.prediction.estimators.margins import MarginEstimator, Margins, best_of_losses

N, OUTPUTS = 8, 12


def taylor(function, vectors, degree, radius=0.1, points=32):
    """Return the coefficients of ``t -> function(t v)``, orders 1 to ``degree``, ``(R, K, O)``, of every row ``v``."""
    circle = radius * np.exp(2j * np.pi * np.arange(points) / points)
    values = np.stack([function(t * vectors) for t in circle])  # (points, K, O)
    coefficients = np.fft.fft(values, axis=0) / points
    return coefficients[1 : degree + 1] / radius ** np.arange(1, degree + 1)[:, None, None]


def softplus(m):
    """``log(1 + exp(m))``, analytic."""
    return np.log1p(np.exp(m))


class Logistic:
    """Losses ``-log sigmoid(m_0 + W x + (V x)^2)``."""

    def __init__(self, bend, seed=0, scale=0.5):
        rng = np.random.default_rng(seed)
        self.start = rng.normal(1, 1.5, OUTPUTS)
        self.linear = scale * rng.standard_normal((OUTPUTS, N))
        self.square = bend * rng.standard_normal((OUTPUTS, N))

    def __call__(self, x):
        return softplus(-(self.start + x @ self.linear.T + (x @ self.square.T) ** 2))

    @property
    def losses(self):
        return self(np.zeros(N))

    def effect(self, psi, degree, **kwargs):
        coefficients = torch.from_numpy(taylor(self, psi, degree))
        return Effect(torch.from_numpy(self.losses), coefficients, psi, np.arange(N), **kwargs)


@pytest.mark.parametrize("complex_", [True, False])
def test_coefficients_of_margins_and_back(complex_):
    """Oracle: the margin is a polynomial of degree 2, written down; back, the coefficients that were given."""
    logistic, rng = Logistic(0.3), np.random.default_rng(1)
    psi = rng.standard_normal((5, N)) / N + (1j * rng.standard_normal((5, N)) / N if complex_ else 0)
    given = taylor(logistic, psi, 4)
    given = given if complex_ else given.real
    margins = Margins.of(torch.from_numpy(logistic.losses))
    slope = -1 / (1 + np.exp(logistic.start))
    found = margins.of_losses(given)
    expected = np.stack([psi @ logistic.linear.T, (psi @ logistic.square.T) ** 2]) * slope
    np.testing.assert_allclose(found[:2], expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(found[2:], 0, atol=1e-9)
    if not complex_:
        np.testing.assert_allclose(margins.to_losses(found), given, rtol=1e-9, atol=1e-10)


def test_slopes_and_changes():
    """Oracle: the logistic function of the margin along the deletion, its Taylor coefficients and its values."""
    logistic, x = Logistic(0.3), np.random.default_rng(2).standard_normal((3, N)) / N
    margins = Margins.of(torch.from_numpy(logistic.losses))
    slope = -1 / (1 + np.exp(logistic.start))
    terms = np.stack([x @ logistic.linear.T, (x @ logistic.square.T) ** 2, np.zeros((3, OUTPUTS))]) * slope

    def ratio(t):
        return (np.exp(-logistic(t)) - 1) / slope

    expected = np.concatenate([np.ones((1, 3, OUTPUTS)), taylor(ratio, x, 2).real])
    np.testing.assert_allclose(margins.slopes(terms), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(margins.changes(terms.sum(axis=0)), logistic(x) - logistic.losses, rtol=1e-12)


def test_spanned_deletions_are_those_of_the_losses():
    """Oracle: the coefficients along the units themselves, of losses that have nothing to do with margins."""
    rng = np.random.default_rng(3)
    losses, coefficients = rng.uniform(0.01, 3, OUTPUTS), rng.standard_normal((4, N, OUTPUTS)).astype(complex)
    margins = Margins.of(torch.from_numpy(losses))
    kernel = KernelEstimator(np.eye(N, dtype=complex), coefficients)
    estimator = MarginEstimator(kernel.with_higher_orders(margins.of_losses(coefficients)), margins)
    expansion = estimator.expand(np.eye(N), 4)
    np.testing.assert_allclose(expansion.terms, coefficients.real, rtol=1e-8, atol=1e-8)
    np.testing.assert_array_equal(expansion.stderr, 0)


def test_losses_of_linear_margins_need_no_measurement_of_higher_orders():
    """Oracle: the losses themselves at every pair of units, of which no direction measured an interaction."""
    logistic, psi = Logistic(0, scale=0.3), np.eye(N, dtype=complex)
    pairs = np.array([np.eye(N)[[u, v]].sum(axis=0) for u, v in itertools.combinations(range(N), 2)])
    true = logistic(pairs) - logistic.losses
    prediction = logistic.effect(psi, 4, losses=True).delete_many(pairs)
    expected = taylor(logistic, pairs.astype(complex), 4).real
    np.testing.assert_allclose(prediction.by_degree.numpy() - logistic.losses, expected.cumsum(axis=0), atol=1e-6)
    good = prediction.reliable.numpy()
    assert good.mean() > 0.5
    np.testing.assert_allclose((prediction.resummed - prediction.baseline).numpy()[good], true[good], atol=1e-6)
    assert (np.abs(true - prediction.change.numpy()) <= prediction.truncation.numpy() + 1e-6).all()
    plain = logistic.effect(psi, 4).delete_many(pairs)
    assert np.abs(plain.value.numpy() - logistic.losses - expected.sum(axis=0)).max() > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_losses_that_bend_less_than_their_margins_are_regressed_as_they_are(seed):
    """Oracle: losses whose second order is small and random; the same predictions as without margins."""
    rng = np.random.default_rng(seed)
    start, linear = rng.uniform(0.5, 2, OUTPUTS), rng.standard_normal((OUTPUTS, N))
    square = 0.1 * rng.standard_normal((OUTPUTS, N, N))
    psi = make_directions(12, "sphere", N, seed=seed).array
    coefficients = np.stack([psi @ linear.T, np.einsum("ki,oij,kj->ko", psi, square, psi)])
    baseline, x = torch.from_numpy(start), np.eye(N)[:4] + np.eye(N)[4:]
    with_, without = (
        Effect(baseline, torch.from_numpy(coefficients), psi, np.arange(N), losses=losses).delete_many(x)
        for losses in (True, False)
    )
    torch.testing.assert_close(with_.value, without.value, rtol=0, atol=0)
    torch.testing.assert_close(with_.stderr, without.stderr, rtol=0, atol=0)
    torch.testing.assert_close(with_.resummed, without.resummed, rtol=0, atol=0)


def test_standard_errors_of_losses_cover_what_was_not_measured():
    """Oracle: the Taylor sums of 40 x 12 losses whose margins bend; 90 % intervals of the standard error alone."""
    covered, improved = [], []
    for seed in range(40):
        logistic = Logistic(0.4, seed)
        psi = np.concatenate([np.eye(N, dtype=complex), make_directions(6, "sphere", N, seed=seed).array])
        x = np.zeros((6, N))
        for row in x:
            row[np.random.default_rng(seed).choice(N, 3, replace=False)] = 0.5
        expected = taylor(logistic, x.astype(complex), 2).real.sum(axis=0)
        kernel = KernelEstimator(psi, taylor(logistic, psi, 2))
        margins = Margins.of(torch.from_numpy(logistic.losses))
        estimator = MarginEstimator(kernel.with_higher_orders(margins.of_losses(taylor(logistic, psi, 2))), margins)
        expansion = estimator.expand(x, 2)
        error = expansion.terms.sum(axis=0) - expected
        covered.append(np.abs(error) <= 1.645 * expansion.stderr[-1])
        improved.append([np.square(error).sum(), np.square(kernel.expand(x, 2).terms.sum(axis=0) - expected).sum()])
    assert 0.82 < np.mean(covered) < 0.97
    assert np.sum(improved, axis=0)[0] < np.sum(improved, axis=0)[1]


def test_losses_that_are_zero_have_no_margin():
    """Oracle: the same output alone without margins; nothing is infinite."""
    logistic, psi = Logistic(0.3), np.eye(N, dtype=complex)
    losses, coefficients = logistic.losses.copy(), taylor(logistic, psi, 3)
    losses[[0, 5]] = [0.0, 1e-15]
    kernel, margins = KernelEstimator(psi, coefficients), Margins.of(torch.from_numpy(losses))
    assert margins.having.tolist() == [i not in (0, 5) for i in range(OUTPUTS)]
    estimator = best_of_losses(kernel, coefficients, margins)
    assert isinstance(estimator, MarginEstimator)
    x = np.ones((1, N)) / 4
    expansion = estimator.expand(x, 3)
    assert np.isfinite(expansion.terms).all()
    assert np.isfinite(expansion.stderr).all()
    margin_of_nothing = Margins(losses, np.zeros(OUTPUTS, dtype=bool))
    assert best_of_losses(kernel, coefficients, margin_of_nothing) is kernel
    assert not expansion.beyond[:, [0, 5]].any()
    assert Margins.of(torch.tensor([1e-6, 1e-4])).having.tolist() == [False, True]


def test_one_order_does_not_tell_losses_from_margins():
    """Oracle: order 1 is the same, so the plain estimator stays."""
    logistic, psi = Logistic(0.3), np.eye(N, dtype=complex)
    coefficients = taylor(logistic, psi, 1)
    kernel = KernelEstimator(psi, coefficients)
    assert best_of_losses(kernel, coefficients, Margins.of(torch.from_numpy(logistic.losses))) is kernel


def test_losses_that_rounding_keeps_from_coming_back_have_no_margin():
    """Oracle: coefficients whose powers cancel or overflow, of some of the outputs and of all."""
    rng = np.random.default_rng(9)
    losses, psi = rng.uniform(0.1, 3, OUTPUTS), np.eye(N, dtype=complex)
    margins = Margins.of(torch.from_numpy(losses))
    bending = taylor(Logistic(0.3), psi, 3)
    for factor, degree in ((1e200, 3), (1.0, 40)):
        far = np.zeros((degree, N, OUTPUTS), dtype=complex)
        far[:] = factor * rng.standard_normal(far.shape)
        assert not isinstance(best_of_losses(KernelEstimator(psi, far), far, margins), MarginEstimator)
    some = bending.copy()
    some[..., 3] *= 1e200
    logistic = Margins.of(torch.from_numpy(Logistic(0.3).losses))
    estimator = best_of_losses(KernelEstimator(psi, bending), bending, logistic)
    mixed = best_of_losses(KernelEstimator(psi, some), some, logistic)
    assert isinstance(estimator, MarginEstimator)
    assert isinstance(mixed, MarginEstimator)
    assert np.isfinite(mixed.expand(np.eye(N), 3).terms).all()
    np.testing.assert_allclose(mixed.expand(np.eye(N), 3).terms, some.real, rtol=1e-7, atol=1e-9)
