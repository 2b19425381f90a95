"""Truncated Taylor arithmetic on one number, in plain Python: the reference that the tensor arithmetic must agree with.

A :class:`ScalarJet` holds ``x_0..x_R``, the normalised coefficients ``x_k = x^(k)(0) / k!`` of ``x(z) = sum_k x_k
z^k``. Every rule below turns an identity between functions, most often a differential equation, into a recurrence.
Source: Griewank & Walther, *Evaluating Derivatives* (2nd ed. 2008), chapter 13.
"""

import cmath
import math
from collections.abc import Sequence
from typing import Union

Operand = Union["ScalarJet", complex]


class ScalarJet:
    """A Taylor series ``x_0 + x_1 z + ... + x_R z^R``, cut after order R.

    Args:
        coefficients: ``x_0..x_R``, real or complex.
    """

    def __init__(self, coefficients: Sequence[complex]) -> None:
        self.c = [complex(value) for value in coefficients]

    def lift(self, other: Operand) -> "ScalarJet":
        """Return ``other`` as a jet of this order; a number is a constant, with higher coefficients zero."""
        return other if isinstance(other, ScalarJet) else ScalarJet([other] + [0] * (len(self.c) - 1))

    def __neg__(self) -> "ScalarJet":
        return ScalarJet([-value for value in self.c])

    def __add__(self, other: Operand) -> "ScalarJet":
        """``y_k = a_k + b_k``."""
        return ScalarJet([a + b for a, b in zip(self.c, self.lift(other).c, strict=True)])

    def __sub__(self, other: Operand) -> "ScalarJet":
        return self + -self.lift(other)

    def __rsub__(self, other: Operand) -> "ScalarJet":
        return -self + other

    def __mul__(self, other: Operand) -> "ScalarJet":
        """``y_k = sum_{j=0..k} a_j b_{k-j}``, the Cauchy product."""
        a, b = self.c, self.lift(other).c
        return ScalarJet([sum(a[j] * b[k - j] for j in range(k + 1)) for k in range(len(a))])

    def __truediv__(self, other: Operand) -> "ScalarJet":
        """``y = a / b``, from ``b y = a``: ``y_k = (a_k - sum_{j=1..k} b_j y_{k-j}) / b_0``."""
        a, b, y = self.c, self.lift(other).c, list[complex]()
        for k in range(len(a)):
            y.append((a[k] - sum(b[j] * y[k - j] for j in range(1, k + 1))) / b[0])
        return ScalarJet(y)

    def __rtruediv__(self, other: Operand) -> "ScalarJet":
        return self.lift(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __pow__(self, exponent: float) -> "ScalarJet":
        """``y = x^p``, from ``x y' = p x' y``: ``k x_0 y_k = sum_{j=1..k} (p j - (k - j)) x_j y_{k-j}``."""
        if exponent >= 0 and exponent == int(exponent):  # products are right also where x_0 = 0
            return self.lift(1) if exponent == 0 else self * self ** (exponent - 1)
        x, y = self.c, [self.c[0] ** exponent]
        for k in range(1, len(x)):
            y.append(sum((exponent * j - (k - j)) * x[j] * y[k - j] for j in range(1, k + 1)) / (k * x[0]))
        return ScalarJet(y)


def integrate(constant: complex, x: ScalarJet, slope: ScalarJet) -> ScalarJet:
    """``y`` with ``y' = slope x'`` and ``y_0 = constant``: ``k y_k = sum_{j=1..k} j x_j slope_{k-j}``."""
    y = [constant]
    for k in range(1, len(x.c)):
        y.append(sum(j * x.c[j] * slope.c[k - j] for j in range(1, k + 1)) / k)
    return ScalarJet(y)


def exp(x: ScalarJet) -> ScalarJet:
    """``y = e^x``, from ``y' = y x'``: ``k y_k = sum_{j=1..k} j x_j y_{k-j}``."""
    y = [cmath.exp(x.c[0])]
    for k in range(1, len(x.c)):
        y.append(sum(j * x.c[j] * y[k - j] for j in range(1, k + 1)) / k)
    return ScalarJet(y)


def log(x: ScalarJet) -> ScalarJet:
    """``y = log x``, from ``y' = x' / x``."""
    return integrate(cmath.log(x.c[0]), x, 1 / x)


def sqrt(x: ScalarJet) -> ScalarJet:
    """``y = x^(1/2)``; the series that is identically zero has the root zero."""
    return x if not any(x.c) else x**0.5


def sigmoid(x: ScalarJet) -> ScalarJet:
    """``y = 1 / (1 + e^-x)``."""
    return 1 / (1 + exp(-x))


def tanh(x: ScalarJet) -> ScalarJet:
    """``y = 2 sigmoid(2 x) - 1``."""
    return 2 * sigmoid(2 * x) - 1


def erf(x: ScalarJet) -> ScalarJet:
    """``y = erf x``, from ``y' = (2 / sqrt(pi)) e^(-x^2) x'``; ``x_0`` must be real, for Python's ``math.erf`` is."""
    if x.c[0].imag != 0:
        raise ValueError(f"`x` has x_0 = {x.c[0]}: erf is for jets around a real number.")
    return integrate(math.erf(x.c[0].real), x, 2 / math.sqrt(math.pi) * exp(-(x * x)))


def gelu(x: ScalarJet) -> ScalarJet:
    """``y = x (1 + erf(x / sqrt 2)) / 2``."""
    return x * (1 + erf(x / math.sqrt(2))) / 2
