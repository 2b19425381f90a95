"""Estimators of Taylor terms, on polynomials whose symmetric tensors are known.

``f(x) = sum_r <F_r, x^(x r)>`` with random symmetric ``F_r``; coefficients contract ``F_r`` with each direction.
"""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from lightning_sketch.directions import make_directions
from lightning_sketch.errors import ConfigurationError
from lightning_sketch.prediction import estimators
from lightning_sketch.prediction.estimators import (
    KernelEstimator,
    MeanEstimator,
    MedianOfMeansEstimator,
    make_estimator,
    priors,
)
from lightning_sketch.prediction.estimators.grams import Gram, Prior, Vectors, independent_rows
from lightning_sketch.prediction.estimators.priors import Fit

N = 6


def symmetric_tensors(rng, num_outputs, degree=3, n=N, root=None):
    """Draw ``F_r``, ``(O, n, .., n)``, with the prior ``cov(<F, u^r>, <F, v^r>) = (u . M v)^r``, ``root^2 = M``."""
    tensors = []
    for r in range(1, degree + 1):
        raw = rng.standard_normal((num_outputs, *[n] * r))
        orders = list(itertools.permutations(range(1, r + 1)))
        tensor = sum(raw.transpose(0, *order) for order in orders) / len(orders)
        for axis in range(1, r + 1) if root is not None else ():
            tensor = np.moveaxis(np.tensordot(tensor, root, axes=(axis, 0)), -1, axis)
        tensors.append(tensor)
    return tensors


def contract(tensors, vectors):
    """Return ``<F_r, v^(x r)>``, ``(R, K, O)``, of every row ``v``."""
    result = np.empty((len(tensors), len(vectors), len(tensors[0])), dtype=np.result_type(vectors))
    for r, tensor in enumerate(tensors):
        for k, vector in enumerate(vectors):
            value = tensor
            for _ in range(r + 1):
                value = value @ vector
            result[r, k] = value
    return result


def common_root(a, n=N):
    """Return the symmetric square root of ``I + a 1 1^T``."""
    ones = np.ones((n, n)) / n
    return np.eye(n) + (math.sqrt(1 + a * n) - 1) * ones


def draw(design, count, seed=0, sets=None, n=N):
    return make_directions(count, design, n, seed=seed, deletion_sets=sets).array


def deletions(rng, count, n=N):
    return (rng.random((count, n)) < 0.5).astype(float)


# --- mean ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 3])
def test_sphere_moment_identity(r):
    """Oracle: permutations; ``E[psi^r conj(psi)^r]`` is the projector on Sym^r over ``C(n+r-1, r)``, entry by entry."""
    n = 3
    psi = draw("sphere", 60_000, seed=3, n=n)
    for left in itertools.combinations_with_replacement(range(n), r):
        for right in itertools.combinations_with_replacement(range(n), r):
            sample = np.mean(np.prod(psi[:, left], axis=1) * np.prod(psi[:, right].conj(), axis=1))
            matches = sum(left == tuple(p) for p in itertools.permutations(right))
            expected = matches / math.factorial(r) / math.comb(n + r - 1, r)
            assert abs(sample - expected) < 0.006


@pytest.mark.parametrize("design", ["sphere", "orthonormal"])
def test_mean_is_unbiased(design):
    """Oracle: the true terms; 30,000 directions must come within four standard errors, order by order."""
    rng = np.random.default_rng(1)
    tensors, x = symmetric_tensors(rng, 4), np.array([[1.0, 0, 1, 0.5, 0, -1]])
    psi = draw(design, 30_000, seed=2)
    coefficients = contract(tensors, psi)
    truth = contract(tensors, x)
    terms, stderr = MeanEstimator(psi, coefficients)(x, 3)
    assert (np.abs(terms.sum(0) - truth.sum(0)) < 4 * stderr).all()
    for r in range(3):  # each order alone, so that errors of two orders can not cancel
        e = math.comb(N + r, r + 1) * np.real(coefficients[r] * np.conj(psi @ x[0])[:, None] ** (r + 1))
        assert (np.abs(terms[r, 0] - truth[r, 0]) < 4 * e.std(axis=0) / math.sqrt(len(psi))).all()
        np.testing.assert_allclose(terms[r, 0], e.mean(axis=0), rtol=1e-10)
    relative = np.linalg.norm(terms - truth) / np.linalg.norm(truth)
    assert relative < 0.2  # so that the standard errors above are not merely wide


