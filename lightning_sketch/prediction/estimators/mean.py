"""Estimators that need no prior: means over directions drawn from the sphere."""

import math

import numpy as np

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.prediction.estimators.arrays import matmul, power
from lightning_sketch.prediction.estimators.base import Estimator, Expansion

# Default `delta` of the median of means.
FAILURE_PROBABILITY = 1e-3


class MeanEstimator(Estimator):
    """The paper's unbiased estimator: the mean over directions (Gunn, arXiv 2604.07328).

    ``e_jr = C(n+r-1, r) Re(c_jr conj(psi_j . x)^r)`` has the mean ``<F_r, x^(x r)>`` because
    ``E[psi^(x r) conj(psi)^(x r)] = P_sym / C(n+r-1, r)`` for ``psi`` uniform on the unit sphere of ``C^n``.

    The standard error is the sample standard deviation over directions of ``sum_r e_jr`` (the orders of one direction
    are correlated) over ``sqrt(K)``. For orthonormal directions, whose mean varies less than that of
    independent ones, it is conservative.

    Args:
        directions: ``(K, n)`` complex128, uniform on the sphere: of the designs ``sphere`` or ``orthonormal``.
        coefficients: ``(R, K, O)`` complex128.

    Raises:
        ConfigurationError: a direction that is real or not of unit norm, or fewer than two directions.
    """

    _name = "mean"
    _min_directions = 2

    def __init__(self, directions: np.ndarray, coefficients: np.ndarray) -> None:
        usable = on_complex_sphere(directions)
        if not usable.all():
            raise ConfigurationError(
                f"`estimator={self._name!r}` needs complex directions of unit norm, unlike direction "
                f"{int(np.argmin(usable))}: use 'kernel', or sketch with the design 'sphere' or 'orthonormal'."
            )
        if len(directions) < self._min_directions:
            raise ConfigurationError(
                f"`estimator={self._name!r}` has {len(directions)} directions and needs at least "
                f"{self._min_directions} for a standard error: use 'kernel' or sketch more directions."
            )
        self._directions = directions.copy()
        self._real, self._imag = coefficients.real.copy(), coefficients.imag.copy()

    def expand(self, x: np.ndarray, degree: int) -> Expansion:
        """See :meth:`Estimator.expand`."""
        products = matmul(x, self._directions.T)
        terms = np.empty((degree, len(x), self._real.shape[2]))
        stderr = np.empty(terms.shape)
        for row in range(len(x)):  # one deletion at a time: all samples of all deletions would not fit in memory
            terms[:, row], stderr[:, row] = self._reduce(self._samples(products[row], degree))
        return Expansion(terms, stderr)

    def _samples(self, products: np.ndarray, degree: int) -> np.ndarray:
        """Return ``e_jr``, ``(degree, K, O)``, of one deletion with ``psi_j . x = products[j]``."""
        num_units = self._directions.shape[1]
        # Re(c conj(q)) = Re c Re q + Im c Im q, with q = C(n+r-1, r) (psi . x)^r.
        # The binomial goes into the base: alone it may be more than float64 holds, and the power less.
        roots = [2 ** (math.log2(math.comb(num_units + r - 1, r)) / r) for r in range(1, degree + 1)]
        q = np.stack([power(root * products, r) for r, root in enumerate(roots, start=1)])[..., None]
        samples: np.ndarray = self._real[:degree] * q.real + self._imag[:degree] * q.imag
        return samples

    def _reduce(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums = samples.cumsum(axis=0)
        return samples.mean(axis=1), sums.std(axis=1, ddof=1) / math.sqrt(samples.shape[1])


class MedianOfMeansEstimator(MeanEstimator):
    """Median over groups of directions of the group's mean, order by order: robust against heavy tails.

    The number of groups ``g`` is ``ceil(8 ln(1/delta))`` for the failure probability ``delta``, and at most ``K // 2``
    (Lugosi & Mendelson, *Mean estimation and regression under heavy-tailed distributions*, theorem 2); groups are
    contiguous, so that orthonormal blocks stay together.

    The standard error is ``sqrt(pi / (2 g)) sd``, that of the median of ``g`` normal values, with ``sd`` the sample
    standard deviation over groups of the group's summed orders.

    Args:
        directions: ``(K, n)`` complex128, of the designs ``sphere`` or ``orthonormal``; at least 4.
        coefficients: ``(R, K, O)`` complex128.
        failure_probability: ``delta``, the probability that the error is beyond the guarantee; between 0 and 1.

    Raises:
        ConfigurationError: a direction that is real or not of unit norm, fewer than four directions, or a
            ``failure_probability`` out of its range.
    """

    _name = "median_of_means"
    _min_directions = 4

    def __init__(
        self,
        directions: np.ndarray,
        coefficients: np.ndarray,
        failure_probability: float = FAILURE_PROBABILITY,
    ) -> None:
        super().__init__(directions, coefficients)
        if not 0 < failure_probability < 1:
            raise ConfigurationError(
                f"`failure_probability` is {failure_probability}: give a number between 0 and 1, such as 0.001."
            )
        self._failure_probability = failure_probability

    def _reduce(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        num_directions = samples.shape[1]
        num_groups = min(math.ceil(8 * math.log(1 / self._failure_probability)), num_directions // 2)
        starts = np.arange(num_groups) * num_directions // num_groups
        sizes = np.diff(starts, append=num_directions)
        means = np.add.reduceat(samples, starts, axis=1) / sizes[:, None]
        spread = means.cumsum(axis=0).std(axis=1, ddof=1)
        return np.median(means, axis=1), math.sqrt(math.pi / (2 * num_groups)) * spread


def on_complex_sphere(directions: np.ndarray) -> np.ndarray:
    """Return which directions, ``(K,)``, may be uniform on the unit sphere of ``C^n``."""
    unit_norm: np.ndarray = np.abs(np.linalg.norm(directions, axis=1) - 1) <= 1e-8
    return unit_norm & directions.imag.any(axis=1)
