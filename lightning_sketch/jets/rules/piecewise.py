"""Piecewise analytic functions: the branch that the primal takes is differentiated."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, lead_of, run_constant, write_block
from lightning_sketch.jets.tensor import JetTensor, block_of, jet, primal_of

aten = torch.ops.aten


@jet_rule(aten.relu.default)
def relu(x: JetTensor) -> JetTensor:
    """``max(x, 0)`` on the branch of the primal; slope 0 at 0, as in autograd."""
    return jet(x.primal.relu(), x.coefficients * (x.primal > 0), x.lead)


@jet_rule(aten.threshold_backward.default)
def threshold_backward(grad: Any, x: Any, threshold: float) -> Any:
    """``grad`` where ``x > threshold``."""
    return grad * (x > threshold)


@jet_rule(aten.abs.default)
def abs_rule(x: JetTensor) -> JetTensor:
    """``|x|`` on the branch of the primal; slope 0 at 0."""
    return jet(x.primal.abs(), x.coefficients * x.primal.sign(), x.lead)


def _clamp(x: JetTensor, primal: Tensor, low: Any, high: Any) -> JetTensor:
    inside = torch.ones_like(x.primal, dtype=torch.bool)
    if low is not None:
        inside = inside & (x.primal >= low)
    if high is not None:
        inside = inside & (x.primal <= high)
    return jet(primal, x.coefficients * inside, x.lead)


@jet_rule(aten.clamp.default)
def clamp(x: JetTensor, low: Any = None, high: Any = None) -> JetTensor:
    """Clip to constant bounds; slope 1 on a bound, as in autograd."""
    return _clamp(x, x.primal.clamp(low, high), low, high)


@jet_rule(aten.clamp_min.default)
def clamp_min(x: JetTensor, low: Any) -> JetTensor:
    """Clip from below."""
    return _clamp(x, x.primal.clamp_min(low), low, None)


@jet_rule(aten.clamp_max.default)
def clamp_max(x: JetTensor, high: Any) -> JetTensor:
    """Clip from above."""
    return _clamp(x, x.primal.clamp_max(high), None, high)


@jet_rule(aten.maximum.default)
def maximum(a: Any, b: Any) -> Any:
    """The larger of two; halves where they are equal, as in autograd."""
    return torch.where(a == b, a / 2 + b / 2, torch.where((a > b) | a.isnan(), a, b))


@jet_rule(aten.minimum.default)
def minimum(a: Any, b: Any) -> Any:
    """The smaller of two; halves where they are equal, as in autograd."""
    return torch.where(a == b, a / 2 + b / 2, torch.where((a < b) | a.isnan(), a, b))


@jet_rule(aten.fmax.default)
def fmax(a: Any, b: Any) -> Any:
    """The larger of two that is a number; the first where they are equal."""
    return torch.where((a >= b) | b.isnan(), a, b)


@jet_rule(aten.fmin.default)
def fmin(a: Any, b: Any) -> Any:
    """The smaller of two that is a number; the first where they are equal."""
    return torch.where((a <= b) | b.isnan(), a, b)


@jet_rule(aten.hardshrink_backward.default, aten.softshrink_backward.default)
def shrink_backward(grad: Any, x: Any, lambd: float) -> Any:
    """``grad`` outside ``[-lambda, lambda]``."""
    return grad * (abs(primal_of(x)) > lambd)


@jet_rule(aten.rrelu_with_noise.default)
def rrelu_with_noise(
    x: JetTensor, noise: Any, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> JetTensor:
    """``x`` above zero, below it times a slope that the kernel draws into ``noise``."""
    primal = aten.rrelu_with_noise(x.primal, primal_of(noise), lower, upper, training, generator)
    if training and type(noise) is JetTensor:
        write_block(noise, None, fresh=True)
    slope = primal_of(noise) if training else (lower + upper) / 2
    return jet(primal, x.coefficients * torch.where(x.primal > 0, 1.0, slope), x.lead)


@jet_rule(aten.copysign.Tensor)
def copysign(a: Any, b: Any) -> Any:
    """``|a|`` with the sign of ``b``."""
    return a.abs() * torch.copysign(torch.ones_like(primal_of(b)), primal_of(b))


@jet_rule(aten.copysign.Scalar)
def copysign_scalar(a: JetTensor, b: float) -> Any:
    """``|a|`` with the sign of a number."""
    return a.abs() * math.copysign(1.0, b)


@jet_rule(aten.nextafter.default)
def nextafter(a: Any, b: Any) -> JetTensor:
    """``a`` plus one unit in its last place."""
    primal = torch.nextafter(primal_of(a), primal_of(b))
    shifted: Any = a.expand(primal.shape) if type(a) is JetTensor else a
    block = block_of(shifted)
    return jet(primal, None if block is None else block.clone(), lead_of((a, b)))


@jet_rule(aten.frexp.Tensor)
def frexp(x: JetTensor) -> tuple[JetTensor, Tensor]:
    """``x / 2^e``; the exponent is an integer."""
    mantissa, exponent = torch.frexp(x.primal)
    return jet(mantissa, x.coefficients * torch.exp2(-exponent.to(x.dtype)), x.lead), exponent


@jet_rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(a: Any, b: Any, *, rounding_mode: str | None) -> Any:
    """``a / b``, constant where it is rounded."""
    if rounding_mode is None:
        return torch.div(a, b)
    return run_constant(aten.div.Tensor_mode, a, b, rounding_mode=rounding_mode)


@jet_rule(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(a: Any, b: Any) -> Any:
    """``a - b trunc(a / b)``."""
    return a - b * torch.div(primal_of(a), primal_of(b), rounding_mode="trunc")


@jet_rule(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
def remainder(a: Any, b: Any) -> Any:
    """``a - b floor(a / b)``."""
    return a - b * torch.div(primal_of(a), primal_of(b), rounding_mode="floor")