def test_mean_of_high_orders_of_many_units():
    """Oracle: the definition by a recurrence; the binomial of order 100 alone is beyond float64."""
    n, degree = 200_000, 100
    psi = draw("sphere", 2, n=n)
    x = np.zeros((1, n))
    x[0, :300] = 1
    coefficients = np.exp(1j * np.arange(2 * degree).reshape(degree, 2, 1)) * 2.0 ** -np.arange(degree)[:, None, None]
    terms, _ = MeanEstimator(psi, coefficients)(x, degree)
    product = np.ones(2, dtype=complex)
    for r in range(1, degree + 1):
        product = product * (psi @ x[0]) * ((n + r - 1) / r)
        expected = (coefficients[r - 1, :, 0] * product.conj()).real
        assert abs(terms[r - 1, 0, 0] - expected.mean()) < 1e-12 * abs(product).max() * 2.0 ** (1 - r), r


def test_mean_standard_error_counts_the_correlation_of_orders():
    """Oracle: the spread of 1,500 independent sketches; orders added in squares would give 0.8 of it."""
    rng = np.random.default_rng(2)
    x = np.array([[1.0, 1, 0, 0, 0, 0]])
    slope = x + 0.1 * rng.standard_normal((1, N))
    tensors = [slope, np.einsum("oi,oj->oij", slope, slope) / 2]
    values, stated, in_squares = [], [], []
    for seed in range(1500):
        psi = draw("sphere", 40, seed=seed)
        coefficients = np.stack([(psi @ slope.T), (psi @ slope.T) ** 2 / 2])
        estimator = MeanEstimator(psi, coefficients)
        terms, stderr = estimator(x, 2)
        values.append(terms.sum())
        stated.append(stderr.item() ** 2)
        first = estimator(x, 1)[1].item()
        second = MeanEstimator(psi, coefficients * [[[0]], [[1]]])(x, 2)[1].item()
        in_squares.append(first**2 + second**2)
    truth = contract(tensors, x).sum()
    assert abs(np.mean(values) - truth) < 4 * np.std(values) / math.sqrt(len(values))
    assert math.sqrt(np.mean(stated)) == pytest.approx(np.std(values), rel=0.06)
    assert math.sqrt(np.mean(in_squares)) < 0.85 * np.std(values)


# --- median of means -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "groups"), [(10, 5), (112, 56), (560, 56)])
def test_median_of_means_against_the_definition(count, groups):
    """Oracle: reshaping the samples into groups, numpy's median, and the stated formula of the standard error."""
    rng = np.random.default_rng(3)
    tensors, x = symmetric_tensors(rng, 3, degree=2), deletions(rng, 2)
    psi = draw("sphere", count)
    coefficients = contract(tensors, psi)
    terms, stderr = MedianOfMeansEstimator(psi, coefficients)(x, 2)
    for row in range(2):
        q = (psi @ x[row])[:, None]
        e = np.stack([N * (coefficients[0] * q.conj()).real, N * (N + 1) / 2 * (coefficients[1] * q.conj() ** 2).real])
        means = e.reshape(2, groups, -1, 3).mean(axis=2)
        np.testing.assert_allclose(terms[:, row], np.median(means, axis=1), rtol=1e-10)
        spread = means.sum(axis=0).std(axis=0, ddof=1)
        np.testing.assert_allclose(stderr[row], math.sqrt(math.pi / 2 / groups) * spread, rtol=1e-10)


def test_median_of_means_withstands_heavy_tails():
    """Oracle: the true value; the mean, on the same directions of which 8 in 4,000 are wild, is far from it."""
    rng = np.random.default_rng(4)
    tensors, x = symmetric_tensors(rng, 20, degree=1), np.ones((1, N))
    psi = draw("sphere", 4000)
    coefficients = contract(tensors, psi)
    coefficients[:, ::500] += 1e5 * psi[::500].sum(axis=1)[None, :, None]
    truth = contract(tensors, x)[0, 0]
    robust = MedianOfMeansEstimator(psi, coefficients)(x, 1)[0][0, 0]
    plain = MeanEstimator(psi, coefficients)(x, 1)[0][0, 0]
    assert np.abs(robust - truth).max() < 1.0 < 100 < np.abs(plain - truth).min()


def test_median_of_means_takes_its_failure_probability():
    """Oracle: ``ceil(8 ln(1/delta))`` groups of equal size, numpy's median."""
    rng = np.random.default_rng(19)
    tensors, x = symmetric_tensors(rng, 3, degree=1), deletions(rng, 1)
    groups = math.ceil(8 * math.log(1 / 0.1))  # 19
    psi = draw("sphere", 10 * groups)
    coefficients = contract(tensors, psi)
    terms, _ = make_estimator("median_of_means", psi, coefficients, 0.1)(x, 1)
    e = N * (coefficients[0] * (psi @ x[0])[:, None].conj()).real
    np.testing.assert_allclose(terms[0, 0], np.median(e.reshape(groups, 10, 3).mean(axis=1), axis=0), rtol=1e-10)
    for wrong in (0, 1, -0.1, math.nan):
        with pytest.raises(ConfigurationError, match="`failure_probability`"):
            make_estimator("median_of_means", psi, coefficients, wrong)


