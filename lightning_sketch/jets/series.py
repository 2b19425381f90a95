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


def spread(block: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a fresh copy of ``block`` broadcast to trailing shape ``shape``."""
    return lift(block, len(shape)).expand(*block.shape[:3], *shape).clone()


def stretch(block: Tensor, shape: Sequence[int]) -> Tensor:
    """Return ``block`` itself if its trailing shape is ``shape``, otherwise a copy broadcast to it."""
    return block if block.shape[3:] == torch.Size(shape) else spread(block, shape)


def _elementwise(out: Tensor, x: Tensor, y: Tensor, sign: int) -> None:
    out.addcmul_(x, y, value=sign)


def add_product(out: Tensor, x: Tensor, y: Tensor, accumulate: Accumulate = _elementwise, sign: int = 1) -> None:
    """Add ``sign x y`` for blocks whose first dimension is ``P``: real, or complex in four real products."""
    accumulate(out[0], x[0], y[0], sign)
    if out.shape[0] == 2:
        accumulate(out[0], x[1], y[1], -sign)
        accumulate(out[1], x[0], y[1], sign)
        accumulate(out[1], x[1], y[0], sign)


def add_cauchy(out: Tensor, a: Tensor, b: Tensor, scale: int = 1) -> None:
    """Add the products of coefficients alone, elementwise: ``out_r += scale * sum_{i+j=r; i,j>=1} a_i b_j``.

    ``a`` may hold fewer orders than ``out``, as may ``b``; missing orders count as zero.
    """
    orders = out.shape[0]
    for i in range(1, min(orders, a.shape[0] + 1)):
        count = min(orders - i, b.shape[0])
        add_product(out[i : i + count].transpose(0, 1), a[i - 1], b[:count].transpose(0, 1), sign=scale)


def add_bilinear(out: Tensor, a: Tensor, b: Tensor, accumulate: Accumulate) -> None:
    """Like :func:`add_cauchy` for any bilinear product, given how one pair of slices ``(K, *S)`` is accumulated."""
    for r in range(2, out.shape[0] + 1):
        for i in range(1, r):
            add_product(out[r - 1], a[i - 1], b[r - i - 1], accumulate)


def add_square(out: Tensor, a: Tensor) -> None:
    """Add ``sum_{i+j=r; i,j>=1} a_i a_j``, each unordered pair once."""
    orders, parts = out.shape[:2]
    for r in range(2, orders + 1):
        into = out[r - 1]
        for i in range(1, (r + 1) // 2):
            add_product(into, a[i - 1], a[r - i - 1], sign=2)
        if r % 2 == 0:  # the square of one coefficient: its imaginary part is one product, not two
            x = a[r // 2 - 1]
            _elementwise(into[0], x[0], x[0], 1)
            if parts == 2:
                _elementwise(into[0], x[1], x[1], -1)
                _elementwise(into[1], x[0], x[1], 2)


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
    out = stretch(-(b * y0), shape)
    if a is not None:
        out += a
    out[0] /= b0
    for r in range(2, out.shape[0] + 1):
        for i in range(1, r):
            add_product(out[r - 1], b[i - 1], out[r - i - 1], sign=-1)
        out[r - 1] /= b0
    return out
