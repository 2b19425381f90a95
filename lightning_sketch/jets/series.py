"""Truncated Taylor arithmetic on coefficient blocks: products, composition, quotient.

A block is one real tensor ``(R, P, K, *S)`` that holds orders ``1..R``; order 0 is a separate real tensor ``S``
shared by all ``K`` directions. ``P = 2`` is the split (re, im) layout of complex coefficients, so that products with
order 0 are real, and only products of two coefficients are complex.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def add_product(out: Tensor, x: Tensor, y: Tensor, scale: int = 1) -> None:
    """Add ``scale x y`` for blocks whose first dimension is ``P``: real, or complex in four real products."""
    out[0].addcmul_(x[0], y[0], value=scale)
    if out.shape[0] == 2:
        out[0].addcmul_(x[1], y[1], value=-scale)
        out[1].addcmul_(x[0], y[1], value=scale)
        out[1].addcmul_(x[1], y[0], value=scale)


def add_cauchy(out: Tensor, a: Tensor, b: Tensor, scale: int = 1) -> None:
    """Add the products of coefficients alone, elementwise: ``out_r += scale * sum_{i+j=r; i,j>=1} a_i b_j``.

    ``a`` may hold fewer orders than ``out``, as may ``b``; missing orders count as zero.
    """
    orders = out.shape[0]
    for i in range(1, min(orders, a.shape[0] + 1)):
        count = min(orders - i, b.shape[0])
        add_product(out[i : i + count].transpose(0, 1), a[i - 1], b[:count].transpose(0, 1), scale)


def real_products(a: Tensor, b: Tensor, expensive: bool) -> list[tuple[Tensor, Tensor, dict[int, int]]]:
    """Real products that make up a bilinear product of blocks ``(R, P, K, *S)``.

    Complex ones are ``re re - im im`` and ``re im + im re``, or, where a product is more expensive than sums of its
    factors, ``t - im (re + im)`` and ``t + re (im - re)`` with ``t = (re + im) re`` (Gauss; Higham, *Accuracy and
    Stability of Numerical Algorithms*, sec. 23.2.4).

    Returns:
        Factors ``(R, K, *S)``, and the sign with which each part of the result receives their product.
    """
    x, y = a.unbind(1), b.unbind(1)
    if len(x) == 1:
        return [(x[0], y[0], {0: 1})]
    if not expensive:
        return [(x[0], y[0], {0: 1}), (x[1], y[1], {0: -1}), (x[0], y[1], {1: 1}), (x[1], y[0], {1: 1})]
    return [(x[0] + x[1], y[0], {0: 1, 1: 1}), (x[1], y[0] + y[1], {0: -1}), (x[0], y[1] - y[0], {1: 1})]


def add_square(out: Tensor, a: Tensor) -> None:
    """Add ``sum_{i+j=r; i,j>=1} a_i a_j``, each unordered pair once."""
    orders, parts = out.shape[:2]
    if orders == 1:
        return
    even, x = out[1::2], a[: orders // 2]  # the square of one coefficient: its imaginary part is one product, not two
    even[:, 0].addcmul_(x[:, 0], x[:, 0])
    if parts == 2:
        even[:, 0].addcmul_(x[:, 1], x[:, 1], value=-1)
        even[:, 1].addcmul_(x[:, 0], x[:, 1], value=2)
    for i in range(2, orders):
        count = min(i - 1, orders - i)
        add_product(out[i : i + count].transpose(0, 1), a[i - 1], a[:count].transpose(0, 1), 2)


def compose(h: Tensor, taylor: Sequence[Tensor | float | None]) -> Tensor:
    """Orders ``1..R`` of ``f(x)`` from those of ``x`` and ``taylor[m] = f^(m)(x_0) / m!``, real, shape ``S``.

    Horner's scheme ``f_0 + h (f_1 + h (f_2 + ...))`` in truncated series; ``h`` has no constant term, so the inner
    factors need fewer orders and the number of complex products is that of the recurrences for degrees up to 3.
    ``None`` stands for zero.
    """
    orders = h.shape[0]
    degree = max([m for m in range(1, orders + 1) if taylor[m] is not None], default=1)
    inner: Tensor | None = None
    for m in range(degree - 1, -1, -1):
        factor = taylor[m + 1]
        outer = h[: orders - m] * (0.0 if factor is None else factor)
        if inner is not None:
            add_cauchy(outer, h, inner)
        inner = outer
    assert inner is not None
    return inner


def divide(a: Tensor | None, y0: Tensor, b0: Tensor | None, b: Tensor, shape: Sequence[int]) -> Tensor:
    """Orders ``1..R`` of ``y = a / b`` from ``b y = a``: ``y_r = (a_r - sum_{i=1..r} b_i y_{r-i}) / b_0``.

    ``None`` stands for ``a`` zero and for ``b_0`` one.
    """
    out = stretch(b * -y0 if a is None else torch.addcmul(a, b, y0, value=-1), shape)
    orders = out.shape[0]
    for r in range(1, orders + 1):
        if b0 is not None:
            out[r - 1].div_(b0)
        if r < orders:
            add_product(out[r:].transpose(0, 1), out[r - 1], b[: orders - r].transpose(0, 1), -1)
    return out
