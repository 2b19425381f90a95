"""How fast the Taylor terms of an output fall with their order, and how large a deletion may be while they do."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln

from lightning_sketch.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOLERANCE = 0.1
# Share of a direction's square that lies along the common mode, from which on it measures that mode
COMMON_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class StabilityProfile:
    """Sizes of the Taylor terms of one output, order by order, as directions show them.

    Args:
        log2_norms: ``(R,)`` float64, ``log2 ||F_r||`` of orders ``1..R``, ``||F_r||^2 = C(n+r-1, r) E|c_r|^2`` over
            directions on the complex unit sphere (Gunn, *How to sketch a learning algorithm*, arXiv 2604.07328, Figure
            1), in the units of the output; ``-inf`` where an order vanishes.
        spread: standard deviation of ``log2 |c_r|`` over the directions, in bits, the largest of all orders.
        log2_terms: ``(R,)``, ``log2`` of the root mean square of ``|c_r|``: the term of a deletion of length one.
        log2_common: ``(R,)``, the same along the common mode, where a direction measures it, else as ``log2_terms``.
        num_units: ``n``.
    """

    log2_norms: np.ndarray
    spread: float
    log2_terms: np.ndarray
    log2_common: np.ndarray
    num_units: int

    @property
    def degree(self) -> int:
        """``R``."""
        return len(self.log2_norms)

    @property
    def growth(self) -> float:
        """Slope of ``log2 ||F_r||`` over ``r``, bits per order, by least squares; NaN of fewer than two orders.

        Above 0 even a deletion of length one may lie outside the radius of convergence.
        """
        known = np.isfinite(self.log2_norms)
        if known.sum() < 2:
            return float("nan")
        return float(np.polyfit(np.arange(1, self.degree + 1)[known], self.log2_norms[known], 1)[0])

    def terms(self, units: ArrayLike) -> np.ndarray:
        """Return the typical size of the terms of deletions of ``units`` random units, ``(R, *units)``.

        Such a deletion has the length ``d / sqrt(n)`` along the common mode and ``sqrt(d (1 - d/n))`` across it, and
        order ``r`` is taken to grow with the ``r``-th power of both, each with the ``r``-th root of its own term.
        """
        d = np.asarray(units, dtype=np.float64)
        orders = np.arange(1, self.degree + 1).reshape(-1, *[1] * d.ndim)
        along, across = (np.exp2(logs.reshape(orders.shape) / orders) for logs in (self.log2_common, self.log2_terms))
        lengths = np.hypot(
            along * d / np.sqrt(self.num_units), across * np.sqrt(d * np.maximum(1 - d / self.num_units, 0))
        )
        with np.errstate(over="ignore"):
            sizes: np.ndarray = lengths**orders
        return sizes

    def error(self, units: ArrayLike) -> np.ndarray:
        """Return the relative error to expect of predictions of degree ``R`` for ``units`` random units, ``(*units)``.

        The orders left out are taken to fall by the largest ratio of consecutive :meth:`terms` and to add up, all with
        the same sign; infinite where they do not fall. Of degree 1 NaN: one term does not tell how fast they fall.
        """
        sizes = self.terms(units)
        if self.degree == 1:
            return np.full(sizes.shape[1:], np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.nan_to_num(sizes[1:] / sizes[:-1], nan=0.0, posinf=np.inf).max(axis=0)
            tail = np.where(ratio < 1, ratio / (1 - ratio), np.inf) * sizes[-1]
            relative: np.ndarray = np.where(sizes[-1] > 0, tail / np.sqrt(np.square(sizes).sum(axis=0)), 0.0)
        return relative

    def trusted_units(self, tolerance: float = TOLERANCE) -> int:
        """Return the largest number of units, up to ``n/2``, whose deletion is predicted to ``tolerance``.

        Args:
            tolerance: relative :meth:`error` of the predicted change.

        Returns:
            0 if not even the deletion of one unit can be trusted, or the degree is 1.
        """
        low, high = 0, max(1, self.num_units // 2)
        while low < high:  # errors grow with the deletion
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.error(middle) <= tolerance else (low, middle - 1)
        return low

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw ``log2 ||F_r||`` over the orders; returns figure and axes."""
        from lightning_sketch.plotting import plot_stability_profile  # drawing is optional, so its room loads on demand

        return plot_stability_profile(self, ax)

    def __repr__(self) -> str:
        norms = ", ".join(f"{norm:.1f}" for norm in self.log2_norms[:4])
        more = ", ..." if self.degree > 4 else ""
        return (
            f"StabilityProfile(log2 norms {norms}{more}; growth {self.growth:+.2f} bits per order, "
            f"{self.trusted_units()} of {self.num_units} units trusted to {TOLERANCE:.0%})"
        )


def stability_profile(coefficients: ArrayLike, directions: ArrayLike) -> StabilityProfile:
    """Return the profile of an output from its coefficients along some directions.

    Norms are those of random complex directions (``sphere``, ``orthonormal``); those of real ones are used as if they
    were random. Directions that lie along the common mode say what deletions share, and nothing of the norms.

    Args:
        coefficients: ``(R, K, *out)`` complex or real; sizes are root mean squares over the output's entries.
        directions: ``(K, n)``.

    Raises:
        ConfigurationError: shapes that do not fit each other.
    """
    c, psi = np.asarray(coefficients), np.asarray(directions)
    if c.ndim < 2 or psi.ndim != 2 or c.shape[1] != len(psi) or not c.size:
        raise ConfigurationError(
            f"`coefficients` has shape {c.shape} and `directions` {psi.shape}: give (R, K, *out) and (K, n)."
        )
    largest = np.abs(c).reshape(*c.shape[:2], -1).max(axis=2)
    scale = np.where(largest > 0, largest, 1.0)
    parts = np.abs(c.reshape(*c.shape[:2], -1) / scale[..., None])
    with np.errstate(divide="ignore"):
        sizes = np.log2(scale) + np.log2(np.square(parts).mean(axis=2)) / 2
    return profile_of_sizes(sizes, psi)


def profile_of_sizes(log2_sizes: np.ndarray, directions: np.ndarray) -> StabilityProfile:
    """Return the profile of anything from ``log2`` of the size of its coefficients.

    Args:
        log2_sizes: ``(R, K)``; ``-inf`` for zeros.
        directions: ``(K, n)``.
    """
    n, orders = directions.shape[1], np.arange(1, len(log2_sizes) + 1)
    squares = np.square(np.abs(directions)).sum(axis=1)
    sizes = log2_sizes - orders[:, None] * np.log2(squares) / 2
    share = np.square(np.abs(directions.sum(axis=1))) / (n * squares)
    common = share > COMMON_SHARE
    if common.all():
        common[:] = False
    across = sizes[:, ~common]
    terms = _log2_rms(across)
    known = np.isfinite(across).all(axis=1)
    binomials = gammaln(n + orders) - gammaln(orders + 1) - gammaln(n)
    return StabilityProfile(
        log2_norms=terms + binomials / (2 * np.log(2)),
        spread=float(across[known].std(axis=1).max(initial=0.0)),
        log2_terms=terms,
        log2_common=_log2_rms(sizes[:, common]) if common.any() else terms,
        num_units=n,
    )


def _log2_rms(logs: np.ndarray) -> np.ndarray:
    """Return ``log2`` of the root mean square over the last axis of ``2^logs``, which may overflow."""
    largest = logs.max(axis=1, keepdims=True)
    finite = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):
        found: np.ndarray = finite[:, 0] + np.log2(np.square(np.exp2(logs - finite)).mean(axis=1)) / 2
    return found
