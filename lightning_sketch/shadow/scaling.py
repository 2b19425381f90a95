"""Powers of two that keep the coefficients of every order within what a dtype holds.

Order ``r`` along ``s psi`` is ``s^r`` times that along ``psi``, and where ``s`` is a power of two every operation
rounds the same. So direction ``k`` is carried as ``2^e_k psi_k``, and order ``r`` as ``2^(r e_k) c_kr``: a series that
falls or grows geometrically neither underflows nor overflows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

MAX_EXPONENT = 4096  # beyond any number in float64 at order 1


def exponents_of(directions: np.ndarray) -> np.ndarray:
    """Return ``e``, int64 ``(k,)``, for which ``max_u |psi_ku| 2^e_k`` is in ``[0.5, 1)``; 0 for a direction of zeros.

    Args:
        directions: ``(k, n)``, complex or real.
    """
    return -np.frexp(np.abs(directions).max(axis=1))[1].astype(np.int64)


def scale_orders(block: Tensor, shift: np.ndarray) -> Tensor:
    """Return order ``r`` of direction ``k`` times ``2^(r shift_k)``, exact where the dtype holds the result.

    Args:
        block: coefficients ``(R, P, k, *S)``.
        shift: integers ``(k,)``.
    """
    largest = _bits(block.dtype) - 2
    left = np.outer(np.arange(1, len(block) + 1), shift).clip(-3 * largest, 3 * largest)  # more only gives 0 or inf
    while left.any():  # 2^left itself may be more than the dtype holds where the product is not
        part = left.clip(-largest, largest)
        factor = torch.as_tensor(np.exp2(part), dtype=block.dtype, device=block.device)
        block = block * factor.reshape(len(block), 1, -1, *[1] * (block.ndim - 3))
        left = left - part
    return block


def choose_shift(largest: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return by how much the exponents should change, int64 ``(k,)``; zero while every order is in a comfortable range.

    The range, a third of the exponents of the dtype, leaves room for what a step computes on the way and for its growth
    in one step. A shift down, for orders above it, makes ``max_r m_r^(1/r)`` one, rounded down, but stops short of
    where an order would lose bits to underflow, unless another would stay above the range. A shift up, for orders below
    it, goes as far as these need but not beyond one: in the first steps and while a learning rate warms up the series
    grows fast. Orders that are exactly zero say nothing, and the first alone does not tell how fast the others fall.

    Args:
        largest: ``m_r``, the largest absolute coefficient of order ``r`` along each direction, finite, ``(R, k)``.
        dtype: of the coefficients.
    """
    limit = _bits(dtype) // 3
    known = largest > 0
    above, below = (largest > 2.0**limit).any(axis=0), (known & (largest < 2.0**-limit))[1:].any(axis=0)
    if not (above | below).any():
        return np.zeros(largest.shape[1], dtype=np.int64)
    lossless = math.log2(torch.finfo(dtype).tiny / torch.finfo(dtype).eps)
    orders = np.arange(1, len(largest) + 1)[:, None]
    logs = np.log2(largest, out=np.zeros_like(largest), where=known)

    def largest_below(log: float) -> np.ndarray:
        """The largest shift that keeps all orders at or below ``2^log``; infinite where all are zero."""
        return np.floor(np.where(known, (log - logs) / orders, np.inf).min(axis=0))

    def smallest_above(log: float) -> np.ndarray:
        return np.ceil(np.where(known, (log - logs) / orders, -np.inf).max(axis=0))

    down = np.maximum(largest_below(0), np.minimum(smallest_above(lossless), 0))
    down = np.minimum(down, largest_below(limit))
    up = np.maximum(np.minimum(largest_below(0), smallest_above(-limit)), 0)
    return np.where(above, down, np.where(below, up, 0)).astype(np.int64)


def _bits(dtype: torch.dtype) -> int:
    return math.frexp(torch.finfo(dtype).max)[1]  # 128 for float32, 1024 for float64
