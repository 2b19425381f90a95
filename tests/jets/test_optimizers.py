"""The update of torch's own optimizer classes, stepped on JetTensor parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, optim

from lightning_sketch.jets import JetTensor
from lightning_sketch.optim import StableAdamW

from .oracle import Curve, assert_right, make_curve

LEFT_ALONE = {"foreach": False, "fused": False}
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, 0.1, foreach=False),
    "SGD, momentum": lambda p: optim.SGD(p, 0.1, 0.9, dampening=0.1, weight_decay=0.1, foreach=False),
    "SGD, Nesterov": lambda p: optim.SGD(p, 0.1, 0.9, nesterov=True, weight_decay=0.1, foreach=False),
    "SGD, maximize": lambda p: optim.SGD(p, 0.1, 0.9, maximize=True, foreach=False),
    "SGD, foreach": lambda p: optim.SGD(p, 0.1, 0.9, foreach=True),
    "Adam": lambda p: optim.Adam(p, 0.05, weight_decay=0.1, foreach=False),
    "Adam, foreach": lambda p: optim.Adam(p, 0.05, foreach=True),
    "Adam, amsgrad": lambda p: optim.Adam(p, 0.05, amsgrad=True, foreach=False),
    "AdamW": lambda p: optim.AdamW(p, 0.05, (0.8, 0.9), weight_decay=0.1, foreach=False),
    "AdamW, amsgrad": lambda p: optim.AdamW(p, 0.05, weight_decay=0.1, amsgrad=True, foreach=False),
    "RMSprop": lambda p: optim.RMSprop(p, 0.05, weight_decay=0.1, foreach=False),
    "RMSprop, centred": lambda p: optim.RMSprop(p, 0.05, momentum=0.5, centered=True, foreach=False),
    "Adagrad": lambda p: optim.Adagrad(p, 0.1, lr_decay=0.1, initial_accumulator_value=0.1, foreach=False),
    "NAdam": lambda p: optim.NAdam(p, 0.05, weight_decay=0.1, foreach=False),
    "RAdam": lambda p: optim.RAdam(p, 0.05, foreach=False),
    "Adadelta": lambda p: optim.Adadelta(p, foreach=False),
    "Adamax": lambda p: optim.Adamax(p, 0.05, foreach=False),
    "StableAdamW": lambda p: StableAdamW(p, 0.05, weight_decay=0.1),
}


def train(build: Callable[[Any], optim.Optimizer], xs: list[Tensor], clip: float | None = None) -> list[Tensor]:
    """Three steps along gradients that are polynomials of the parameters; returns parameters and optimizer state."""
    weights, data = xs
    parameters = [weights.detach().clone().requires_grad_(), weights.detach()[:2].clone().requires_grad_()]
    optimizer = build(parameters)
    for step in range(1, 4):
        for p in parameters:
            q = p.detach()
            p.grad = (q * q * q * 0.3 + q * step + data[: len(q)]).detach()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    state = [
        v
        for p in parameters
        for _, v in sorted(optimizer.state[p].items())
        if isinstance(v, Tensor) and v.shape == p.shape
    ]
    return [*(p.detach() for p in parameters), *state]


def curves(parts: int, directions: int = 2) -> list[Curve]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([[0.7, -0.4, 1.1], [-0.9, 0.5, 1.6], [0.3, -1.2, 0.8]], dtype=torch.float64)
    data = torch.tensor([[0.9, -1.0, 0.4], [0.3, 0.8, -0.7], [1.2, -0.5, 0.6]], dtype=torch.float64)
    return [make_curve(x, 3, parts, directions, generator) for x in (weights, data)]


@pytest.mark.parametrize("parts", [1, 2], ids=["real", "complex"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer(name, parts):
    """Oracle: polynomials fitted to the same optimizer on ordinary tensors."""
    assert_right(lambda xs: train(OPTIMIZERS[name], xs), curves(parts), tolerance=1e-5)


def test_clipping_by_norm():
    """Oracle: polynomials fitted to the same optimizer and clipping on ordinary tensors."""
    assert_right(lambda xs: train(OPTIMIZERS["SGD, momentum"], xs, clip=0.5), curves(2), tolerance=1e-5)


def test_a_gradient_that_is_always_zero_leaves_adam_finite():
    """Oracle: closed form; the root of a second moment that is identically zero is zero."""
    p = JetTensor(torch.ones(2, dtype=torch.float64), torch.zeros(3, 1, 1, 2, dtype=torch.float64), requires_grad=True)
    gradient = torch.tensor([0.0, 1.0], dtype=torch.float64)
    p.grad = JetTensor(gradient, gradient.expand(3, 1, 1, 2).clone())
    optim.Adam([p], 0.1, foreach=False).step()
    assert p.coefficients.isfinite().all()
    torch.testing.assert_close(p.primal, torch.tensor([1.0, 0.9], dtype=torch.float64))
    assert not p.coefficients[..., 0].any()
