"""Smooth activations, the normal distribution function, and the adjoints that autograd calls by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.equations import Series, Statement
from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.pointwise import apply, times, unary
from lightning_sketch.jets.tensor import JetTensor

aten = torch.ops.aten


def tanh(x: Series) -> Series:
    """``y' = (1 - y^2) x'``."""
    return x.solve(x[0].tanh(), lambda y: 1 - y * y)


def sigmoid(x: Series) -> Series:
    """``y' = (y - y^2) x'``."""
    return x.solve(x[0].sigmoid(), lambda y: y - y * y)


def sigmoid_reversed(x: Series) -> Series:
    """``sigmoid(-x)``: ``y' = (y^2 - y) x'``."""
    return x.solve(torch.sigmoid(-x[0]), lambda y: y * y - y)


def log_sigmoid(x: Series) -> Series:
    """``y' = sigmoid(-x) x'``."""
    return x.solve(torch.nn.functional.logsigmoid(x[0]), lambda y: sigmoid_reversed(x))


def gaussian(x: Series, height: float, rate: float) -> Series:
    """``height exp(-rate x^2 / 2)``: ``y' = -rate x y x'``."""
    y0 = height * torch.exp(-0.5 * rate * x[0] * x[0])
    return x.solve(y0, lambda y: x * y * -rate)


def normal_density(x: Series) -> Series:
    """The standard normal density."""
    return gaussian(x, 1 / math.sqrt(2 * math.pi), 1.0)


def normal_cdf(x: Series, density: Series) -> Series:
    """The standard normal distribution function: ``y' = density x'``."""
    return x.solve(torch.special.ndtr(x[0]), lambda y: density)


def erf(x: Series) -> Series:
    """``y' = 2 / sqrt(pi) exp(-x^2) x'``."""
    return x.solve(x[0].erf(), lambda y: gaussian(x, 2 / math.sqrt(math.pi), 2.0))


def erfc(x: Series) -> Series:
    """``y' = -2 / sqrt(pi) exp(-x^2) x'``."""
    return x.solve(x[0].erfc(), lambda y: gaussian(x, -2 / math.sqrt(math.pi), 2.0))


def gelu_normal(x: Series) -> Series:
    """``x Phi(x)``."""
    return x * normal_cdf(x, normal_density(x))


def gelu_normal_slope(x: Series) -> Series:
    """``Phi(x) + x phi(x)``."""
    density = normal_density(x)
    return normal_cdf(x, density) + x * density


def _gelu_angle(x: Series) -> tuple[Series, Series]:
    """``u = c x (1 + a x^2)`` and ``du/dx = c (1 + 3 a x^2)``, so that ``gelu(x) = x sigmoid(u)``."""
    c, square = 2 * math.sqrt(2 / math.pi), x * x
    return x * (square * (0.044715 * c) + c), square * (3 * 0.044715 * c) + c


def gelu_tanh(x: Series) -> Series:
    """``x sigmoid(u)``."""
    return x * sigmoid(_gelu_angle(x)[0])


def gelu_tanh_slope(x: Series) -> Series:
    """``s + x (s - s^2) du/dx``, ``s = sigmoid(u)``."""
    angle, slope = _gelu_angle(x)
    s = sigmoid(angle)
    return s + x * slope * (s - s * s)


def silu(x: Series) -> Series:
    """``x sigmoid(x)``."""
    return x * sigmoid(x)


def silu_slope(x: Series) -> Series:
    """``s + x (s - s^2)``, ``s = sigmoid(x)``."""
    s = sigmoid(x)
    return s + x * (s - s * s)


for _op, _statement in (
    (aten.tanh.default, tanh),
    (aten.sigmoid.default, sigmoid),
    (aten.erf.default, erf),
    (aten.erfc.default, erfc),
    (aten.silu.default, silu),
):
    unary(_op, _statement)


@jet_rule(aten.gelu.default)
def gelu(x: JetTensor, *, approximate: str = "none") -> JetTensor:
    """``y = x Phi(x)``, or its tanh form."""
    return apply(x, gelu_normal if approximate == "none" else gelu_tanh)


@jet_rule(aten.gelu_backward.default)
def gelu_backward(grad: Any, x: Any, *, approximate: str = "none") -> Any:
    """``grad f'(x)``."""
    return times(grad, x, gelu_normal_slope if approximate == "none" else gelu_tanh_slope)


@jet_rule(aten.silu_backward.default)
def silu_backward(grad: Any, x: Any) -> Any:
    """``grad f'(x)``."""
    return times(grad, x, silu_slope)


@jet_rule(aten.tanh_backward.default)
def tanh_backward(grad: Any, y: Any) -> Any:
    """``grad (1 - y^2)``."""
    return grad * (1 - y * y)


@jet_rule(aten.sigmoid_backward.default)
def sigmoid_backward(grad: Any, y: Any) -> Any:
    """``grad (y - y^2)``."""
    return grad * (y - y * y)


def _softplus(beta: float, threshold: float) -> Statement:
    """``y' = sigmoid(beta x) x'``, linear above the threshold."""

    def statement(x: Series) -> Series:
        y0 = torch.nn.functional.softplus(x[0], beta, threshold)
        smooth = x.solve(y0, lambda y: sigmoid(x * float(beta)))
        return x.where(x[0] * beta > threshold, x, smooth)

    return statement


def _softplus_slope(beta: float, threshold: float) -> Statement:
    """``sigmoid(beta x)``, one above the threshold."""

    def statement(x: Series) -> Series:
        one = x.like(torch.ones_like(x[0]), lambda k: None)
        return x.where(x[0] * beta > threshold, one, sigmoid(x * float(beta)))

    return statement


@jet_rule(aten.softplus.default)
def softplus(x: JetTensor, beta: float = 1, threshold: float = 20) -> JetTensor:
    """``y = log(1 + exp(beta x)) / beta``, linear above the threshold."""
    return apply(x, _softplus(beta, threshold))


@jet_rule(aten.softplus_backward.default)
def softplus_backward(grad: Any, x: Any, beta: float, threshold: float) -> Any:
    """``grad f'(x)``."""
    return times(grad, x, _softplus_slope(beta, threshold))


@jet_rule(aten.log_sigmoid_forward.default)
def log_sigmoid_forward(x: JetTensor) -> tuple[JetTensor, Tensor]:
    """``y = -softplus(-x)``; the buffer of the fused kernel is not used by our backward rule."""
    return apply(x, log_sigmoid), x.primal.new_zeros(0)


@jet_rule(aten.log_sigmoid_backward.default)
def log_sigmoid_backward(grad: Any, x: Any, buffer: Any) -> Any:
    """``grad f'(x)``."""
    return times(grad, x, sigmoid_reversed)
