"""What the orders beyond a sketch's degree may hold, judged from the sizes of the Taylor terms of a deletion."""

import math

import numpy as np

# Ratio of consecutive terms beyond which the sum of a series can not be told.
LARGEST_RATIO = 0.9
# Cosine between the last two terms, over the outputs, from which on the next term is taken to continue them.
LEAST_COSINE = 0.9


def tail(terms: np.ndarray, errors: np.ndarray, profile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the standard deviation of the sum of the orders left out, and whether the terms can be trusted.

    The size ``|t_r|`` of a deletion's term is its root mean square over the outputs, its standard error included. With
    ``rho`` the largest ratio ``|t_r| / |t_(r-1)|``, in denominators at most :data:`LARGEST_RATIO`:

    - The orders left out are taken to fall by ``rho`` each and to have independent signs, so their sum has the standard
      deviation ``rho / sqrt(1 - rho^2)`` times the last term. That last term is, for one output, the root mean square
      of its own value (which may be small by chance) and of the deletion's ``|t_R|`` shared out by ``profile``.
    - The prediction is reliable if its error, were all orders left out of the same sign (``rho / (1 - rho)`` times the
      last term), is still below what the orders above the first change: if not, the first order alone may be as good,
      and the series may not converge at all. Where the ratios grow, ``rho`` is here at least the next one, were it to
      grow by the same factor again: terms fall ever more slowly where a series converges slowly or not at all.

    From one order no ratio can be had: the tail is then as large as the term, and nothing is reliable.

    Args:
        terms: ``(R, m, O)`` float64.
        errors: ``(R, m, O)``, the standard error that each term adds to the sum.
        profile: ``(O,)``, typical size of the last order's terms of each output, up to a common factor.

    Returns:
        Standard deviations ``(m, O)``, and ``(m,)`` bool.
    """
    sizes = _size(np.hypot(terms, errors))
    whole = _size(profile)
    shares = profile / (whole if whole > 0 else 1)
    last = np.hypot(np.hypot(terms[-1], errors[-1]), sizes[-1][:, None] * shares) / math.sqrt(2)
    if len(terms) == 1:
        return last, np.zeros(terms.shape[1], dtype=bool)
    with np.errstate(divide="ignore", invalid="ignore"):  # a term under which there is none has an infinite ratio
        ratios = np.where(sizes[1:] > 0, sizes[1:] / sizes[:-1], 0.0)
        largest = ratios.max(axis=0)
        capped = np.minimum(largest, LARGEST_RATIO)
        deviation = np.where(last > 0, (largest / np.sqrt(1 - capped**2))[:, None] * last, 0.0)
        following = largest
        if len(ratios) > 1:
            following = np.where(ratios[-1] > 0, np.maximum(largest, ratios[-1] ** 2 / ratios[-2]), largest)
        rest = following / (1 - np.minimum(following, LARGEST_RATIO)) * sizes[-1]
        error = np.hypot(_size(errors.sum(axis=0)), rest)
        reliable: np.ndarray = error <= _size(terms[1:].sum(axis=0))
    return deviation, reliable


def resum(terms: np.ndarray, reliable: np.ndarray) -> np.ndarray:
    """Return an estimate of the order left out next, ``rho t_R``; zero where it can not be told.

    ``rho = <t_R, t_(R-1)> / |t_(R-1)|^2`` over the outputs: the ratio of minimal polynomial extrapolation of order 1
    (Sidi, *Vector Extrapolation Methods with Applications*, chapter 1), of whose geometric tail only the first term is
    taken. It is told where the prediction is reliable and the last two terms have nearly
    the same direction: a cosine of at least :data:`LEAST_COSINE`. One output alone has no direction.

    Args:
        terms: ``(R, m, O)``.
        reliable: ``(m,)`` bool.

    Returns:
        ``(m, O)``.
    """
    if len(terms) == 1 or terms.shape[2] == 1:
        return np.zeros(terms.shape[1:])
    before, last = _size(terms[-2]), _size(terms[-1])
    usable = reliable & (before > 0) & (last > 0)
    before, last = np.where(usable, before, 1), np.where(usable, last, 1)
    cosine = np.mean((terms[-2] / before[:, None]) * (terms[-1] / last[:, None]), axis=1)
    ratio = np.where(usable & (cosine >= LEAST_COSINE), np.minimum(cosine * last / before, LARGEST_RATIO), 0.0)
    left_out: np.ndarray = ratio[:, None] * terms[-1]
    return left_out


def _size(values: np.ndarray) -> np.ndarray:
    """Return the root mean square over the last axis; squares neither overflow nor underflow."""
    largest = np.abs(values).max(axis=-1, initial=0)
    scale = np.where(largest > 0, largest, 1)
    squares = np.square(values / scale[..., None])
    size: np.ndarray = scale * np.sqrt(squares.sum(axis=-1) / max(1, values.shape[-1]))
    return size
