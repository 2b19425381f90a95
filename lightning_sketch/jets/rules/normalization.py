"""Layer, group and batch normalisation with their adjoints, and dropout.

All three norms are ``y = (x - mean) rstd`` over some dimensions followed by an affine map, so they share the two
functions below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lightning_sketch.jets.registry import jet_rule, run_constant
from lightning_sketch.jets.tensor import JetTensor, jet

aten = torch.ops.aten


def _moments(x: Any, dims: Sequence[int]) -> tuple[Any, Any, Any]:
    """Return mean, biased variance and the centred input."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    return mean, (centred * centred).mean(dims, keepdim=True), centred


def _adjoint(grad: Any, normalised: Any, rstd: Any, dims: Sequence[int]) -> Any:
    """Gradient of the input, given that of ``normalised``: ``rstd (g - mean(g) - y mean(g y))``."""
    shared = grad.mean(dims, keepdim=True)
    along = (grad * normalised).mean(dims, keepdim=True)
    return rstd * torch.addcmul(grad - shared, normalised, -along)


def _affine(y: Any, weight: Any, bias: Any) -> Any:
    if weight is None:
        return y if bias is None else y + bias
    return y * weight if bias is None else torch.addcmul(bias, y, weight)


@jet_rule(aten.native_layer_norm.default)
def layer_norm(x: Any, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Any, Any, Any]:
    """Normalise over the last dimensions."""
    dims = list(range(-len(normalized_shape), 0))
    mean, variance, centred = _moments(x, dims)
    rstd = (variance + eps).rsqrt()
    return _affine(centred * rstd, weight, bias), mean, rstd


@jet_rule(aten.native_layer_norm_backward.default)
def layer_norm_backward(
    grad: Any,
    x: Any,
    normalized_shape: Sequence[int],
    mean: Any,
    rstd: Any,
    weight: Any,
    bias: Any,
    output_mask: Sequence[bool],
) -> tuple[Any, Any, Any]:
    """The adjoints of :func:`layer_norm`."""
    dims = list(range(-len(normalized_shape), 0))
    others = list(range(x.ndim - len(normalized_shape)))
    normalised = (x - mean) * rstd
    scaled = grad if weight is None else grad * weight
    return (
        _adjoint(scaled, normalised, rstd, dims) if output_mask[0] else None,
        _sum(grad * normalised, others) if output_mask[1] else None,
        _sum(grad, others) if output_mask[2] else None,
    )


def _sum(x: Any, dims: list[int]) -> Any:
    return x.sum(dims) if dims else x


