"""Which prior the measurements of an order speak for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.linalg import LinAlgError, cholesky, solve_triangular

from lightning_sketch.prediction.estimators.grams import Gram, Prior, Vectors

# Weights of a `Prior`.
COMMON_MODE_GRID = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DIAGONAL_GRID = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
GRADIENTS_GRID = (0.0, 1.0, 10.0, 100.0, 1000.0)
EFFECTS_GRID = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

# Measurements that a prior with a mean needs for each weight of it.
MEASUREMENTS_PER_WEIGHT = 3

MAX_LIKELIHOOD_ROWS = 256  # enough to choose a prior, and keeps the grids cheap beside the one full factorisation
MAX_LIKELIHOOD_OUTPUTS = 256


@dataclass(frozen=True)
class Choice:
    """The prior of an order.

    Args:
        prior: the prior.
        weights: ``(Q,)``, of the terms of its mean; or None.
        density: log density of every direction's measurements given those of all others, the mean over the outputs.
    """

    prior: Prior
    weights: np.ndarray | None
    density: float


def choose_prior(
    directions: np.ndarray,
    maps: Mapping[str, np.ndarray],
    r: int,
    rows: np.ndarray,
    values: np.ndarray,
    terms: np.ndarray | None = None,
    scale: np.ndarray | None = None,
) -> Choice:
    """Choose the prior of an order as :class:`KernelEstimator` says.

    Args:
        directions: ``(K, n)``, of unit norm.
        maps: as of :class:`Vectors`.
        r: order.
        rows: ``(p,)``, the measurements used; independent, so that ``G`` is regular for every prior.
        values: ``(m, O)``, all measurements.
        terms: ``(Q, m, O)``, what a mean may be made of, of few outputs; or None.
        scale: as of :class:`Vectors`.
    """
    y = values[rows][:, few_outputs(values)]
    changing = y.any(axis=0)  # an output that never changes has s_r = 0 and says nothing of the prior
    y = y[:, changing]
    if not y.size:
        return Choice(Prior(), None, math.inf)
    largest = np.abs(y).max(axis=0)
    y = y / largest  # so that no square below underflows
    terms = None if terms is None else terms[:, rows][:, :, changing] / largest
    used, position = np.unique(rows % len(directions), return_inverse=True)
    part = position + len(used) * (rows // len(directions))
    gram = Gram(Vectors(directions[used], maps, scale), r)
    fits: dict[Prior, Fit | None] = {}

    def fit(prior: Prior) -> Fit | None:
        if prior not in fits:
            fits[prior] = Fit.of(gram, prior, part, position, y, terms if prior.informed else None)
        return fits[prior]

    def likelihood(prior: Prior) -> float:
        found = fit(prior)
        return -math.inf if found is None else found.likelihood

    def improve(prior: Prior) -> Prior:
        for _ in range(2):
            for weight in reversed(active):
                prior = max((_with(prior, weight, value) for value in grids[weight]), key=likelihood)
        return prior

    grids: dict[str, tuple[float, ...]] = {"common": COMMON_MODE_GRID}
    if "gradients" in maps:
        grids["gradients"] = GRADIENTS_GRID
    if r > 1:
        grids |= {"diagonal": DIAGONAL_GRID, "effects": EFFECTS_GRID}
    best = Prior()
    for name, grid in grids.items():
        best = _with(best, name, min(grid))
    kinds: list[Prior] = []
    active: list[str] = []
    for name in grids:
        active.append(name)
        best = improve(best)
        kinds.append(best)
    if terms is not None and len(rows) >= MEASUREMENTS_PER_WEIGHT * len(terms):
        kinds.append(improve(replace(best, informed=True)))

    def held_out(prior: Prior) -> float:
        found = fit(prior)
        return -math.inf if found is None else found.held_out_density()

    chosen = max(dict.fromkeys(kinds), key=held_out)
    found = fit(chosen)
    weights = None if found is None or found.regression is None else found.regression.weights
    return Choice(chosen, weights, held_out(chosen) / y.shape[1] - len(rows) * float(np.log(largest).mean()))


def _with(prior: Prior, name: str, weight: float) -> Prior:
    return replace(prior, **{name: weight})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Regression:
    """Weights of the terms of a mean by generalised least squares, all outputs together, each in units of its scale.

    The weights have a normal prior: each term may explain as much as there is. It decides only where terms are nearly
    the same on all measurements.
    """

    terms: np.ndarray  # (Q, p, O), G^-1 H / s, every term scaled to a mean square of 1
    linear: np.ndarray  # (p, O), G^-1 y / s
    normal: np.ndarray  # (Q, Q)
    right: np.ndarray  # (Q,)
    sizes: np.ndarray  # (Q,), what the terms were divided by

    @classmethod
    def of(cls, root: np.ndarray, y: np.ndarray, terms: np.ndarray) -> "Regression":
        """Regress ``y``, ``(p, O)``, on ``terms``, ``(Q, p, O)``, with ``root^T root = G^-1``."""
        whitened, explained = root @ y, root @ terms
        scale = np.sqrt(np.maximum((whitened**2).mean(axis=0), np.finfo(np.float64).tiny))
        whitened, explained = whitened / scale, explained / scale
        sizes = np.sqrt((explained**2).mean(axis=(1, 2)))
        sizes[sizes == 0] = 1
        explained /= sizes[:, None, None]
        flat = explained.reshape(len(terms), -1)
        return cls(root.T @ explained, root.T @ whitened, flat @ flat.T, flat @ whitened.reshape(-1), sizes)

    def solve(self, normal: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the weights of the terms scaled to a mean square of 1."""
        weights: np.ndarray = np.linalg.solve(normal + np.eye(len(normal)), right)
        return weights

    @cached_property
    def weights(self) -> np.ndarray:
        """Of the terms as they were given."""
        weights: np.ndarray = self.solve(self.normal, self.right) / self.sizes
        return weights

    def without(self, rows: np.ndarray, block: np.ndarray) -> np.ndarray:
        """Return the weights that the other measurements give, from those of ``rows`` and their block of ``G^-1``."""
        terms, linear = self.terms[:, rows], self.linear[rows]
        solved = np.linalg.solve(block, terms)
        normal = self.normal - np.einsum("qpo,rpo->qr", terms, solved)
        return self.solve(normal, self.right - np.einsum("qpo,po->q", solved, linear)) / self.sizes


