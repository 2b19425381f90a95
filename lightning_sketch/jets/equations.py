"""Functions stated as equations between power series in ``z``, solved for one coefficient after another.

An elementary function solves a differential equation ``y' = g(x, y) x'``. With ``theta = z d/dz`` it reads
``theta y = g theta x``, coefficient ``k`` of which gives ``y_k`` from lower ones (Griewank & Walther, *Evaluating
Derivatives*, ch. 13)::

    k y_k = sum_{i=1..k} i x_i g_{k-i}

A *statement* is a function from the series ``x`` to the series ``y`` that says so once, for instance
``lambda x: x.solve(x[0].tanh(), lambda y: 1 - y * y)``. It is used in two ways. On the identity
``x_0 + z`` it gives the Taylor coefficients ``f_m`` at ``x_0``, which are real, common to all directions, and composed
with the coefficients of ``x`` by Horner's scheme: the fewest products at low degrees, ``O(R^3)`` at high ones. Those of
powers and logarithms grow like ``x_0^-m`` and overflow long before the result does (in float32 ``1 / sqrt(v)^3``, of a
second moment ``v``, below ``v = 1e-26``), so these are stated on ``x_0 + x_0 z`` and composed with ``x / x_0``. On the
series ``x`` itself it gives ``y`` in ``O(R^2)`` products, done by ``O(R)`` operators: every product is online (van der
Hoeven, *Relax, but don't be too lazy*, 2002, in its naive form), that is, a coefficient, once known, is multiplied
with all that are known of the other factor, and the products are added to the orders that they belong to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.series import compose

# None is zero and a number is the same for all entries: neither costs an operator.
Coefficient = Any

# Up to this degree Horner's scheme is the faster one.
HORNER_DEGREE = 6


def _plus(a: Coefficient, b: Coefficient) -> Coefficient:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _minus(a: Coefficient, b: Coefficient) -> Coefficient:
    if b is None:
        return a
    return -b if a is None else a - b


def _times(a: Coefficient, b: Coefficient) -> Coefficient:
    if a is None or b is None:
        return None
    if type(b) is float:
        a, b = b, a
    if type(a) is float and (a == 1 or a == -1):
        return b if a == 1 else -b
    return a * b


class Series:
    """A power series whose coefficients are computed when first asked for, each from lower ones.

    Args:
        zeroth: coefficient 0.
        higher: ``k -> `` coefficient ``k >= 1``. May be set later, in terms of the series itself.
        degree: all coefficients beyond this one are zero.
    """

    __slots__ = ("degree", "higher", "known")

    def __init__(self, zeroth: Coefficient, higher: Callable[[int], Coefficient], degree: int = sys.maxsize) -> None:
        self.known = [zeroth]
        self.higher = higher
        self.degree = degree

    def __getitem__(self, k: int) -> Coefficient:
        while len(self.known) <= k:
            self.known.append(self.higher(len(self.known)))
        return self.known[k]

    def like(self, zeroth: Coefficient, higher: Callable[[int], Coefficient], degree: int = sys.maxsize) -> Series:
        """Make a series of the same kind."""
        return Series(zeroth, higher, degree)

    def product(self, other: Series) -> Series:
        """``sum_i a_i b_{k-i}``, each unordered pair of a square once."""
        a, b = (other, self) if other.degree < self.degree else (self, other)
        first, skipped, square = int(a[0] is None), int(b[0] is None), a is b

        def higher(k: int) -> Coefficient:
            total: Coefficient = None
            for i in range(min(k - skipped, a.degree, k // 2 if square else k), max(first, k - b.degree) - 1, -1):
                x, y, twice = a[i], b[k - i], square and 2 * i != k
                if type(total) is type(x) is type(y) is Tensor:
                    total = torch.addcmul(total, x, y, value=2 if twice else 1)
                else:
                    term = _times(x, y)
                    total = _plus(total, _times(2.0, term) if twice else term)
            return total

        return self.like(_times(a[0], b[0]), higher)

    def unknown(self, zeroth: Coefficient) -> Series:
        """A series of which coefficient 0 is known; ``higher`` is to be set."""
        return self.like(zeroth, lambda k: None)

    def integrate(self, rate: Series) -> None:
        """Set the higher coefficients from ``theta y = rate``."""
        self.higher = lambda k: _times(1 / k, rate[k])

    def integral(self, zeroth: Coefficient, rate: Series) -> Series:
        """The series ``y`` with this coefficient 0 and ``theta y = rate``."""
        y = self.unknown(zeroth)
        y.integrate(rate)
        return y

    def drive(self, y: Series, slope: Series) -> None:
        """Set the higher coefficients of ``y`` from ``y' = slope x'``, ``x`` being this series."""
        y.integrate(slope * self.theta())

    def solve(self, zeroth: Coefficient, slope: Callable[[Series], Series]) -> Series:
        """The series ``y`` with this coefficient 0 and ``y' = slope(y) x'``, ``x`` being this series."""
        y = self.unknown(zeroth)
        self.drive(y, slope(y))
        return y

    def theta(self) -> Series:
        """``z d/dz``: coefficients ``k x_k``."""
        return self.like(None, lambda k: _times(float(k), self[k]), self.degree)

    def moving(self) -> Series:
        """The series less its coefficient 0."""
        return self.like(None, self.__getitem__, self.degree)

    def sqrt(self) -> Series:
        """From ``y^2 = x``: ``2 y_0 y_k = x_k - sum_{i=1..k-1} y_i y_{k-i}``; zero where ``x_0 = 0``.

        A second moment or a norm is exactly zero only where everything it was made of is zero, for every ``z``; then so
        is its root.
        """
        y0 = self[0].sqrt()
        scale = torch.where(y0 == 0, 0.0, 0.5 / y0)
        y = self.unknown(y0)
        inner = y.moving()
        square = inner * inner
        y.higher = lambda k: _times(_minus(self[k], square[k]), scale)
        return y

    def __add__(self, other: Any) -> Series:
        if isinstance(other, Series):
            return self.like(_plus(self[0], other[0]), lambda k: _plus(self[k], other[k]))
        return self.like(_plus(self[0], other), self.__getitem__, self.degree)

    __radd__ = __add__

    def __neg__(self) -> Series:
        return self * -1.0

    def __sub__(self, other: Any) -> Series:
        if isinstance(other, Series):
            return self.like(_minus(self[0], other[0]), lambda k: _minus(self[k], other[k]))
        return self + -other

    def __rsub__(self, other: Any) -> Series:
        return self.like(other - self[0], lambda k: _minus(None, self[k]), self.degree)

    def __mul__(self, other: Any) -> Series:
        if isinstance(other, Series):
            return self.product(other)
        return self.like(_times(self[0], other), lambda k: _times(self[k], other), self.degree)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Series:
        """From ``b q = a``: ``q_k = (a_k - sum_{i=1..k} b_i q_{k-i}) / b_0``."""
        if not isinstance(other, Series):
            return self * (1 / other)
        q = self.unknown(None if self[0] is None else self[0] / other[0])
        rest, divisor = other.moving() * q, other[0]

        def higher(k: int) -> Coefficient:
            left = _minus(self[k], rest[k])
            return None if left is None else left / divisor  # whose reciprocal may overflow

        q.higher = higher
        return q

    def __rtruediv__(self, other: Any) -> Series:
        return self.like(other, lambda k: None) / self

    @staticmethod
    def where(condition: Tensor, a: Series, b: Series) -> Series:
        """Choose by a condition on entries."""

        def choose(k: int) -> Coefficient:
            x, y = a[k], b[k]
            if x is None and y is None:
                return None
            return torch.where(condition, 0.0 if x is None else x, 0.0 if y is None else y)

        return a.like(choose(0), choose)


class Identity(Series):
    """The series ``x_0 + scale z``."""

    __slots__ = ("scale",)

    def __init__(self, x0: Tensor, scale: Coefficient = 1.0) -> None:
        super().__init__(x0, lambda k: scale if k == 1 else None, 1)
        self.scale = scale

    def drive(self, y: Series, slope: Series) -> None:
        """Set the higher coefficients of ``y`` from ``y' = scale slope``."""
        y.higher = lambda k: _times(_times(1 / k, slope[k - 1]), self.scale)


