"""Products and logarithmic sums along a dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.linalg import refused
from lightning_sketch.jets.tensor import primal_of

aten = torch.ops.aten


@jet_rule(aten.prod.dim_int)
def prod_dim(x: Any, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """``y = prod x``, by halves."""
    if dtype is not None and dtype != x.dtype:
        return prod_dim(x.to(dtype), dim, keepdim)
    if not x.ndim:
        return x.clone()
    n = x.shape[dim]
    if n == 0:
        return torch.ones_like(x.sum(dim, keepdim=keepdim))
    while n > 1:
        half = n // 2
        product = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        x = torch.cat([product, x.narrow(dim, 2 * half, n % 2)], dim)
        n = x.shape[dim]
    return x.clone() if keepdim else x.squeeze(dim).clone()


@jet_rule(aten.prod.default)
def prod(x: Any, *, dtype: torch.dtype | None = None) -> Any:
    """The product of all entries."""
    return prod_dim(x.reshape(-1), 0, dtype=dtype)


def _scan(x: Any, dim: int, combine: Callable[[Any, Any], Any]) -> Any:
    if not x.ndim or not x.numel():
        return x.clone()
    results: list[Any] = []
    for entry in x.unbind(dim):
        results.append(combine(results[-1], entry) if results else entry)
    return torch.stack(results, dim)


@jet_rule(aten.cumprod.default)
def cumprod(x: Any, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """``y_i = y_{i-1} x_i``."""
    if x.requires_grad and bool((primal_of(x) == 0).any()):  # autograd divides by entries, and drops those at zero
        raise refused(aten.cumprod.default, "an entry is exactly zero, where its gradient is not formed as a product")
    return _scan(x if dtype is None else x.to(dtype), dim, torch.mul)


@jet_rule(aten.logcumsumexp.default)
def logcumsumexp(x: Any, dim: int) -> Any:
    """``y_i = log(exp(y_{i-1}) + exp(x_i))``."""
    return _scan(x, dim, torch.logaddexp)