# --- kernel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", ["sphere", "orthonormal", "sphere+common", "basis+sphere+common"])
def test_kernel_is_exact_where_directions_span_everything(design):
    """Oracle: the polynomial; 40 complex directions determine Sym^3 of R^6, of 56 dimensions: no error bar."""
    rng = np.random.default_rng(5)
    tensors, x = symmetric_tensors(rng, 5), np.concatenate([deletions(rng, 10), rng.standard_normal((10, N))])
    psi = draw(design, 40)
    terms, stderr = KernelEstimator(psi, contract(tensors, psi))(x, 3)
    truth = contract(tensors, x)
    np.testing.assert_allclose(terms, truth, atol=1e-9 * np.abs(truth).max())
    assert stderr.max() < 1e-5 * np.abs(truth).max()


def test_kernel_is_exact_on_what_was_measured_though_not_all_was():
    """Oracle: the polynomial, on the design's deletions and on first order, though 50 units need 22,100 numbers."""
    rng, n = np.random.default_rng(6), 50
    features = rng.standard_normal((30, n)) / math.sqrt(n)

    def truth(vectors, r):
        return (vectors @ features.T) ** r

    psi = draw("basis+indicator+common", 1, sets=[[3, 17], list(range(12))], n=n)
    x = np.zeros((n + 2, n))
    x[:n], x[n, [3, 17]], x[n + 1, :12] = np.eye(n), 1, 1
    estimator = KernelEstimator(psi, np.stack([truth(psi, r) for r in (1, 2, 3)]))
    terms, stderr = estimator(x, 3)
    for r in (1, 2, 3):
        np.testing.assert_allclose(terms[r - 1], truth(x, r), atol=1e-10)
    assert stderr.max() < 1e-5
    random = deletions(rng, 20, n)
    first, first_stderr = estimator(random, 1)
    np.testing.assert_allclose(first[0], truth(random, 1), atol=1e-10)
    assert first_stderr.max() < 1e-5
    assert estimator(random, 2)[1].min() > 1e-3


def fix_prior(monkeypatch, prior):
    """Leave the estimator one prior to choose from."""
    for name, weight in (
        ("COMMON_MODE_GRID", prior.common),
        ("DIAGONAL_GRID", prior.diagonal),
        ("EFFECTS_GRID", prior.effects),
    ):
        monkeypatch.setattr(priors, name, (weight,))


def unit_sizes(effects):
    """Return the diagonal of ``S``: root mean squares of effects, of which 32 more are as large as the mean."""
    return np.sqrt((effects.shape[1] * np.square(effects).sum(axis=1) + 32) / (effects.shape[1] + 32))


def explicit_features(vectors, r, prior, effects):
    """Return features with ``phi(u) . phi(v) = (u . M v)^r + b sum_i (s_i^2 u_i v_i)^r``: monomials, and powers."""
    n = vectors.shape[1]
    sizes = unit_sizes(effects) if r > 1 else np.ones(n)
    m = np.diag(sizes) @ (np.eye(n) + prior.common * np.ones((n, n))) @ np.diag(sizes)
    m = m + (prior.effects * effects @ effects.T if r > 1 else 0)
    values, rotation = np.linalg.eigh(m / (1 + prior.common + (prior.effects if r > 1 else 0)))
    rotated = vectors @ rotation * np.sqrt(values)
    columns = []
    for index in itertools.combinations_with_replacement(range(n), r):
        counts = np.bincount(index, minlength=n)
        multinomial = math.factorial(r) / math.prod(math.factorial(c) for c in counts)
        columns.append(math.sqrt(multinomial) * np.prod(rotated[:, list(index)], axis=1))
    if r > 1:
        columns += list(math.sqrt(prior.diagonal) * (vectors * sizes).T ** r)
    return np.stack(columns, axis=1)


def explicit_gp(psi, coefficients, x, r, prior, effects=None):
    """Return term, standard error and log likelihood of one order by regression on explicit features."""
    features = explicit_features(psi, r, prior, effects if effects is not None else np.zeros((psi.shape[1], 1)))
    design = np.concatenate([features.real, features.imag])
    y = np.concatenate([coefficients.real, coefficients.imag])
    u, s, vt = np.linalg.svd(design, full_matrices=False)
    rank = int((s > 1e-9 * s[0]).sum())
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    whitened = (u.T @ y) / s[:, None]
    variance = (whitened**2).mean(axis=0)
    phi = explicit_features(x, r, prior, effects if effects is not None else np.zeros((psi.shape[1], 1)))
    left = (phi**2).sum(axis=1) - ((phi @ vt.T) ** 2).sum(axis=1)
    likelihood = -rank / 2 * np.log(variance).sum() - y.shape[1] * np.log(s).sum()
    return phi @ vt.T @ whitened, np.sqrt(np.maximum(left, 0)[:, None] * variance), likelihood


