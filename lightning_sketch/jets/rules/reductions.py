"""Sums, means and extrema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, run_constant
from lightning_sketch.jets.rules.products import product_block
from lightning_sketch.jets.rules.views import from_end
from lightning_sketch.jets.tensor import JetTensor, jet

aten = torch.ops.aten


def _dims(x: JetTensor, dim: int | Sequence[int] | None) -> list[int]:
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(-x.ndim, 0))
    return [from_end(d, x.ndim) for d in ([dim] if isinstance(dim, int) else dim)]


def _sum_block(x: JetTensor, dims: list[int], keepdim: bool) -> Tensor:
    return x.coefficients.sum(dims, keepdim=keepdim) if x.ndim else x.coefficients.clone()


@jet_rule(aten.sum.default, aten.sum.dim_IntList)
def sum_rule(x: JetTensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> JetTensor:
    """``y = sum x``."""
    primal = aten.sum.dim_IntList(x.primal, dim, keepdim, dtype=dtype)
    return jet(primal, _sum_block(x, _dims(x, dim), keepdim), x.lead)


@jet_rule(aten.mean.default, aten.mean.dim)
def mean(x: JetTensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> JetTensor:
    """``y = sum x / count``."""
    primal = aten.mean.dim(x.primal, dim, keepdim, dtype=dtype)
    count = x.numel() / max(primal.numel(), 1)
    return jet(primal, _sum_block(x, _dims(x, dim), keepdim) / count, x.lead)


@jet_rule(aten.max.default)
def max_all(x: JetTensor) -> JetTensor:
    """The largest entry of all."""
    return torch.max(x.reshape(-1), 0)[0]  # type: ignore[return-value]


@jet_rule(aten.min.default)
def min_all(x: JetTensor) -> JetTensor:
    """The smallest entry of all."""
    return torch.min(x.reshape(-1), 0)[0]  # type: ignore[return-value]


@jet_rule(aten.amax.default)
def amax(x: JetTensor, dim: Sequence[int] = (), keepdim: bool = False) -> JetTensor:
    """The largest entry over several dimensions; ties share equally, as in autograd."""
    return _extremum(x, aten.amax(x.primal, dim, keepdim), _dims(x, dim), keepdim)


@jet_rule(aten.amin.default)
def amin(x: JetTensor, dim: Sequence[int] = (), keepdim: bool = False) -> JetTensor:
    """The smallest entry over several dimensions; ties share equally, as in autograd."""
    return _extremum(x, aten.amin(x.primal, dim, keepdim), _dims(x, dim), keepdim)


@jet_rule(aten.median.default)
def median(x: JetTensor) -> JetTensor:
    """The middle entry; equal ones share, as in autograd."""
    return _extremum(x, aten.median(x.primal), _dims(x, None), False)


@jet_rule(aten.nanmedian.default)
def nanmedian(x: JetTensor) -> JetTensor:
    """The middle one of the entries that are numbers; equal ones share, as in autograd."""
    return _extremum(x, aten.nanmedian(x.primal), _dims(x, None), False)


def _extremum(x: JetTensor, primal: Tensor, dims: list[int], keepdim: bool) -> JetTensor:
    kept = primal if keepdim or not x.ndim else _unsqueeze_all(primal, dims, x.ndim)
    share = (x.primal == kept).to(x.dtype)
    share /= share.sum(dims, keepdim=True) if x.ndim else 1
    block = x.coefficients * share
    return jet(primal, block.sum(dims, keepdim=keepdim) if x.ndim else block, x.lead)


def _unsqueeze_all(y: Tensor, dims: list[int], ndim: int) -> Tensor:
    for d in sorted(d + ndim for d in dims):
        y = y.unsqueeze(d)
    return y


@jet_rule(aten.linalg_vector_norm.default)
def vector_norm(
    x: JetTensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """The p-norm; ``p = 2`` as the root of the sum of squares."""
    x = x.to(dtype) if dtype is not None else x  # type: ignore[assignment]
    if ord == 2:
        squares = jet(x.primal * x.primal, product_block(x, x, x.shape), x.lead)
        return aten.sum.dim_IntList(squares, dim, keepdim).sqrt()
    if ord == 0:  # how many are not zero
        return run_constant(aten.linalg_vector_norm.default, x, ord, dim, keepdim)
    size = (
        x if ord > 0 and ord % 2 == 0 else x * x.primal.sign()
    )  # an even power is analytic at zero, the absolute value is not
    dims = _dims(x, dim)
    if ord == float("inf"):
        return size.amax(dims, keepdim)
    if ord == float("-inf"):
        return size.amin(dims, keepdim)
    if ord == 1:
        return size.sum(dims, keepdim)
    return size.pow(ord).sum(dims, keepdim).pow(1 / ord)


@jet_rule(aten.var.correction)
def var(x: JetTensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    """Mean squared deviation, with Bessel's correction."""
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


@jet_rule(aten.var_mean.correction)
def var_mean(x: JetTensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    """Variance and mean."""
    dims = _dims(x, dim)
    mean_kept = x.mean(dims, keepdim=True)
    centred = x - mean_kept
    count = x.numel() / max(mean_kept.numel(), 1)
    variance = (centred * centred).sum(dims, keepdim) / max(count - (1 if correction is None else correction), 0)
    return variance, mean_kept if keepdim else mean_kept.sum(dims)


@jet_rule(aten.std.correction)
def std(x: JetTensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    """Root of the variance."""
    return var(x, dim, correction=correction, keepdim=keepdim).sqrt()
