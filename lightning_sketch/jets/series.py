"""Truncated Taylor arithmetic on coefficient blocks: products, composition, quotient.

A block is one real tensor ``(R, P, K, *S)`` that holds orders ``1..R``; order 0 is a separate real tensor ``S``
shared by all ``K`` directions. ``P = 2`` is the split (re, im) layout of complex coefficients, so that products with
order 0 are real, and only products of two coefficients are complex.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# out += sign * x * y for slices (K, *S) of three blocks, in whichever bilinear product
Accumulate = Callable[[Tensor, Tensor, Tensor, int], object]


def lift(block: Tensor, ndim: int) -> Tensor:
    """View ``(R, P, K, *S)`` with ones before ``S``, so that ``S`` has ``ndim`` dimensions and broadcasts."""
    for _ in range(ndim - (block.ndim - 3)):
        block = block.unsqueeze(3)
    return block


def _add_product(out: Tensor, x: Tensor, y: Tensor, sign: int) -> None:
    out.addcmul_(x, y, value=sign)


def add_cauchy(out: Tensor, a: Tensor, b: Tensor, scale: int = 1) -> None:
    """Add the products of coefficients alone, elementwise: ``out_r += scale * sum_{i+j=r; i,j>=1} a_i b_j``.

    ``a`` may hold fewer orders than ``out``, as may ``b``; missing orders count as zero.
    """
    orders, parts = out.shape[:2]
    for i in range(1, min(orders, a.shape[0] + 1)):
        count = min(orders - i, b.shape[0])
        x, y, into = a[i - 1], b[:count], out[i : i + count]
        _add_product(into[:, 0], x[0], y[:, 0], scale)
        if parts == 2:
            _add_product(into[:, 0], x[1], y[:, 1], -scale)
            _add_product(into[:, 1], x[0], y[:, 1], scale)
            _add_product(into[:, 1], x[1], y[:, 0], scale)


def add_bilinear(out: Tensor, a: Tensor, b: Tensor, accumulate: Accumulate) -> None:
    """Like :func:`add_cauchy` for any bilinear product, given how one pair of slices ``(K, *S)`` is accumulated."""
    orders, parts = out.shape[:2]
    for r in range(2, orders + 1):
        for i in range(1, r):
            x, y, into = a[i - 1], b[r - i - 1], out[r - 1]
            accumulate(into[0], x[0], y[0], 1)
            if parts == 2:
                accumulate(into[0], x[1], y[1], -1)
                accumulate(into[1], x[0], y[1], 1)
                accumulate(into[1], x[1], y[0], 1)


def add_square(out: Tensor, a: Tensor) -> None:
    """Add ``sum_{i+j=r; i,j>=1} a_i a_j``, each unordered pair once."""
    orders, parts = out.shape[:2]
    for r in range(2, orders + 1):
        for i in range(1, r // 2 + 1):
            j = r - i
            twice = 1 if i == j else 2
            x, y, into = a[i - 1], a[j - 1], out[r - 1]
            _add_product(into[0], x[0], y[0], twice)
            if parts == 2:
                _add_product(into[0], x[1], y[1], -twice)
                if i == j:
                    _add_product(into[1], x[0], x[1], 2)
                else:
                    _add_product(into[1], x[0], y[1], 2)
                    _add_product(into[1], x[1], y[0], 2)


def compose(h: Tensor, taylor: Sequence[Tensor]) -> Tensor:
    """Orders ``1..R`` of ``f(x)`` from those of ``x`` and ``taylor[m] = f^(m)(x_0) / m!``, real, shape ``S``.

    Horner's scheme ``f_0 + h (f_1 + h (f_2 + ...))`` in truncated series; ``h`` has no constant term, so the inner
    factors need fewer orders and the number of complex products is that of the recurrences for degrees up to 3.
    """
    orders = h.shape[0]
    inner: Tensor | None = None
    for m in range(orders - 1, -1, -1):
        outer = h[: orders - m] * taylor[m + 1]
        if inner is not None:
            add_cauchy(outer, h, inner)
        inner = outer
    assert inner is not None
    return inner


def divide(a: Tensor | None, y0: Tensor, b0: Tensor, b: Tensor, shape: Sequence[int]) -> Tensor:
    """Orders ``1..R`` of ``y = a / b`` from ``b y = a``: ``y_r = (a_r - sum_{i=1..r} b_i y_{r-i}) / b_0``."""
    out = -(b * y0)
    if out.shape[3:] != torch.Size(shape):
        out = out.expand(*b.shape[:3], *shape).clone()
    if a is not None:
        out += a
    out[0] /= b0
    orders, parts = out.shape[:2]
    for r in range(2, orders + 1):
        into = out[r - 1]
        for i in range(1, r):
            x, y = b[i - 1], out[r - i - 1]
            _add_product(into[0], x[0], y[0], -1)
            if parts == 2:
                _add_product(into[0], x[1], y[1], 1)
                _add_product(into[1], x[0], y[1], -1)
                _add_product(into[1], x[1], y[0], -1)
        into /= b0
    return out