PRIORS = [Prior(), Prior(0.3), Prior(0.3, 3.0), Prior(0.1, 2.0, 5.0)]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(
    ("design", "count"), [("sphere", 5), ("basis", 1), ("basis+common", 1), ("sphere+basis", 4), ("common", 1)]
)
def test_kernel_equals_a_gaussian_process_in_the_explicit_feature_space(monkeypatch, design, count, prior):
    """Oracle: pseudo-inverse regression on explicit features; terms and standard errors, prior fixed."""
    fix_prior(monkeypatch, prior)
    rng = np.random.default_rng(7)
    tensors, x = symmetric_tensors(rng, 3), rng.standard_normal((4, N))
    psi = draw(design, count)
    coefficients = contract(tensors, psi)
    expansion = KernelEstimator(psi, coefficients).expand(x, 3)
    terms, stderr = expansion.terms, expansion.stderr
    effects = explicit_gp(psi, coefficients[0], np.eye(N), 1, prior)[0]
    effects *= math.sqrt(N / effects.shape[1]) / np.linalg.norm(effects, axis=0)
    expected = [explicit_gp(psi, coefficients[r - 1], x, r, prior, effects) for r in (1, 2, 3)]
    np.testing.assert_allclose(terms, [e[0] for e in expected], atol=1e-9)
    np.testing.assert_allclose(stderr, np.cumsum([e[1] for e in expected], axis=0), rtol=1e-5, atol=1e-5)
    assert stderr[-1].max() > 0.1


def fits(psi, coefficients, r, prior, effects=None):
    """Return a ``Fit`` on the independent measurements of an order, and their rows."""
    scale = unit_sizes(effects) if r > 1 else None
    gram = Gram(Vectors(psi, {} if effects is None else {"effects": effects}, scale), r)
    rows = independent_rows(gram, Prior())[0]
    y = np.concatenate([coefficients[r - 1].real, coefficients[r - 1].imag])[rows]
    return Fit.of(gram, prior, rows, rows % len(psi), y), rows, y


@pytest.mark.parametrize("design", ["sphere", "sphere+basis"])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_likelihood_against_the_explicit_feature_space(design, r):
    """Oracle: the likelihood of regression on explicit features; differences, for constants are left out."""
    rng = np.random.default_rng(8)
    effects = rng.standard_normal((N, 4)) / 2
    psi = draw(design, 5)
    coefficients = contract(symmetric_tensors(rng, 6), psi)
    ours = [fits(psi, coefficients, r, prior, effects)[0].likelihood for prior in PRIORS[: 2 if r == 1 else 4]]
    explicit = [explicit_gp(psi, coefficients[r - 1], np.eye(N), r, prior, effects)[2] for prior in PRIORS[: len(ours)]]
    np.testing.assert_allclose(np.diff(ours), np.diff(explicit), rtol=1e-6, atol=1e-6)
    assert np.abs(np.diff(ours)).min() > 0.01


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("design", ["sphere", "sphere+basis"])
def test_held_out_density_against_refits(design, prior):
    """Oracle: each direction's measurements conditioned on all others, one dense Gaussian after the other."""
    rng = np.random.default_rng(20)
    effects = rng.standard_normal((N, 4)) / 2
    psi = draw(design, 5)
    coefficients = contract(symmetric_tensors(rng, 3), psi)
    fit, rows, y = fits(psi, coefficients, 2, prior, effects)
    features = explicit_features(psi, 2, prior, effects)
    features = np.concatenate([features.real, features.imag])[rows]
    gram = features @ features.T
    scale = np.einsum("po,po->o", y, np.linalg.solve(gram, y)) / len(y)
    density = 0.0
    for j in range(len(psi)):
        left_out = rows % len(psi) == j
        weights = np.linalg.solve(gram[np.ix_(~left_out, ~left_out)], gram[np.ix_(~left_out, left_out)])
        covariance = gram[np.ix_(left_out, left_out)] - gram[np.ix_(left_out, ~left_out)] @ weights
        for o in range(y.shape[1]):
            mean = weights.T @ y[~left_out, o]
            density += multivariate_normal(mean, scale[o] * covariance).logpdf(y[left_out, o])
    constant = -y.size * math.log(2 * math.pi) / 2
    assert fit.held_out_density() + constant == pytest.approx(density, rel=1e-8)


