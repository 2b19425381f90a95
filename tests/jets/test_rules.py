"""Every operator that has a rule, called by itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_sketch.jets import registered_operators

from . import samples_algebra, samples_complex  # noqa: F401  (they register more samples)
from .oracle import Curve, Function, assert_right, make_curve
from .samples import SAMPLES
from .sweep import in_reals
from .test_modules import CASES as MODULES

# These need what the forward kernel kept of its input, so they are called through autograd, in test_modules.py.
THROUGH_AUTOGRAD = {
    "aten._ctc_loss_backward.default": "CTC",
    "aten._ctc_loss_backward.Tensor": "CTC, lengths as tensors",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": "encoder layer, no dropout",
    "aten.log_sigmoid_backward.default": "LogSigmoid",
    "aten.multilabel_margin_loss_backward.default": "MultiLabelMargin",
}


def own_operators() -> list[Any]:
    return sorted((op for op in registered_operators() if op.namespace == "aten" and runs_here(op)), key=str)


def runs_here(op: Any) -> bool:
    """Whether there is a kernel for a CPU; for the others see test_devices.py."""
    keys = ("CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key) for key in keys)


def case(op: Any, arguments: tuple[Any, ...], degree: int, parts: int, directions: int) -> tuple[Function, list[Curve]]:
    kwargs = arguments[-1] if isinstance(arguments[-1], dict) else {}
    args = arguments[:-1] if kwargs else arguments
    leaves, spec = pytree.tree_flatten((args, kwargs))
    doubles = (torch.float64, torch.complex128)
    varying = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dtype in doubles]
    generator = torch.Generator().manual_seed(0)
    curves = [make_curve(in_reals(leaves[i]), degree, parts, directions, generator) for i in varying]

    def function(xs: list[Tensor]) -> list[Tensor]:
        new = list(leaves)
        for i, x in zip(varying, xs, strict=True):
            new[i] = torch.view_as_complex(x) if leaves[i].is_complex() else x
        a, k = pytree.tree_unflatten(new, spec)
        torch.manual_seed(0)
        result = [in_reals(y) for y in pytree.tree_leaves(op(*a, **k)) if isinstance(y, Tensor)]
        if "log_sigmoid_forward" in str(op) or "_ctc_loss" in str(op):  # buffers, partly not initialised
            result = result[:1]
        if "empty" in str(op):
            result = [torch.zeros_like(y) for y in result]
        return [y for y in result if y.dtype != torch.float32] + xs

    return function, curves


CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("op", own_operators(), ids=str)
def test_operator_has_samples(op):
    """Oracle: the table of samples."""
    assert op in SAMPLES or THROUGH_AUTOGRAD[str(op)] in MODULES


@pytest.mark.parametrize("parts", [1, 2], ids=["real", "complex"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{n}" for n, (op, _) in enumerate(CASES)])
def test_rule(op, sample, parts):
    """Oracle: polynomials fitted to the operator itself; arguments that it writes into are compared too."""
    torch.manual_seed(0)
    function, curves = case(op, sample(), degree=3, parts=parts, directions=3 - parts)
    if curves:
        assert_right(function, curves, tolerance=1e-5)


@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{n}" for n, (op, _) in enumerate(CASES)])
def test_one_argument_at_a_time(op, sample):
    """Oracle: polynomials fitted to the operator itself; the other arguments are ordinary tensors."""
    torch.manual_seed(0)
    function, curves = case(op, sample(), degree=2, parts=1, directions=1)
    if op._schema.is_mutable or "native_batch_norm" in str(op):  # what is written into must vary too
        curves = []
    for i in itertools.islice(range(len(curves)), 4 if len(curves) > 1 else 0):

        def alone(xs: list[Tensor], i: int = i) -> list[Tensor]:
            mixed = [c.point.clone() for c in curves]
            mixed[i] = xs[0]
            return list(function(mixed))[: -len(curves)]

        assert_right(alone, [curves[i]], tolerance=1e-5)
