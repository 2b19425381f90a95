"""How many directions of which design a sketch needs, known before training."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

import numpy as np

from lightning_sketch.directions import first_order_error, plain_steps
from lightning_sketch.errors import ConfigurationError

_ROUNDING = 1e-10  # below it, parts of one are rounding
_MOST = 2**63  # what numpy holds


@dataclass(frozen=True, repr=False)
class Plan:
    """A design for :class:`SketchCallback`, what it costs, and what error to expect.

    Args:
        design: the callback's ``design``.
        directions: ``K``; for the random designs also the callback's ``directions``.
        degree: the callback's ``degree``.
        expected_error: relative standard error of a predicted change; for ``sphere`` a bound that holds but for the
            failure probability.
        cost: plain training steps per step of the run.
        target: the error asked for.
        alternatives: the best plan of every design considered, cheapest first; this one is among them.
    """

    design: str
    directions: int
    degree: int
    expected_error: float
    cost: float
    target: float
    alternatives: "tuple[Plan, ...]" = ()

    @property
    def meets_target(self) -> bool:
        """Whether the expected error is at most the one asked for."""
        return self.expected_error <= self.target + _ROUNDING

    def __repr__(self) -> str:
        plans = self.alternatives or (self,)
        width = max(len(plan.design) for plan in plans)
        title = "cheapest" if self.meets_target else "none meets it with as many measurements as units; nearest"
        lines = [
            f"Plan for a relative error of {self.target:.1%} ({title} marked *)",
            f"  {'design':{width}}  directions  degree  plain steps per step  expected error",
        ]
        for plan in plans:
            mark = "*" if plan.design == self.design else " "
            error = f"{plan.expected_error:.1%}"
            lines.append(
                f"{mark} {plan.design:{width}}  {plan.directions:10,}  {plan.degree:6}  {plan.cost:20,.0f}  {error:>14}"
            )
        if any(plan.design == "basis+common" and plan.expected_error > 0 for plan in plans):
            lines.append(
                "  basis+common is planned as if deletions had nothing in common; they have, and it errs less."
            )
        return "\n".join(lines)


def plan(
    n_units: int,
    *,
    error: float = 0.1,
    failure_probability: float | None = None,
    deletion_size: int = 1,
    profile: Sequence[float] | None = None,
    num_sets: int | None = None,
) -> Plan:
    """Return the cheapest design that predicts deletions of ``deletion_size`` units to a relative ``error``.

    Nothing is taken to be known of the symmetric tensors ``F_r`` but their norms. Then order ``r`` of a deletion of
    ``d`` units has the root mean square ``s_r = ||F_r|| sqrt(d^r / C_r)``, with ``C_r = C(n+r-1, r)`` dimensions, and
    the expected error is ``sqrt(sum_r q_r s_r^2 / sum_r s_r^2)``. The part ``q_r`` that is missed of an order is 1
    above the degree, and else, with ``m`` real measurements (two per complex direction),

    - ``indicator``: 0, for the ``num_sets`` sets known in advance;
    - ``basis``: ``1 - d^(1-r)``, so that order 1, and every order of a single unit, is exact;
    - ``basis+common``: the part of ``1_D^(x r)`` off the span of the measured ``psi^(x r)``. Real deletions share much,
      "less data", which this design measures: there it does far better than planned;
    - ``orthonormal``: ``min(1, (1 - m/C_r) C_r/m)``, the square of :func:`first_order_error` in ``C_r`` dimensions, of
      which the kernel estimator misses no more;
    - ``sphere``, in the place of ``orthonormal`` if a failure probability ``delta`` is given: the median of means. The
      estimates ``e_jr`` of one order have a variance of at most ``v_r ||F_r||^2 d^r``, ``v_r = max(rho/2, rho - 1)``,
      ``rho = C_r^2 / C(n+2r-1, 2r) < 4^r``, and their median over ``g = ceil(8 ln(R/delta))`` groups of directions is
      off by at most ``2 sd / sqrt(K/g)`` but with probability ``delta/R`` (Lugosi & Mendelson, *Mean estimation and
      regression under heavy-tailed distributions*, theorem 2). The orders' bounds are added. Beside the largest change
      possible, ``||F_r|| sqrt(d^r)``, they are free of ``n``, as the paper says; beside a typical one they are not.

    Args:
        n_units: ``n``.
        error: relative error wanted, between 0 and 1.
        failure_probability: ``delta``, with which random directions may miss ``error`` for one output and deletion.
        deletion_size: ``d``, units per deletion.
        profile: ``log2 ||F_r||`` for ``r = 1, 2, ..``, the stability profile (Gunn, *How to sketch a learning
            algorithm*, arXiv 2604.07328, figure 1), for instance ``||F_r||^2 = C_r mean_j |c_jr|^2`` over the sphere
            directions of an earlier sketch. Orders after its last are taken for zero; ``None`` plans order 1 alone.
        num_sets: how many deletion sets there are, if they are known in advance.

    Returns:
        The cheapest plan that meets the target, or else the one of least error. Random directions count only up to
        ``n`` measurements, with which ``basis`` is exact at order 1. The ``repr`` is a table of the alternatives.

    Raises:
        ConfigurationError: any argument that can not be right.

    Example:
        >>> plan(50, error=0.2, deletion_size=5, profile=[0.0, -1.2], num_sets=3)
        Plan for a relative error of 20.0% (cheapest marked *)
          design        directions  degree  plain steps per step  expected error
        * indicator              3       1                     6           18.9%
          basis                 50       1                   100           18.9%
          orthonormal           25       1                   100           18.9%
          basis+common         101       1                   202           18.9%
          basis+common is planned as if deletions had nothing in common; they have, and it errs less.
    """
    n, d = _check(n_units, error, failure_probability, deletion_size, num_sets)
    weights = _order_weights(n, d, profile)
    found: dict[str, list[Plan]] = {}

    def add(design: str, degree: int, count: int, expected: float, *, real: bool = True) -> None:
        cost = count * plain_steps(degree, real=real)
        found.setdefault(design, []).append(Plan(design, count, degree, expected, cost, error))

    for degree in range(1, len(weights) + 1):
        orders = range(1, degree + 1)
        if num_sets is not None:
            add("indicator", degree, num_sets, _expected(weights, [0.0] * degree))
        add("basis", degree, n, _expected(weights, [1 - float(d) ** (1 - r) for r in orders]))
        add("basis+common", degree, 2 * n + 1, _expected(weights, [_off_common(n, d, r) for r in orders]))
        if failure_probability is None:
            add("orthonormal", degree, *_fewest_at_random(n, weights, degree, error), real=False)
        elif bounded := _median_of_means(n, weights, degree, error, failure_probability):
            add("sphere", degree, *bounded, real=False)

    best = sorted((_best(plans) for plans in found.values()), key=lambda plan: plan.cost)
    feasible = [plan for plan in best if plan.design != "sphere" or 2 * plan.directions <= n]
    return replace(_best(feasible), alternatives=tuple(best))


def _best(plans: Sequence[Plan]) -> Plan:
    """The cheapest that meets the target, or else that of least error."""
    meeting = [plan for plan in plans if plan.meets_target]
    if meeting:
        return min(meeting, key=lambda plan: plan.cost)
    return min(plans, key=lambda plan: (round(plan.expected_error, 9), plan.cost))


def _order_weights(n: int, d: int, profile: Sequence[float] | None) -> np.ndarray:
    """``s_r^2 / sum s_r^2``, ``(L,)``."""
    try:
        norms = np.asarray([0.0] if profile is None else profile, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"`profile` is {profile!r}: give log2 of the norm of each order.") from error
    if norms.ndim != 1 or not len(norms) or not np.isfinite(norms).all():
        raise ConfigurationError(f"`profile` is {profile!r}: give log2 of the norm of each order, finite numbers.")
    logs = [2 * p + r * math.log2(d) - math.log2(_dimension(n, r)) for r, p in enumerate(norms.tolist(), start=1)]
    squares = np.exp2(np.array(logs) - max(logs))
    weights: np.ndarray = squares / squares.sum()
    return weights


def _dimension(n: int, r: int) -> int:
    """``C_r``, that of the symmetric tensors of order ``r``."""
    return math.comb(n + r - 1, r)


def _expected(weights: np.ndarray, missed: Sequence[float]) -> float:
    """Expected error if these parts of the first orders are missed, and all of the later ones."""
    parts = np.ones(len(weights))
    parts[: len(missed)] = missed
    return math.sqrt(parts @ weights)


def _fewest_at_random(n: int, weights: np.ndarray, degree: int, error: float) -> tuple[int, float]:
    """Return the fewest random directions that meet ``error``, or those of ``n`` measurements, and their error."""

    def expected(count: int) -> float:
        dimensions = [_dimension(n, r) for r in range(1, degree + 1)]
        # with half the dimensions measured the unbiased estimate is as wrong as predicting nothing
        parts = [1.0 if 4 * count <= c else first_order_error(2 * count, c) ** 2 for c in dimensions]
        return _expected(weights, parts)

    most = (n + 1) // 2
    count = 1 + bisect.bisect_left(range(1, most), -error, key=lambda k: -expected(k))
    return count, expected(count)


def _off_common(n: int, d: int, r: int) -> float:
    """Part of ``1_D^(x r)`` off the span of ``v^(x r)`` for the directions ``v`` of ``basis+common``.

    By symmetry its projection lies in the span of five sums of ``v^(x r)``, ``v = alpha e_u + beta 1``: over the units
    in ``D`` and those outside, with and without the common mode, and the common mode alone.
    """
    alpha, beta = np.array([1.0, 1, 1, 1, 0]), np.array([0.0, 0, 1, 1, 1]) / math.sqrt(n)
    inside, sizes = np.array([1, 0, 1, 0, 0]), np.array([d, n - d, d, n - d, 1.0])
    shared = sizes * np.equal.outer([0, 1, 0, 1, 2], [0, 1, 0, 1, 2])  # units that two sums have in common
    different = np.outer(alpha, beta) + np.outer(beta, alpha) + n * np.outer(beta, beta)  # v_u . v_w
    same = different + np.outer(alpha, alpha)
    norms = np.sqrt(np.diagonal(same))  # all vectors have unit length below, so that no power overflows
    lengths = np.outer(norms, norms)
    gram = (np.outer(sizes, sizes) - shared) * (different / lengths) ** r + shared * (same / lengths) ** r
    products = sizes * ((alpha * inside + beta * d) / (norms * math.sqrt(d))) ** r
    scale = 1 / np.sqrt(np.maximum(np.diagonal(gram), 1))
    products, gram = products * scale, gram * np.outer(scale, scale)
    left = 1 - float(products @ np.linalg.pinv(gram, rcond=_ROUNDING, hermitian=True) @ products)
    return left if left > _ROUNDING else 0.0


def _median_of_means(
    n: int, weights: np.ndarray, degree: int, error: float, failure_probability: float
) -> tuple[int, float] | None:
    """Return how many sphere directions bound the error so, and the bound; ``None`` if no number does."""
    truncated = _expected(weights, [0.0] * degree)
    groups = math.ceil(8 * math.log(degree / failure_probability))
    deviation = 0.0  # of one direction, beside the typical change; orders added up
    for r in range(1, degree + 1):
        dimension = math.log2(_dimension(n, r))
        rho = 2 ** (2 * dimension - math.log2(_dimension(n, 2 * r)))
        deviation += math.sqrt(max(rho / 2, rho - 1) * weights[r - 1]) * 2 ** (min(dimension, 200) / 2)
    if truncated >= error or deviation > 1e12:
        return None
    size = math.ceil((2 * deviation / (error - truncated)) ** 2)
    return groups * size, truncated + 2 * deviation / math.sqrt(size)


def _check(
    n_units: int, error: float, failure_probability: float | None, deletion_size: int, num_sets: int | None
) -> tuple[int, int]:
    for name, value in (("n_units", n_units), ("deletion_size", deletion_size), ("num_sets", num_sets)):
        if value is None and name == "num_sets":
            continue
        if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value < _MOST:
            raise ConfigurationError(f"`{name}` is {value!r}: give an integer of at least 1, below 2^63.")
    if deletion_size > n_units:
        raise ConfigurationError(f"`deletion_size` is {deletion_size}, and there are {n_units} units: delete fewer.")
    if not isinstance(error, Real) or not 0 < error < 1:
        raise ConfigurationError(f"`error` is {error!r}: give a part of the change, between 0 and 1.")
    p = failure_probability
    if p is not None and (not isinstance(p, Real) or not 0 < p < 1):
        raise ConfigurationError(f"`failure_probability` is {p!r}: give one between 0 and 1.")
    return int(n_units), int(deletion_size)