@pytest.mark.parametrize(
    ("design", "seed", "outlier"),
    [(design, seed, 1) for design in ("sphere", "basis+sphere") for seed in range(4)]
    + [("sphere", 1, 10), ("sphere", 5, 10)],  # where the richest kind has the higher likelihood, but predicts worse
)
def test_kernel_chooses_its_prior_as_it_says(monkeypatch, design, seed, outlier):
    """Oracle: the likelihoods of all priors of small grids in the explicit feature space, and the held-out density."""
    grids = {"COMMON_MODE_GRID": (0.0, 1.0), "DIAGONAL_GRID": (0.0, 10.0), "EFFECTS_GRID": (0.0, 3.0)}
    for name, grid in grids.items():
        monkeypatch.setattr(priors, name, grid)
    rng = np.random.default_rng(30 + seed)
    a, b = (float(seed % 2), 5.0 * seed) if outlier == 1 else (0.0, 0.0)
    tensors = with_diagonal(symmetric_tensors(rng, 8, degree=2, root=common_root(a)), rng, b)
    psi = draw(design, 6)
    psi = psi / np.linalg.norm(psi, axis=1, keepdims=True)
    coefficients = contract(tensors, psi)
    coefficients[1, 0] *= outlier
    estimator = KernelEstimator(psi, coefficients)
    chosen = estimator._order(2).prior
    effects = estimator._maps["effects"]
    best_of_kinds = []
    for kind in (1, 2, 3):
        weights = itertools.product(*[grid if i < kind else (0.0,) for i, grid in enumerate(grids.values())])
        candidates = [Prior(*w) for w in weights]
        likelihoods = [explicit_gp(psi, coefficients[1], np.eye(N), 2, prior, effects)[2] for prior in candidates]
        best_of_kinds.append(candidates[int(np.argmax(likelihoods))])
    densities = [fits(psi, coefficients, 2, prior, effects)[0].held_out_density() for prior in best_of_kinds]
    assert chosen == best_of_kinds[int(np.argmax(densities))]
    assert estimator.density(2) == pytest.approx(max(densities) / 8, rel=1e-9)
    if outlier > 1:
        assert chosen != best_of_kinds[-1]


def with_diagonal(tensors, rng, weight):
    """Add ``sqrt(weight) z`` to the entries ``F_r[u, .., u]`` of orders above the first."""
    for r, tensor in enumerate(tensors[1:], start=2):
        for unit in range(N):
            tensor[(slice(None), *[unit] * r)] += math.sqrt(weight) * rng.standard_normal(len(tensor))
    return tensors


@pytest.mark.parametrize("design", ["sphere", "sphere+common"])
def test_kernel_finds_what_units_do_by_themselves(monkeypatch, design):
    """Oracle: tensors with a strong diagonal; without it in the prior, errors are larger and bars too short."""
    rng = np.random.default_rng(21)
    tensors = with_diagonal(symmetric_tensors(rng, 60), rng, 30.0)
    psi = draw(design, 7)
    coefficients, truth = contract(tensors, psi), contract(tensors, np.eye(N)).sum(axis=0)
    ours = KernelEstimator(psi, coefficients)
    terms, stderr = ours(np.eye(N), 3)
    assert ours._order(2).prior.diagonal >= 3
    monkeypatch.setattr(priors, "DIAGONAL_GRID", (0.0,))
    without, short = KernelEstimator(psi, coefficients)(np.eye(N), 3)
    error, error_without = np.linalg.norm(terms.sum(0) - truth), np.linalg.norm(without.sum(0) - truth)
    assert error < 0.8 * error_without
    assert error_without > 1.3 * np.linalg.norm(short)
    assert error == pytest.approx(np.linalg.norm(stderr), rel=0.4)


@pytest.mark.parametrize("outputs", [1, 3])
def test_kernel_finds_that_units_of_like_effects_interact(monkeypatch, outputs):
    """Oracle: ``f_o(x) = h(v_o . x)``, whose every order follows the first; without it in the prior, worse by far."""
    rng, n = np.random.default_rng(22), 20
    slopes = rng.standard_normal((outputs, n)) / math.sqrt(n)
    psi = draw("basis+common", 1, n=n)

    def truth(vectors):
        return np.stack([(vectors @ slopes.T) ** r for r in (1, 2, 3)])

    x = deletions(rng, 30, n)
    estimator = KernelEstimator(psi, truth(psi))
    error = np.linalg.norm((estimator(x, 3)[0] - truth(x))[1])
    assert estimator._order(2).prior.effects > 0
    monkeypatch.setattr(priors, "EFFECTS_GRID", (0.0,))
    assert error < 0.5 * np.linalg.norm((KernelEstimator(psi, truth(psi))(x, 3)[0] - truth(x))[1])


