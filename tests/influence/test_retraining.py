"""Predicted deletions against real refits, by scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge
from torch import nn

from lightning_sketch.influence import KernelInfluence

RIDGE = 0.7
N, D, C = 24, 5, 2
GROUP = [2, 3, 11, 17, 20]


def draw(n=N, d=D, c=C):
    generator = np.random.default_rng(0)
    x, x_test = generator.normal(size=(n, d)), generator.normal(size=(9, d))
    y = x @ generator.normal(size=(d, c)) + generator.normal(size=(n, c)) + 1
    return x, y, x_test, generator.uniform(0.5, 2, n)


def tensors(*arrays):
    return tuple(torch.as_tensor(a) for a in arrays)


def linear(fitted):
    """The module that a fitted linear model of scikit-learn is."""
    coefficients = np.atleast_2d(fitted.coef_)
    intercept = not np.isscalar(fitted.intercept_) or fitted.intercept_ != 0
    module = nn.Linear(coefficients.shape[1], len(coefficients), bias=intercept, dtype=torch.float64)
    module.weight.data = torch.as_tensor(coefficients)
    if intercept:
        module.bias.data = torch.as_tensor(np.atleast_1d(fitted.intercept_))
    return module


def influence_of(fitted, x, y, solver, **options):
    module = linear(fitted)
    unpenalized = [name for name, _ in module.named_parameters() if name == "bias"]
    return KernelInfluence.from_module(module, tensors(x, y), unpenalized=unpenalized, solver=solver, **options)


@pytest.mark.parametrize("solver", ["dual", "primal", "matrix_free"])
@pytest.mark.parametrize("intercept", [False, True])
def test_ridge_regression_is_refitted_exactly(intercept, solver):
    """Oracle: ``Ridge`` fitted to what remains: a group, fractions (one negative), every example alone."""
    x, y, x_test, w = draw()

    def fit(weights, rows=slice(None), ridge=RIDGE):
        return Ridge(alpha=ridge, fit_intercept=intercept).fit(x[rows], y[rows], sample_weight=weights[rows])

    fitted = fit(w)
    influence = influence_of(fitted, x, y, solver, loss="squared", ridge=RIDGE, sample_weight=torch.as_tensor(w))
    effect = influence.prepare(torch.as_tensor(x_test))

    def same(prediction, refitted):
        np.testing.assert_allclose(prediction.numpy(), refitted.predict(x_test), rtol=0, atol=1e-8)

    rows = np.delete(np.arange(N), GROUP)
    same(effect.delete(GROUP, mode="exact").value, fit(w, rows))
    changed = influence.parameter_change(influence.delete(GROUP, mode="exact"))
    np.testing.assert_allclose(changed["weight"], fit(w, rows).coef_ - fitted.coef_, rtol=0, atol=1e-8)
    if intercept:
        np.testing.assert_allclose(changed["bias"], fit(w, rows).intercept_ - fitted.intercept_, rtol=0, atol=1e-8)
    fractions = np.zeros(N)
    fractions[:4] = 0.3, 0.9, -1.5, 1
    same(effect.delete(weights=fractions, mode="exact").value, fit(w * (1 - fractions)))
    alone = effect.leave_one_out(mode="exact").value
    for i in range(N):
        same(alone[i], fit(w, np.delete(np.arange(N), i)))

    shared = influence_of(
        fitted,
        x,
        y,
        solver,
        loss="squared",
        ridge=RIDGE / N,
        convention="per_example",
        sample_weight=torch.as_tensor(w),
    ).prepare(torch.as_tensor(x_test))
    kept_ridge = RIDGE * (N - len(GROUP)) / N
    same(shared.delete(GROUP, mode="exact").value, fit(w, rows, kept_ridge))
    same(shared.leave_one_out(mode="exact").value[3], fit(w, np.delete(np.arange(N), 3), RIDGE * (N - 1) / N))


@pytest.mark.parametrize("weighted", [False, True])
def test_leave_one_out_residuals_and_block_formula(weighted):
    """Oracles: ``r_i / (1 - h_i)`` of ordinary least squares' hat matrix, and ``Q_SS^-1 alpha_S``."""
    x, y, _, w = draw()
    w = w if weighted else np.ones(N)
    k = x @ x.T
    q = np.linalg.inv(k + RIDGE * np.diag(1 / w))
    alpha = q @ y
    fitted = torch.as_tensor(k @ alpha)
    influence = KernelInfluence.from_kernel(
        torch.as_tensor(k), fitted, torch.as_tensor(y), loss="squared", ridge=RIDGE, sample_weight=torch.as_tensor(w)
    )
    effect = influence.prepare_kernel(torch.as_tensor(k), fitted)
    hat = np.diag(k @ q)
    alone = effect.leave_one_out(mode="exact").value
    held_out = y - np.stack([alone[i, i] for i in range(N)])
    np.testing.assert_allclose(held_out, (y - fitted.numpy()) / (1 - hat)[:, None], rtol=1e-8)
    np.testing.assert_allclose(influence.diagnostics().leverage, hat, rtol=1e-8)

    inner = np.linalg.inv(q[np.ix_(GROUP, GROUP)]) @ alpha[GROUP]
    np.testing.assert_allclose(y[GROUP] - effect.delete(GROUP).value[GROUP].numpy(), inner, rtol=1e-8)
    removal = influence.delete(GROUP)
    np.testing.assert_allclose(removal.coefficients, -q[:, GROUP] @ inner, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(removal.coefficients[GROUP], -alpha[GROUP], rtol=1e-8)


def test_kernel_ridge_without_parameters_is_refitted_exactly():
    """Oracle: ``KernelRidge`` with an RBF kernel, which no parameters belong to."""
    x, y, x_test, _ = draw()
    kernel = lambda a, b: np.exp(-0.1 * ((a[:, None] - b) ** 2).sum(-1))  # noqa: E731
    fit = lambda rows: KernelRidge(alpha=RIDGE, kernel="precomputed").fit(kernel(x[rows], x[rows]), y[rows])  # noqa: E731
    everything, rows = np.arange(N), np.delete(np.arange(N), GROUP)
    outputs = tensors(fit(everything).predict(kernel(x, x)), fit(everything).predict(kernel(x_test, x)))
    influence = KernelInfluence.from_kernel(
        torch.as_tensor(kernel(x, x)), outputs[0], torch.as_tensor(y), loss="squared", ridge=RIDGE
    )
    effect = influence.prepare_kernel(torch.as_tensor(kernel(x_test, x)), outputs[1])
    refitted = fit(rows).predict(kernel(x_test, x[rows]))
    np.testing.assert_allclose(effect.delete(GROUP, mode="exact").value, refitted, rtol=0, atol=1e-8)


MANY_FEATURES, STRONGER_RIDGE = 40, 8.0


def logistic(x, y, weights):
    model = LogisticRegression(C=1 / STRONGER_RIDGE, solver="newton-cholesky", tol=1e-14, max_iter=200)
    return model.fit(x, y, sample_weight=weights)


def poisson(x, y, weights):
    alpha = STRONGER_RIDGE / weights.sum()  # its loss is the mean over weights
    model = PoissonRegressor(alpha=alpha, solver="newton-cholesky", tol=1e-14, max_iter=200)
    return model.fit(x, y, sample_weight=weights)


def decision(fitted, x):
    return fitted.decision_function(x)


def log_of_mean(fitted, x):
    return x @ fitted.coef_ + fitted.intercept_


CONVEX = {
    "logistic": (logistic, lambda y: (y > 1).astype(float), decision),
    "softmax": (logistic, lambda y: np.digitize(y, [0, 2]), decision),
    "poisson": (poisson, lambda y: np.rint(np.exp(0.5 * y).clip(0, 20)), log_of_mean),
}


@pytest.mark.parametrize("loss", CONVEX)
def test_newton_is_nearer_and_errors_fall_with_the_fraction_removed(loss):
    """Oracle: refits of scikit-learn, intercept included. Both relative errors are linear in small fractions."""
    fit, targets_of, output_of = CONVEX[loss]
    x, y, x_test, _ = draw(n=60, d=MANY_FEATURES, c=1)
    y = targets_of(y[:, 0])
    before = fit(x, y, np.ones(60))
    influence = influence_of(before, x, y, "auto", loss=loss, ridge=STRONGER_RIDGE)
    assert influence.diagnostics().stationarity.stationary
    effect = influence.prepare(torch.as_tensor(x_test))
    errors = {"first_order": [], "newton": []}
    for fraction in (1, 0.2, 0.1, 0.05):
        deleted = np.zeros(60)
        deleted[:8] = fraction
        truth = output_of(fit(x, y, 1 - deleted), x_test) - output_of(before, x_test)
        for mode, found in errors.items():
            change = effect.delete(weights=deleted, mode=mode).change.numpy().reshape(truth.shape)
            found.append(np.linalg.norm(change - truth) / np.linalg.norm(truth))
    for found in errors.values():
        np.testing.assert_allclose(np.divide(found[1:-1], found[2:]), 2, atol=0.15)
    assert (np.array(errors["newton"]) < 0.2 * np.array(errors["first_order"])).all()
