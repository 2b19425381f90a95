"""The warning that the primal sits on a kink, and the refusals where there is no Taylor series."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sketch.errors import UnsupportedOperatorError
from lightning_sketch.jets import JetTensor, registry


@pytest.fixture(autouse=True)
def _look_again(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(registry, "_LOOKS_LEFT", dict.fromkeys(registry._LOOKS_LEFT, registry.LOOKS))
    monkeypatch.setattr(registry, "_RESOLVED", {})


def jet(x: Tensor, seed: int = 0) -> JetTensor:
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(2, 2, 3, *x.shape, generator=generator, dtype=torch.float64)
    return JetTensor(x.double(), block)


def flat() -> Tensor:
    """Nine entries of ten are zero."""
    x = torch.zeros(10, 10)
    x[0] = 1.0
    return x


def messages(function: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
        function()
    return [str(w.message) for w in caught]


ON_A_KINK: dict[str, tuple[str, Callable[[], Any]]] = {
    "relu": ("aten.relu.default", lambda: F.relu(jet(flat()))),
    "relu, in place": ("aten.relu.default", lambda: F.relu_(jet(flat()))),
    "leaky relu": ("aten.leaky_relu.default", lambda: F.leaky_relu(jet(flat()))),
    "prelu": ("aten._prelu_kernel.default", lambda: F.prelu(jet(flat()), torch.tensor([0.3]).double())),
    "hardtanh": ("aten.hardtanh.default", lambda: F.hardtanh(jet(flat()))),
    "relu6": ("aten.hardtanh.default", lambda: F.relu6(jet(flat()))),
    "threshold": ("aten.threshold.default", lambda: F.threshold(jet(flat()), 1.0, 0.0)),
    "clamp": ("aten.clamp.default", lambda: jet(flat()).clamp(-1, 0)),
    "abs": ("aten.abs.default", lambda: jet(flat()).abs()),
    "l1 loss": ("aten.abs.default", lambda: F.l1_loss(jet(flat()), flat().double())),
    "1-norm": ("aten.linalg_vector_norm.default", lambda: jet(flat()).norm(p=1)),
    "max": ("aten.max.dim", lambda: jet(flat()).max(1)),
    "max of all": ("aten.max.dim", lambda: jet(flat()).max()),
    "amin": ("aten.amin.default", lambda: jet(flat()).amin((0, 1))),
    "maximum": ("aten.maximum.default", lambda: torch.maximum(jet(flat()), jet(flat(), seed=1))),
}


@pytest.mark.parametrize("name", ON_A_KINK)
def test_warns_once_of_a_kink(name):
    """Oracle: the sentence itself."""
    operator, function = ON_A_KINK[name]
    assert [re.match(r"`(\S+)` .* is exactly on a kink in \d+% of its entries", m)[1] for m in messages(function)] == [
        operator
    ]


def test_the_warning_names_the_module():
    """Oracle: the sentence itself."""
    net = nn.Sequential(nn.Identity(), nn.ReLU())
    assert "`aten.relu.default` (in `1`)" in messages(lambda: net(jet(flat())))[0]


def rectified() -> JetTensor:
    """Zeros whose coefficients are zero too."""
    x = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    return jet(x).relu()


@pytest.mark.parametrize("function", [
    lambda: rectified().relu().abs().clamp(min=0),
    lambda: F.dropout(rectified(), 0.5).relu(),
    lambda: F.pad(rectified(), (9, 9)).relu(),
    lambda: torch.maximum(rectified(), 2 * rectified()),
    lambda: F.pad(rectified(), (9, 9)).amin(1),
    lambda: jet(torch.arange(-500.0, 500.0)).relu(),  # one entry of a thousand
    lambda: jet(flat()).norm(),
    lambda: F.smooth_l1_loss(jet(flat()), flat().double()),  # smooth where the residual is zero
    lambda: jet(flat()).logsumexp(1),  # ties of a maximum that cancels
    lambda: torch.logaddexp(jet(flat()), jet(flat(), seed=1)),
    lambda: F.cross_entropy(jet(flat()), torch.zeros(10, dtype=torch.int64)),
])  # fmt: skip
def test_stays_silent(function):
    """Oracle: what an entry does not move along, or what cancels, is no kink."""
    assert messages(function) == []


def test_only_the_first_calls_are_looked_at():
    """Oracle: a kink after that is not seen."""
    smooth = jet(torch.randn(5) + 9)
    for _ in range(registry.LOOKS):
        smooth.relu()
    assert messages(lambda: jet(flat()).relu()) == []


@pytest.mark.parametrize(("function", "why"), [
    (lambda: torch.linalg.eigh(jet(torch.eye(3))), "two eigenvalues coincide"),
    (lambda: torch.linalg.svdvals(jet(torch.eye(3))), "two singular values"),
    (lambda: torch.linalg.svd(jet(torch.rand(3, 2))), "full_matrices=False"),
    (lambda: torch.linalg.qr(jet(torch.rand(3, 2)), mode="complete"), "mode='reduced'"),
    (lambda: torch.linalg.pinv(jet(torch.ones(3, 3))), "the rank of the matrix is not constant"),
])  # fmt: skip
def test_refuses_where_there_is_no_series(function, why):
    """Oracle: the sentence itself."""
    with pytest.raises(UnsupportedOperatorError, match=why):
        function()


def test_rounding_is_no_change_of_rank():
    """Oracle: the normal equations, along a line, whose higher orders are zero."""
    matrix = jet(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    matrix.coefficients[1:] = 0
    expected = torch.linalg.inv(matrix.mT @ matrix) @ matrix.mT
    torch.testing.assert_close(torch.linalg.pinv(matrix).coefficients, expected.coefficients)