def test_kernel_does_not_believe_in_effects_that_say_nothing():
    """Oracle: the errors of the isotropic prior, under which these tensors were drawn."""
    rng, n = np.random.default_rng(23), 12
    tensors = symmetric_tensors(rng, 40, degree=2, n=n)
    psi, x = draw("sphere", 20, n=n), deletions(rng, 20, n)
    coefficients, truth = contract(tensors, psi), contract(tensors, x)
    chosen = KernelEstimator(psi, coefficients)
    error = np.linalg.norm(chosen(x, 2)[0] - truth)
    with pytest.MonkeyPatch.context() as patch:
        fix_prior(patch, Prior())
        isotropic = np.linalg.norm(KernelEstimator(psi, coefficients)(x, 2)[0] - truth)
    assert error < 1.1 * isotropic


def test_the_right_prior_narrows_the_error_bars(monkeypatch):
    """Oracle: the isotropic prior's bars; with much common mode in the truth they are too wide."""
    rng = np.random.default_rng(9)
    tensors, x = symmetric_tensors(rng, 40, root=common_root(3.0)), deletions(rng, 30)
    psi = draw("basis+common", 1)
    coefficients = contract(tensors, psi)
    chosen = KernelEstimator(psi, coefficients)
    narrow = np.median(chosen(x, 3)[1])
    fix_prior(monkeypatch, Prior())
    assert narrow < 0.8 * np.median(KernelEstimator(psi, coefficients)(x, 3)[1])


@pytest.mark.parametrize(
    ("design", "count", "a", "b"),
    [("sphere", 8, 0.0, 0.0), ("sphere", 8, 1.0, 0.0), ("basis+common", 1, 0.3, 0.0), ("sphere", 8, 0.3, 10.0)],
)
@pytest.mark.parametrize("r", [2, 3])
def test_kernel_error_bars_are_calibrated(design, count, a, b, r):
    """Oracle: 3,000 functions drawn from the prior; error over standard error of each order has unit variance."""
    rng = np.random.default_rng(10)
    tensors = with_diagonal(symmetric_tensors(rng, 3000, root=common_root(a)), rng, b * (1 + a) ** r)
    x = np.concatenate([deletions(rng, 4), rng.standard_normal((4, N))])
    psi = draw(design, count)
    expansion = KernelEstimator(psi, contract(tensors, psi)).expand(x, r)
    terms, stderr = expansion.terms, expansion.stderr
    errors, bars = (terms - contract(tensors, x)[:r])[-1], np.diff(stderr, axis=0)[-1]
    informative = bars.mean(axis=1) > 1e-3
    assert informative.sum() >= 5
    z = (errors / np.where(bars > 0, bars, 1))[informative]
    assert np.sqrt((z**2).mean()) == pytest.approx(1, abs=0.12)
    assert 0.92 < (np.abs(z) < 1.96).mean() < 0.97


def test_standard_errors_of_orders_are_added():
    """Oracle: the bars of one order alone, the other's coefficients being zero."""
    rng = np.random.default_rng(24)
    psi, x = draw("sphere", 8), deletions(rng, 5)
    coefficients = contract(symmetric_tensors(rng, 4), psi)
    both = KernelEstimator(psi, coefficients)
    alone = np.diff(both.expand(x, 3).stderr, axis=0, prepend=0)
    np.testing.assert_allclose(both(x, 3)[1], alone.sum(axis=0), rtol=1e-12)
    second = KernelEstimator(psi, coefficients * np.array([1, 1, 0])[:, None, None])(x, 3)[1]
    np.testing.assert_allclose(second, alone[:2].sum(axis=0), rtol=1e-12)
    assert alone[1:].min() > 0


@pytest.mark.parametrize("design", ["indicator", "indicator+basis", "indicator+sphere"])
def test_high_orders_of_large_sets(design):
    """Oracle: the coefficients along the set itself; ``(psi . psi)^r`` is 3,000^100 there, beyond float64."""
    n, degree = 3200, 100
    psi = draw(design, 2, sets=[list(range(3000))], n=n)[:40]
    rng = np.random.default_rng(25)
    coefficients = rng.standard_normal((degree, len(psi), 2)) + 0j
    coefficients[:, 1:] *= (np.linalg.norm(psi[1:], axis=1) / 55)[:, None] ** np.arange(1, degree + 1)[:, None, None]
    x = np.zeros((1, n))
    x[0, :3000] = 1
    terms, stderr = KernelEstimator(psi, coefficients)(x, degree)
    np.testing.assert_allclose(terms[:, 0], coefficients[:, 0].real, rtol=1e-6)
    assert np.isfinite(stderr).all()


