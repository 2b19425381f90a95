"""Where piecewise operators have no Taylor series: the points that the kink warning looks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import kinks_of
from lightning_sketch.jets.rules.views import from_end
from lightning_sketch.jets.tensor import block_of, primal_of

aten = torch.ops.aten


def _moves(x: Any) -> Any:
    """Whether any coefficient of an entry is not zero."""
    block = block_of(x)
    return False if block is None else (block != 0).flatten(0, 2).any(0)


def _at(op: Any, corners: Callable[..., Any]) -> None:
    """Register the corners of a function of one variable, given its other arguments."""

    @kinks_of(op)
    def on_corner(x: Any, *args: Any, **kwargs: Any) -> Tensor:
        mask = torch.zeros_like(primal_of(x), dtype=torch.bool)
        for corner in corners(*args, **kwargs):
            if corner is not None:
                mask = mask | (primal_of(x) == primal_of(corner))
        return mask & _moves(x)


for _op in (aten.relu.default, aten.abs.default, aten.leaky_relu.default, aten.elu.default, aten._prelu_kernel.default,
            aten.rrelu_with_noise.default):  # fmt: skip
    _at(_op, lambda *args, **kwargs: (0.0,))
for _op in (aten.hardsigmoid.default, aten.hardswish.default):
    _at(_op, lambda: (-3.0, 3.0))
for _op in (aten.hardshrink.default, aten.softshrink.default):
    _at(_op, lambda lambd=0.5: (-lambd, lambd))
_at(aten.hardtanh.default, lambda min_val=-1.0, max_val=1.0: (min_val, max_val))
_at(aten.threshold.default, lambda threshold, value: (threshold,))
_at(aten.clamp.default, lambda min=None, max=None: (min, max))
_at(aten.clamp_min.default, lambda min: (min,))
_at(aten.clamp_max.default, lambda max: (max,))
_at(aten.linalg_vector_norm.default, lambda ord=2, *args, **kwargs: () if ord % 2 == 0 or math.isinf(ord) else (0.0,))


@kinks_of(aten.maximum.default, aten.minimum.default, aten.fmax.default, aten.fmin.default)
def on_tie(a: Any, b: Any) -> Tensor:
    """Equal entries whose difference moves."""
    return (primal_of(a) == primal_of(b)) & _moves(a - b)


def _ties(extremum: Callable[..., Tensor], *operators: Any) -> None:
    """Register extrema over dimensions: two entries are the largest, and part for some ``z``."""

    @kinks_of(*operators)
    def on_tied_entries(x: Any, dim: Any = (), keepdim: bool = False) -> Tensor:
        x0, block = primal_of(x), block_of(x)
        if block is None or not x.ndim:
            return torch.zeros_like(x0, dtype=torch.bool)
        dims = [from_end(d, x.ndim) for d in ([dim] if isinstance(dim, int) else dim)] or list(range(-x.ndim, 0))
        winners = x0 == extremum(x0, dims, keepdim=True)
        mean = (block * winners).sum(dims, keepdim=True) / winners.sum(dims, keepdim=True)
        apart = (block - mean).abs() > 1e-4 * block.abs().amax(dims, keepdim=True)  # others differ by rounding
        return (apart & winners).any(0).any(0).any(0).amax(dims)


_ties(torch.amax, aten.amax.default, aten.max.dim)
_ties(torch.amin, aten.amin.default, aten.min.dim)
