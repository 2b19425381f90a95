"""Influence functions as the prior mean of the kernel estimator."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from lightning_sketch.features import UnitFeatures
from lightning_sketch.prediction.estimators import KernelEstimator
from lightning_sketch.prediction.estimators.grams import Gram, Prior, Vectors
from lightning_sketch.prediction.estimators.priors import Fit
from lightning_sketch.prediction.influence import RIDGES, Influence

N, M = 9, 5


def influence(rng, gradients, points=2, n=N, losses=None, displacements=None):
    """Return influences of units with random gradients at some points."""
    array = rng.standard_normal((points, n, gradients.shape[1])).astype(np.float32)
    losses = rng.random((points, n)).astype(np.float32) if losses is None else np.stack([losses] * points)
    features = UnitFeatures(array, losses, "", 0)
    return Influence(features, gradients, np.zeros((1, gradients.shape[1])) if displacements is None else displacements)


@pytest.mark.parametrize("m", [M, 20])  # fewer and more numbers than units
def test_first_order_terms_are_influence_functions(m):
    """Oracle: the formula with the inverse written out."""
    rng = np.random.default_rng(0)
    ours, x = influence(rng, rng.standard_normal((3, m))), rng.standard_normal((4, N))
    expected = []
    for gradients in ours.features.array.astype(np.float64):
        second_moment = gradients.T @ gradients / N
        mean = np.trace(second_moment)
        for ridge in RIDGES:
            solved = np.linalg.solve(second_moment + ridge * mean / N * np.eye(m), ours.gradients.T)
            expected.append(x @ gradients @ solved / N)
    np.testing.assert_allclose(ours.first(x), expected, rtol=1e-6, atol=1e-9)
    weights = rng.standard_normal(len(expected))
    np.testing.assert_allclose(ours.first_sum(x, weights), np.tensordot(weights, expected, axes=1), rtol=1e-6)
    np.testing.assert_allclose(ours.first(x, slice(None, None, 2)), np.array(expected)[..., ::2], rtol=1e-6, atol=1e-9)


def test_higher_orders_are_those_of_least_squares():
    """Oracle: weighted least squares, solved anew; its terms by interpolation of ``theta(z x)`` on a circle.

    Squared errors ``e^2 / 2`` have the curvature ``1 / e^2`` along their gradient, and ``log(1 + e^2)`` is the minus
    log-likelihood that has it, too.
    """
    rng = np.random.default_rng(1)
    rows, targets = rng.standard_normal((N, 3)), rng.standard_normal(N)

    def solve(weights):
        return np.linalg.solve((rows.T * weights) @ rows, (rows.T * weights) @ targets)

    errors = rows @ solve(np.ones(N)) - targets
    gradients = rows * errors[:, None]
    hessian = rows.T @ rows
    effects = np.linalg.solve(hessian, gradients.T).T  # of units on the parameters, to first order
    own = effects @ gradients.T
    ours = influence(rng, np.eye(3), losses=np.log1p(errors**2))
    scale = np.mean(1 / errors**2)
    x = np.array([0.3, 0, 0.5, 0.1, 0, 0, -0.2, 0, 0.4])
    circle = 0.5 * np.exp(2j * np.pi * np.arange(64) / 64)
    values = np.array([solve(1 - z * x) for z in circle])
    for r in (2, 3, 4):
        exact = np.mean(values * (circle**-r)[:, None], axis=0).real
        found = scale ** (r - 1) * ours.higher(x[None], r, effects, own)[0]
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("probability", [0.2, 0.9, 0.999])
def test_curvature_of_two_classes(probability):
    """Oracle: first and second derivative of ``log(1 + exp(-z))`` by hand; all units alike but one."""
    z = math.log(probability / (1 - probability))
    slope, curvature = probability - 1, probability * (1 - probability)
    losses = np.array([math.log1p(math.exp(-z)), math.log(2.0)])  # the other one has p = 1/2
    ours = influence(np.random.default_rng(0), np.ones((1, M)), n=2, losses=losses.astype(np.float32))
    assert ours.curvatures[0] / ours.curvatures[1] == pytest.approx(curvature / slope**2, rel=1e-4)


def test_losses_without_a_curvature_are_left_out():
    """Oracle: zero; and finite numbers of losses that are 0 or huge."""
    losses = np.array([-1.0, 0.0, 1e-30, 1e4, 0.5], dtype=np.float32)
    curvatures = influence(np.random.default_rng(0), np.ones((1, M)), n=5, losses=losses).curvatures
    assert curvatures[0] == curvatures[1] == 0
    assert np.isfinite(curvatures).all()


def regressed(rng, complex_, r=1):
    """Return a fit with a mean, and the dense Gram matrix, terms and measurements."""
    prior = Prior(0.3, informed=True)
    psi = rng.standard_normal((4, N)) + (1j * rng.standard_normal((4, N)) if complex_ else 0)
    psi /= np.linalg.norm(psi, axis=1)[:, None]
    rows = np.arange(len(psi) * (2 if complex_ else 1))
    y, terms = rng.standard_normal((len(rows), 4)), rng.standard_normal((3, len(rows), 4))
    terms[2] = terms[1] * (1 + 1e-9)  # two that nothing tells apart
    fit = Fit.of(Gram(Vectors(psi), r), prior, rows, rows % len(psi), y, terms)
    stacked = np.concatenate([psi.real, psi.imag]) if complex_ else psi
    gram = stacked @ (np.eye(N) + prior.common * np.ones((N, N))) @ stacked.T
    return fit, gram, terms, y


def explicit_weights(gram, terms, y, scale, sizes):
    """Stack all outputs and the prior of the weights into one least-squares problem."""
    root = np.linalg.inv(np.linalg.cholesky(gram))
    design = np.concatenate([(root @ terms[:, :, o].T) / scale[o] / sizes for o in range(y.shape[1])] + [np.eye(3)])
    right = np.concatenate([root @ y[:, o] / scale[o] for o in range(y.shape[1])] + [np.zeros(3)])
    return np.linalg.lstsq(design, right, rcond=None)[0] / sizes


@pytest.mark.parametrize("complex_", [True, False])
def test_weights_and_held_out_density_against_refits(complex_):
    """Oracle: dense least squares; each direction given all others, with the weights that those give."""
    fit, gram, terms, y = regressed(np.random.default_rng(3), complex_)
    solved = np.linalg.solve(gram, y)
    scale = np.sqrt(np.einsum("po,po->o", y, solved) / len(y))
    whitened = [np.einsum("po,po->o", t, np.linalg.solve(gram, t)) / scale**2 for t in terms]
    sizes = np.sqrt(np.sum(whitened, axis=1) / y.size)
    weights = explicit_weights(gram, terms, y, scale, sizes)
    np.testing.assert_allclose(fit.regression.weights, weights, rtol=1e-6, atol=1e-9)
    left = y - np.tensordot(weights, terms, axes=1)
    variance = np.einsum("po,po->o", left, np.linalg.solve(gram, left)) / len(y)
    density = 0.0
    for j in range(4):
        out = fit.direction == j
        refit = explicit_weights(gram[np.ix_(~out, ~out)], terms[:, ~out], y[~out], scale, sizes)
        left = y - np.tensordot(refit, terms, axes=1)
        across = np.linalg.solve(gram[np.ix_(~out, ~out)], gram[np.ix_(~out, out)])
        covariance = gram[np.ix_(out, out)] - gram[np.ix_(out, ~out)] @ across
        for o in range(y.shape[1]):
            density += multivariate_normal(across.T @ left[~out, o], variance[o] * covariance).logpdf(left[out, o])
    constant = -y.size * math.log(2 * math.pi) / 2
    assert fit.held_out_density() + constant == pytest.approx(density, rel=1e-6)


@pytest.mark.parametrize("complex_", [True, False])
@pytest.mark.parametrize("say", [True, False])
def test_kernel_believes_in_influences_that_predict_held_out_directions(say, complex_):
    """Oracle: true effects that are an influence function and a little noise, or have nothing to do with it."""
    rng = np.random.default_rng(4)
    n, m, count = 60, 50, 20 if complex_ else 40
    psi = rng.standard_normal((count, n)) + (1j * rng.standard_normal((count, n)) if complex_ else 0)
    psi = psi.astype(np.complex128)
    ours = influence(rng, rng.standard_normal((8, m)), n=n)
    true = ours.first(np.eye(n))[3] if say else rng.standard_normal((n, 8))
    true = true / true.std() + 0.05 * rng.standard_normal(true.shape)
    kernel = KernelEstimator(psi, (psi @ true)[None], None, ours)
    plain = KernelEstimator(psi, (psi @ true)[None])
    x = (rng.random((30, n)) < 0.2).astype(np.float64)
    (found, stderr), (before, _) = kernel(x, 1), plain(x, 1)
    error, without = (np.linalg.norm(t[0] - x @ true) / np.linalg.norm(x @ true) for t in (found, before))
    assert kernel._order(1).prior.informed is say
    if say:
        assert error < 0.08 < 0.5 < without
        covered = np.abs(found[0] - x @ true) <= 1.645 * stderr
        assert 0.8 < covered.mean() < 0.97
    else:
        assert error == pytest.approx(without)


def test_few_measurements_take_few_points_or_leave_the_mean_at_zero():
    """Oracle: estimators with the last point alone, and without, on effects that are an influence function there.

    A point has five weights, which want 15 measurements.
    """
    rng = np.random.default_rng(6)
    ours = influence(rng, rng.standard_normal((8, 50)), n=60)
    features = ours.features
    last = replace(ours, features=UnitFeatures(features.array[1:], features.losses[1:], "", 0))
    true = ours.first(np.eye(60))[8]
    psi, x = rng.standard_normal((30, 60)).astype(np.complex128), np.eye(60)

    def estimator(count, given):
        return KernelEstimator(psi[:count], (psi[:count] @ true)[None], None, given)

    assert len(estimator(30, ours)._order(1).choice.weights) == 10
    assert len(estimator(29, ours)._order(1).choice.weights) == 5
    np.testing.assert_array_equal(estimator(29, ours)(x, 1)[0], estimator(29, last)(x, 1)[0])
    np.testing.assert_array_equal(estimator(14, ours)(x, 1)[0], estimator(14, None)(x, 1)[0])


@pytest.mark.parametrize(
    ("count", "points"), [(1, [3]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_points_are_taken_evenly(count, points):
    """Oracle: the terms of all points, of which these are kept; the last is always among them."""
    rng = np.random.default_rng(7)
    ours, x = influence(rng, rng.standard_normal((3, M)), points=4), rng.standard_normal((4, N))
    terms = ours.first(x).reshape(4, len(RIDGES), 4, 3)
    np.testing.assert_array_equal(ours.at_points(count).first(x), terms[points].reshape(-1, 4, 3))


def test_orders_of_least_squares_are_found_from_the_first_order():
    """Oracle: the changes of weighted least squares, solved anew, of which order 2 is measured along few directions."""
    rng = np.random.default_rng(5)
    n, m = 40, 4
    rows, targets = rng.standard_normal((n, m)), rng.standard_normal(n)

    def solve(weights):
        return np.linalg.solve((rows.T * weights) @ rows, (rows.T * weights) @ targets)

    errors = rows @ solve(np.ones(n)) - targets
    gradients = rows * errors[:, None]
    effects = np.linalg.solve(rows.T @ rows, gradients.T).T
    psi = np.concatenate([np.eye(n), rng.standard_normal((3, n)) / math.sqrt(n)]).astype(np.complex128)
    circle = 0.05 * np.exp(2j * np.pi * np.arange(16) / 16)
    values = np.array([[solve(1 - z * p) for z in circle] for p in psi.real])
    coefficients = np.stack([np.mean(values * (circle**-r)[:, None], axis=1).real for r in (1, 2, 3)])
    features = UnitFeatures(gradients[None].astype(np.float32), np.log1p(errors**2)[None].astype(np.float32), "", 0)
    ours = Influence(features, np.eye(m), psi.real @ effects)
    kernel = KernelEstimator(psi, coefficients.astype(np.complex128), None, ours)
    x = np.zeros((20, n))
    for row in x:
        row[rng.choice(n, 3, replace=False)] = 1
    expansion = kernel.expand(x, 3)
    terms, stderr = expansion.terms, expansion.stderr
    true = np.array([solve(1 - row) for row in x]) - solve(np.ones(n))
    error = [np.linalg.norm(terms[:d].sum(axis=0) - true) / np.linalg.norm(true) for d in (1, 2, 3)]
    plain = KernelEstimator(psi, coefficients.astype(np.complex128)).expand(x, 3).terms.sum(axis=0)
    assert error[2] < error[1] / 2 < error[0] / 4
    assert error[2] < 0.3 * np.linalg.norm(plain - true) / np.linalg.norm(true)
    assert kernel._order(2).prior.informed
    parts = [kernel._term(x / math.sqrt(3), np.full((20, 1), math.sqrt(3)), r)[1] for r in (1, 2, 3)]
    np.testing.assert_allclose(stderr[1], np.hypot(parts[0], parts[1]), rtol=1e-10)