class BlockSeries(Series):
    """A series whose coefficients ``1..R`` lie in one block ``(R, K, *S)``, real or complex; coefficient 0 is real.

    Only factors of products need their block, so that only these have one.

    Args:
        zeroth: coefficient 0.
        higher: as for :class:`Series`.
        template: a block of the shape, dtype and device of this one.
    """

    def __init__(self, zeroth: Coefficient, higher: Callable[[int], Coefficient], template: Tensor) -> None:
        super().__init__(zeroth, higher)
        self.template = template
        self._block: Tensor | None = None
        self._theta: BlockSeries | None = None

    @classmethod
    def given(cls, zeroth: Coefficient, block: Tensor) -> BlockSeries:
        """Make a series that is known already."""
        x = cls(zeroth, lambda k: None, block)
        x.known += block.unbind(0)
        x._block = block
        return x

    @property
    def orders(self) -> int:
        """``R``."""
        return self.template.shape[0]

    @property
    def block(self) -> Tensor:
        """Coefficients ``1..R``, zero where not yet known."""
        if self._block is None:
            self._block = torch.zeros_like(self.template)
            for k in range(1, len(self.known)):
                self._store(k)
        return self._block

    def _store(self, k: int) -> None:
        if self._block is not None and self.known[k] is not None:
            self.known[k] = self._block[k - 1].copy_(self.known[k])

    def __getitem__(self, k: int) -> Coefficient:
        while len(self.known) <= k:
            self.known.append(self.higher(len(self.known)))
            self._store(len(self.known) - 1)
        return self.known[k]

    def like(self, zeroth: Coefficient, higher: Callable[[int], Coefficient], degree: int = sys.maxsize) -> Series:
        """Make a series of the same kind."""
        return BlockSeries(zeroth, higher, self.template)

    def theta(self) -> Series:
        """``z d/dz`` of a series that can be known."""
        if self._theta is None:
            self[self.orders]
            ranks = torch.arange(1, self.orders + 1, dtype=self.template.real.dtype, device=self.template.device)
            self._theta = BlockSeries.given(None, self.block * ranks.view(-1, *[1] * (self.template.ndim - 1)))
        return self._theta

    def product(self, other: Series) -> Series:
        """The online product."""
        assert isinstance(other, BlockSeries)
        return _Product(self, other)