@jet_rule(aten.native_group_norm.default)
def group_norm(
    x: Any, weight: Any, bias: Any, n: int, channels: int, spatial: int, groups: int, eps: float
) -> tuple[Any, Any, Any]:
    """Normalise over groups of channels and all positions."""
    mean, variance, centred = _moments(x.reshape(n, groups, channels // groups * spatial), [2])
    rstd = (variance + eps).rsqrt()
    y = (centred * rstd).reshape(x.shape)
    return _affine(y, _per_channel(weight, x), _per_channel(bias, x)), mean.squeeze(2), rstd.squeeze(2)


def _per_channel(p: Any, x: Any) -> Any:
    return None if p is None else p.reshape(-1, *[1] * (x.ndim - 2))


@jet_rule(aten.native_group_norm_backward.default)
def group_norm_backward(
    grad: Any, x: Any, mean: Any, rstd: Any, weight: Any, n: int, channels: int, spatial: int, groups: int,
    output_mask: Sequence[bool],
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The adjoints of :func:`group_norm`."""
    rstd = rstd.unsqueeze(2)
    shape = (n, groups, channels // groups * spatial)
    normalised = (x.reshape(shape) - mean.unsqueeze(2)) * rstd
    scaled = (grad if weight is None else grad * _per_channel(weight, x)).reshape(shape)
    others = [0, *range(2, x.ndim)]
    return (
        _adjoint(scaled, normalised, rstd, [2]).reshape(x.shape) if output_mask[0] else None,
        (grad * normalised.reshape(x.shape)).sum(others) if output_mask[1] else None,
        grad.sum(others) if output_mask[2] else None,
    )


@jet_rule(aten.native_batch_norm.default, aten._native_batch_norm_legit.default)
def batch_norm(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, Any, Any]:
    """Normalise over everything but the channels; the running statistics are series too, updated in place."""
    if training:
        dims = [0, *range(2, x.ndim)]
        mean, variance, centred = _moments(x, dims)
        if running_mean is not None:
            count = math.prod(x.shape[d] for d in dims)
            unbiased = variance.reshape(-1) * (count / max(count - 1, 1))
            running_mean.copy_(running_mean + momentum * (mean.reshape(-1) - running_mean))
            running_var.copy_(running_var + momentum * (unbiased - running_var))
    else:
        mean, variance = _per_channel(running_mean, x), _per_channel(running_var, x)
        centred = x - mean
    rstd = (variance + eps).rsqrt()
    y = _affine(centred * rstd, _per_channel(weight, x), _per_channel(bias, x))
    if not training:
        return y, x.new_zeros(0), x.new_zeros(0)
    return y, mean.reshape(-1), rstd.reshape(-1)


@jet_rule(aten._batch_norm_with_update.default)
def batch_norm_with_update(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float, eps: float
) -> tuple[Any, Any, Any, Any]:
    """Batch normalisation in training; the last result is room that fused kernels want."""
    y = batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
    return (*y, torch.empty(0, dtype=torch.uint8, device=x.device))


@jet_rule(aten._native_batch_norm_legit.no_stats)
def batch_norm_no_stats(
    x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, Any, Any]:
    """Batch normalisation without running statistics."""
    return batch_norm(x, weight, bias, None, None, training, momentum, eps)


@jet_rule(aten.native_batch_norm_backward.default)
def batch_norm_backward(
    grad: Any, x: Any, weight: Any, running_mean: Any, running_var: Any, mean: Any, rstd: Any, train: bool, eps: float,
    output_mask: Sequence[bool],
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The adjoints of :func:`batch_norm`; in evaluation mode the statistics are constants of the input."""
    dims = [0, *range(2, x.ndim)]
    if not train:
        mean, rstd = running_mean, (running_var + eps).rsqrt()
    rstd = _per_channel(rstd, x)
    normalised = (x - _per_channel(mean, x)) * rstd
    scaled = grad if weight is None else grad * _per_channel(weight, x)
    grad_input = None
    if output_mask[0]:
        grad_input = _adjoint(scaled, normalised, rstd, dims) if train else scaled * rstd
    return (
        grad_input,
        (grad * normalised).sum(dims) if output_mask[1] else None,
        grad.sum(dims) if output_mask[2] else None,
    )


@jet_rule(aten.cudnn_batch_norm.default)
def cudnn_batch_norm(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, Any, Any, Any]:
    """Batch normalisation on a GPU; the last result is room that the kernel wants."""
    y = batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    return (*y, torch.empty(0, dtype=torch.uint8, device=x.device))


@jet_rule(aten.cudnn_batch_norm_backward.default)
def cudnn_batch_norm_backward(
    x: Any, grad: Any, weight: Any, running_mean: Any, running_var: Any, mean: Any, rstd: Any, eps: float, room: Any
) -> tuple[Any, Any, Any]:
    """The adjoints, which exist in training only."""
    return batch_norm_backward(grad, x, weight, None, None, mean, rstd, True, eps, [True, True, True])


@jet_rule(aten.native_dropout.default)
def native_dropout(x: JetTensor, p: float, train: bool | None) -> tuple[JetTensor, Any]:
    """``y = x mask / (1 - p)``, the mask drawn by the primal's own kernel."""
    if x.block is None:
        return run_constant(aten.native_dropout.default, x, p, train)
    y, mask = aten.native_dropout(x.primal, p, train)
    scale = 1.0 if train is False or p == 0 else (0.0 if p == 1 else 1 / (1 - p))
    return jet(y, x.coefficients * (mask * scale), x.lead), mask