@dataclass(frozen=True)
class Fit:
    """The regression on some measurements under one prior."""

    inverse: np.ndarray  # (p, p), G^-1
    linear: np.ndarray  # (p, O), G^-1 y
    quadratic: np.ndarray  # (O,), (y - H w)^T G^-1 (y - H w)
    direction: np.ndarray  # (p,), of each measurement
    likelihood: float
    terms: np.ndarray | None  # (Q, p, O), G^-1 H
    regression: Regression | None

    @classmethod
    def of(
        cls,
        gram_of: Gram,
        prior: Prior,
        part: np.ndarray,
        direction: np.ndarray,
        y: np.ndarray,
        terms: np.ndarray | None = None,
    ) -> "Fit | None":
        """Return the fit, or None where ``G`` is singular to rounding: the prior drowns what tells measurements apart.

        Args:
            gram_of: of the directions.
            prior: the prior.
            part: ``(p,)``, rows of the Gram matrix.
            direction: ``(p,)``, the direction of each.
            y: ``(p, O)``.
            terms: ``(Q, p, O)``, what the mean is made of, where the prior has one.
        """
        gram = gram_of(prior)[np.ix_(part, part)]
        spread = np.sqrt(np.diagonal(gram))
        try:
            factor = cholesky(gram / np.outer(spread, spread), lower=True)
        except LinAlgError:
            return None
        # A common factor of the scales is a factor of s, and would only underflow.
        log_scale = -gram_of.r * np.log(gram_of.directions.sizes(prior)[direction]) - np.log(spread)
        log_scale -= log_scale.max()
        root = solve_triangular(factor, np.diag(np.exp(log_scale)), lower=True)
        regression, solved, left = None, None, y
        if terms is not None:
            regression, solved = Regression.of(root, y, terms), np.asarray(root.T @ (root @ terms))
            left = y - np.tensordot(regression.weights, terms, axes=1)
        whitened = root @ left
        quadratic = np.maximum((whitened**2).sum(axis=0), np.finfo(np.float64).tiny)
        # log p(y) = -1/2 (p log s^2 + log det G) + const, summed over outputs, with s^2 = y^T G^-1 y / p
        half_log_det = np.log(np.diagonal(factor)).sum() - log_scale.sum()
        likelihood = -len(y) * np.log(quadratic / len(y)).sum() / 2 - y.shape[1] * half_log_det
        inverse = root.T @ root
        return cls(inverse, inverse @ y, quadratic, direction, float(likelihood), solved, regression)

    def held_out_density(self) -> float:
        """Return the log density of every direction's measurements given those of all others, summed.

        With ``B`` the direction's block of ``G^-1`` and ``alpha`` its part of ``G^-1 (y - H w)``, its measurements miss
        their prediction by ``B^-1 alpha``, of covariance ``s^2 B^-1`` (Rasmussen & Williams, equations 5.10 to 5.13,
        there for one measurement; two belong to a complex direction). The weights ``w`` are those that the other
        directions give.
        """
        scale = self.quadratic / len(self.linear)
        density = -len(self.linear) * float(np.log(scale).sum()) / 2
        for j in range(int(self.direction.max()) + 1):
            rows = np.flatnonzero(self.direction == j)
            block, alpha = self.inverse[np.ix_(rows, rows)], self.linear[rows]
            if self.regression is not None and self.terms is not None:
                terms: np.ndarray = self.terms[:, rows]
                alpha = alpha - np.tensordot(self.regression.without(rows, block), terms, axes=1)
            missed = (alpha * np.linalg.solve(block, alpha)).sum(axis=0)
            density -= float((missed / scale - np.linalg.slogdet(block)[1]).sum()) / 2
        return density


def few_outputs(values: np.ndarray) -> slice:
    """Return at most :data:`MAX_LIKELIHOOD_OUTPUTS` of the entries of the last axis, evenly spread."""
    return slice(None, None, -(-values.shape[-1] // MAX_LIKELIHOOD_OUTPUTS) or 1)