class _Product(BlockSeries):
    """Coefficient ``k`` takes the products of coefficients up to ``k - 1`` out of the block that they were added to."""

    def __init__(self, a: BlockSeries, b: BlockSeries) -> None:
        super().__init__(_times(a[0], b[0]), self._finish, a.template)
        if len(a.known) > self.orders:
            a, b = b, a
        self.a, self.b = a, b
        self.whole = len(b.known) > self.orders
        self.factors = a.block, b.block
        self.sums = torch.zeros_like(a.template)

    @property
    def block(self) -> Tensor:
        return self.sums

    def _finish(self, k: int) -> Tensor:
        a, b, into = self.a, self.b, self.sums[k - 1]
        if k > 1:
            self._push(k - 1)
        if a[0] is not None:
            self._add(into, a[0], b[k], 2 if a is b else 1)
        if b[0] is not None and a is not b:
            self._add(into, b[0], a[k])
        return into

    @staticmethod
    def _add(into: Tensor, x: Coefficient, y: Coefficient, weight: int = 1) -> None:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            into.addcmul_(x, y, value=weight)
        elif x is not None and y is not None:
            into.add_(y, alpha=weight * x)

    def _push(self, i: int) -> None:
        """Add the products of coefficient ``i`` of a factor with those of the other up to ``i``, or all if known."""
        (a, b), x, y = self.factors, self.a[i], self.b[i]
        count = min(self.orders if self.whole else i, self.orders - i)
        if self.a is self.b:
            count = min(i - 1, self.orders - i)
            self._add(self.sums[i : i + count], x, b[:count], 2)
            if 2 * i <= self.orders:
                self._add(self.sums[2 * i - 1], x, x)
            return
        self._add(self.sums[i : i + count], x, b[:count])
        if not self.whole:
            count = min(i - 1, self.orders - i)
            self._add(self.sums[i : i + count], y, a[:count])


# from the series x to the series y, in terms of x_0 and its coefficients alone
Statement = Callable[[Series], Series]


def evaluate(statement: Statement, x0: Tensor, coefficients: Tensor, relative: bool = False) -> tuple[Tensor, Tensor]:
    """Coefficient 0 and the orders ``1..R`` of ``y``, given those of ``x``: ``(R, P, K, *S)``.

    ``relative``: singular at ``x_0 = 0`` and nowhere else, hence composed with ``x / x_0``.
    """
    orders, parts = coefficients.shape[:2]
    if orders <= HORNER_DEGREE:
        if relative:
            scale = torch.where(x0 == 0, 1.0, x0)
            y, coefficients = statement(Identity(x0, scale)), coefficients / scale
        else:
            y = statement(Identity(x0))
        return y[0], compose(coefficients, [y[m] for m in range(orders + 1)])
    dtype = torch.promote_types(x0.dtype, torch.float32)  # there are no complex numbers of lower precision
    h = coefficients.to(dtype)
    x = BlockSeries.given(x0.to(dtype), torch.complex(h[:, 0], h[:, 1]) if parts == 2 else h[:, 0])
    y = statement(x)
    assert isinstance(y, BlockSeries)
    y[orders]
    return y[0].to(x0.dtype), torch.stack((y.block.real, y.block.imag) if parts == 2 else (y.block,), 1)