def test_measurements_that_are_zero_by_construction_are_left_out():
    """Oracle: the polynomial along ``i e_u``, whose real part is zero at order 1 and imaginary part at order 2."""
    rng = np.random.default_rng(11)
    tensors, x = symmetric_tensors(rng, 2, degree=2), np.eye(N)
    psi = np.concatenate([1j * np.eye(N), np.zeros((1, N))])
    terms, stderr = KernelEstimator(psi, contract(tensors, psi))(x, 2)
    np.testing.assert_allclose(terms, contract(tensors, x), atol=1e-12)
    assert stderr.max() < 1e-6
    with pytest.raises(ConfigurationError, match="`directions` are all zero"):
        KernelEstimator(np.zeros((2, N), dtype=complex), np.zeros((1, 2, 1), dtype=complex))(x, 1)


def test_nearly_parallel_directions_are_told_apart():
    """Oracle: the slope, measured along ``e_0`` and ``e_0 + 1e-3 e_u``."""
    rng = np.random.default_rng(15)
    tensors, x = symmetric_tensors(rng, 2, degree=1), np.eye(N)
    psi = 1e-3 * np.eye(N, dtype=complex)
    psi[:, 0] = 1
    terms, stderr = KernelEstimator(psi, contract(tensors, psi))(x, 1)
    np.testing.assert_allclose(terms, contract(tensors, x), atol=1e-9)
    assert stderr.max() < 1e-4


def test_a_prior_that_drowns_the_measurements_is_passed_over(monkeypatch):
    """Oracle: the slope; beside a common mode of 1e14 the rows of ``1 1^T + 1e-3 I`` are equal to rounding."""
    rng = np.random.default_rng(16)
    tensors, x = symmetric_tensors(rng, 2, degree=1), np.eye(N)
    psi = np.ones((N, N), dtype=complex) + 1e-3 * np.eye(N)
    isotropic = KernelEstimator(psi, contract(tensors, psi))(x, 1)[0]
    fix_prior(monkeypatch, Prior())
    monkeypatch.setattr(priors, "COMMON_MODE_GRID", (0.0, 1e14))
    np.testing.assert_allclose(KernelEstimator(psi, contract(tensors, psi))(x, 1)[0], isotropic, atol=1e-9)
    np.testing.assert_allclose(isotropic, contract(tensors, x), atol=1e-8)


def test_kernel_does_not_depend_on_the_scale_or_order_of_directions():
    """Oracle: the same sketch, permuted and with every direction at another scale."""
    rng = np.random.default_rng(12)
    tensors, x = symmetric_tensors(rng, 3), deletions(rng, 5)
    psi = draw("sphere+basis", 4)
    order, scale = rng.permutation(len(psi)), 10.0 ** rng.uniform(-3, 3, len(psi))
    other = (psi * scale[:, None])[order]
    one = KernelEstimator(psi, contract(tensors, psi))(x, 3)
    two = KernelEstimator(other, contract(tensors, other))(x, 3)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-6, atol=1e-6)


def test_kernel_does_not_magnify_float32_noise():
    """Oracle: the noise put in, 1e-6 of each coefficient; 256 complex directions are tenfold redundant at order 1."""
    rng, n = np.random.default_rng(13), 50
    features = rng.standard_normal((30, n)) / math.sqrt(n)
    psi, x = draw("sphere", 256, n=n), deletions(rng, 50, n)
    clean = np.stack([(psi @ features.T) ** r for r in (1, 2)])
    noisy = clean * (1 + 1e-6 * rng.standard_normal(clean.shape))
    difference = KernelEstimator(psi, noisy)(x, 2)[0] - (exact := KernelEstimator(psi, clean)(x, 2)[0])
    assert np.linalg.norm(difference) < 2e-5 * np.linalg.norm(exact)


def test_an_output_that_never_changes_is_predicted_without_error():
    """Oracle: zero; it must neither break nor sway the choice of the prior."""
    rng = np.random.default_rng(14)
    tensors, x = symmetric_tensors(rng, 2, root=common_root(3.0)), deletions(rng, 3)
    psi = draw("sphere", 4)
    estimator = KernelEstimator(psi, contract(tensors, psi))
    alone = estimator(x, 3)
    assert estimator._order(3).prior.common > 0
    tensors = [np.concatenate([t, 0 * t]) for t in tensors]
    terms, stderr = KernelEstimator(psi, contract(tensors, psi))(x, 3)
    assert not terms[..., 2:].any()
    assert not stderr[..., 2:].any()
    np.testing.assert_array_equal(stderr[..., :2], alone[1])


# --- choice and refusals ---------------------------------------------------------------------------------------------


