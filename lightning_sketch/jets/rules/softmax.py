"""Softmax, its logarithm and their adjoints, with the shift that makes the primal sum exactly one."""

from __future__ import annotations

from typing import Any

import torch

from lightning_sketch.jets.equations import evaluate
from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.pointwise import exp, log
from lightning_sketch.jets.rules.views import from_end
from lightning_sketch.jets.series import divide
from lightning_sketch.jets.tensor import JetTensor, jet

aten = torch.ops.aten


def _exponentials(x: JetTensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Orders ``1..R`` of ``exp(x - logsumexp(x_0))``, whose primal is the softmax."""
    return evaluate(lambda s: exp(s, probabilities), x.primal, x.coefficients)[1]


@jet_rule(aten._softmax.default)
def softmax(x: Any, dim: int, half_to_float: bool = False) -> Any:
    """``y = e / sum e``."""
    if not x.ndim:
        return softmax(x.view(1), 0).view(())
    return _softmax_of(x, dim, torch.softmax(x.primal, dim))


@jet_rule(aten._safe_softmax.default)
def safe_softmax(x: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
    """The softmax, zero in rows that are masked whole."""
    if dtype is not None and dtype != x.dtype:
        return safe_softmax(x.to(dtype), dim)
    return _softmax_of(x, dim, aten._safe_softmax(x.primal, dim))


def _softmax_of(x: JetTensor, dim: int, primal: torch.Tensor) -> JetTensor:
    e = _exponentials(x, primal)
    total = e.sum(from_end(dim, x.ndim), keepdim=True)
    return jet(primal, divide(e, primal, None, total, primal.shape), x.lead)


@jet_rule(aten._log_softmax.default)
def log_softmax(x: Any, dim: int, half_to_float: bool = False) -> Any:
    """``y = x - log(sum e)``; the sum's primal is one."""
    if not x.ndim:
        return log_softmax(x.view(1), 0).view(())
    primal = torch.log_softmax(x.primal, dim)
    total = _exponentials(x, primal.exp()).sum(from_end(dim, x.ndim), keepdim=True)
    one = torch.ones_like(primal.sum(dim, keepdim=True))
    return jet(primal, x.coefficients - evaluate(log, one, total)[1], x.lead)


@jet_rule(aten._softmax_backward_data.default)
def softmax_backward(grad: Any, y: Any, dim: int, input_dtype: torch.dtype) -> Any:
    """``y grad - y sum(y grad)``."""
    product = grad * y
    return torch.addcmul(product, y, -product.sum(dim, keepdim=True))


@jet_rule(aten._log_softmax_backward_data.default)
def log_softmax_backward(grad: Any, y: Any, dim: int, input_dtype: torch.dtype) -> Any:
    """``grad - exp(y) sum(grad)``."""
    return grad - y.exp() * grad.sum(dim, keepdim=True)
