"""Taylor coefficients of a whole training run from complex retrainings on a circle.

Training is an analytic function ``f`` of the deletion weights ``x``, so along a direction ``psi``
``f(psi z) = sum_r c_r z^r`` and, by Cauchy's formula with the trapezoidal rule on ``|z| = rho``,
``c_r = rho^-r (1/N) sum_j f(psi rho w^j) w^(-r j)`` with ``w = exp(2 pi i / N)``: one FFT of N retrainings.

Two errors compete. Aliasing adds ``c_(r+N) rho^N + c_(r+2N) rho^2N + ...`` and falls with N and with a smaller ``rho``;
rounding is ``1e-16 |f| / rho^r`` and falls with a larger ``rho``. A good ``rho`` is a third of the radius of
convergence, with N = 24 to 32 points.
Source: Fornberg, *Numerical differentiation of analytic functions* (ACM TOMS 1981); Trefethen & Weideman, *The
exponentially convergent trapezoidal rule* (SIAM Review 2014).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Train = Callable[[Array], Array]


def taylor_coefficients(train: Train, direction: npt.ArrayLike, degree: int, radius: float, points: int) -> Array:
    """Return ``c_1..c_degree`` of ``z -> train(direction * z)``, complex, shape ``(degree, *out)``.

    Args:
        train: Maps deletion weights ``(N, n)`` complex to the outputs ``(N, *out)`` of N trainings; holomorphic.
        direction: ``psi``, shape ``(n,)``, real or complex.
        degree: Highest order wanted.
        radius: ``rho > 0``, inside the radius of convergence.
        points: N, how many points on the circle; more than ``2 * degree``.

    Returns:
        The coefficients, order 1 first.

    Raises:
        ValueError: If there are too few points for the degree.
        ArithmeticError: If the highest orders seen have not sunk to rounding: aliasing would spoil the coefficients.
    """
    if points <= 2 * degree:
        raise ValueError(f"`points` is {points}: give more than twice the degree {degree}.")
    circle = radius * np.exp(2j * np.pi * np.arange(points) / points)
    values = np.asarray(train(circle[:, None] * np.asarray(direction)))
    scaled = np.fft.fft(values, axis=0) / points  # row r is c_r rho^r, plus its aliases
    size = np.abs(scaled).reshape(points, -1).max(axis=1)
    # Row N-1 is c_(N-1) rho^(N-1), more than any alias c_(N+r) rho^(N+r) of a series that converges well on the circle.
    # Two rows, for every second coefficient of an even or odd function is zero.
    if size[-2:].max() > 1e-13 * size.max():
        raise ArithmeticError(
            f"the last two of {points} orders are {size[-2:]}: take more `points` or a smaller `radius`."
        )
    orders = np.arange(1, degree + 1).reshape(-1, *[1] * (values.ndim - 1))
    return scaled[1 : degree + 1] / float(radius) ** orders


def disagreement(
    train: Train, direction: npt.ArrayLike, degree: int, radii: tuple[float, float], points: int
) -> tuple[Array, Array]:
    """Compute the coefficients on two circles, which share neither aliasing nor rounding, and say how far they differ.

    Args:
        train: As in :func:`taylor_coefficients`.
        direction: As in :func:`taylor_coefficients`.
        degree: Highest order wanted.
        radii: The two radii; the first one's coefficients are returned.
        points: Points on each circle.

    Returns:
        ``(degree, *out)`` coefficients, and ``(degree,)`` the largest difference of each order over its largest
        coefficient.
    """
    first, second = (taylor_coefficients(train, direction, degree, radius, points) for radius in radii)
    largest = np.abs(first).reshape(degree, -1).max(axis=1)
    return first, np.abs(first - second).reshape(degree, -1).max(axis=1) / largest