def test_auto_takes_the_kernel_and_the_mean_only_beyond_its_limit(monkeypatch):
    """Oracle: the class, counting two measurements per complex direction and one per real one."""
    psi = np.concatenate([draw("sphere", 3), draw("basis", 1)])
    sphere, coefficients = psi[:3], np.ones((1, 9, 1), dtype=complex)
    monkeypatch.setattr(estimators, "MAX_KERNEL_MEASUREMENTS", 12)
    assert type(make_estimator("auto", psi, coefficients)) is KernelEstimator
    monkeypatch.setattr(estimators, "MAX_KERNEL_MEASUREMENTS", 11)
    with pytest.raises(ConfigurationError, match="`estimator='auto'` has 12 measurements"):
        make_estimator("auto", psi, coefficients)
    monkeypatch.setattr(estimators, "MAX_KERNEL_MEASUREMENTS", 5)
    assert type(make_estimator("auto", sphere, coefficients[:, :3])) is MeanEstimator
    assert type(make_estimator("kernel", psi, coefficients)) is KernelEstimator
    assert type(make_estimator("median_of_means", draw("sphere", 4), coefficients[:, :4])) is MedianOfMeansEstimator


@pytest.mark.parametrize("name", ["mean", "median_of_means"])
@pytest.mark.parametrize("design", ["basis", "indicator", "common", "sphere+common", "sphere+basis", "scaled"])
def test_means_refuse_directions_that_are_not_uniform_on_the_sphere(name, design):
    """Oracle: the argument's name in the message."""
    psi = (
        1.001 * draw("sphere", 9)
        if design == "scaled"
        else draw(design, 9, sets=[[0, 1]] if design == "indicator" else None)
    )
    with pytest.raises(ConfigurationError, match=f"`estimator='{name}'` needs complex directions"):
        make_estimator(name, psi, np.ones((1, len(psi), 1), dtype=complex))


@pytest.mark.parametrize(("name", "least"), [("mean", 2), ("median_of_means", 4)])
def test_means_need_enough_directions_for_a_standard_error(name, least):
    """Oracle: the number in the message; one direction more is enough."""
    psi, coefficients = draw("sphere", least), np.ones((1, least, 1), dtype=complex)
    assert np.isfinite(make_estimator(name, psi, coefficients)(np.ones((1, N)), 1)[1]).all()
    with pytest.raises(ConfigurationError, match=f"has {least - 1} directions and needs at least {least}"):
        make_estimator(name, psi[1:], coefficients[:, 1:])


def test_an_unknown_estimator_is_refused():
    """Oracle: the allowed names in the message."""
    with pytest.raises(
        ConfigurationError, match="`estimator` is 'best': choose one of auto, kernel, mean, median_of_means"
    ):
        make_estimator("best", draw("sphere", 4), np.ones((1, 4, 1), dtype=complex))


@pytest.mark.parametrize("say", [True, False])
def test_kernel_believes_in_features_that_predict_held_out_directions(say):
    """Oracle: true first-order effects that are linear in the features, or have nothing to do with them."""
    rng = np.random.default_rng(0)
    n, count = 60, 20
    features = rng.standard_normal((n, 4))
    effects = (features if say else rng.standard_normal((n, 4))) @ rng.standard_normal((4, 6))
    psi = np.linalg.qr(rng.standard_normal((n, count)))[0].T.astype(np.complex128)
    coefficients = (psi @ effects)[None]
    x = (rng.random((30, n)) < 0.2).astype(np.float64)
    true = x @ effects
    with_, without = (KernelEstimator(psi, coefficients, given) for given in (features, None))
    error, plain = (np.linalg.norm(e(x, 1)[0][0] - true) / np.linalg.norm(true) for e in (with_, without))
    assert bool(with_._order(1).prior.gradients) is say
    if say:
        assert error < 0.02 < 0.5 < plain
    else:
        assert error == pytest.approx(plain)


@pytest.mark.parametrize("complex_", [True, False])
def test_a_prior_of_features_is_that_of_rotated_units(complex_):
    """Oracle: the closed form of Gaussian regression with the covariance written out, at order 1."""
    rng = np.random.default_rng(1)
    n, count, weight = 7, 3, 10.0
    features = rng.standard_normal((n, 2))
    psi = rng.standard_normal((count, n)) + (1j * rng.standard_normal((count, n)) if complex_ else 0)
    linear = rng.standard_normal((n, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(priors, "GRADIENTS_GRID", (weight,))
        patch.setattr(priors, "COMMON_MODE_GRID", (0.0,))
        kernel = KernelEstimator(psi.astype(np.complex128), (psi @ linear)[None].astype(np.complex128), features)
        x = rng.standard_normal((4, n))
        found = kernel(x, 1)[0][0]
    scaled = features * np.sqrt(n) / np.linalg.norm(features)
    m = np.eye(n) + weight * scaled @ scaled.T
    rows = np.concatenate([psi.real, psi.imag]) if complex_ else psi
    expected = x @ m @ rows.T @ np.linalg.solve(rows @ m @ rows.T, rows @ linear)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
