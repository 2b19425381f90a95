"""PyTorch's own databases of operators and modules: nothing may be wrong; what is refused is printed."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from .sweep import Verdict, judge_module, judge_operator, report

# fmt: off
COMMON = [
    "abs", "add", "addmm", "addmv", "baddbmm", "bmm", "cat", "chunk", "clamp", "clone", "cos", "cumsum",
    "diagonal", "div.no_rounding_mode", "dot", "einsum", "exp", "expand", "flatten", "gather", "index_add",
    "index_put", "index_select", "lerp", "linalg.vector_norm", "log", "log1p", "logsumexp", "masked_fill",
    "matmul", "max.reduction_with_dim", "maximum", "mean", "minimum", "mul", "mv", "nn.functional.avg_pool2d",
    "nn.functional.batch_norm", "nn.functional.conv2d", "nn.functional.cross_entropy", "nn.functional.gelu",
    "nn.functional.group_norm", "nn.functional.layer_norm", "nn.functional.linear", "nn.functional.max_pool2d",
    "nn.functional.mse_loss", "nn.functional.relu", "nn.functional.scaled_dot_product_attention",
    "nn.functional.silu", "nn.functional.softplus", "permute", "pow", "reciprocal", "reshape", "rsqrt",
    "scatter_add", "select", "sigmoid", "sin", "softmax", "split", "sqrt", "stack", "std", "sub", "sum", "tanh",
    "transpose", "unsqueeze", "var", "where",
]
# fmt: on

NOT_OF_REAL_DENSE_TENSORS = ("sparse.", "to_sparse")
CASTS = ("bfloat16", "half", "float", "chalf", "cfloat")  # too coarse for the oracle; see test_tensor.py


def name_of(info) -> str:
    return f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name


DEGREES = {"round.decimals_3": 1}  # steps of 0.001 leave no room for a second difference

OPERATORS = {
    name_of(info): info
    for info in op_db
    if info.supports_autograd
    and torch.float64 in info.supported_dtypes("cpu")
    and not info.name.startswith(NOT_OF_REAL_DENSE_TENSORS)
    and info.name not in CASTS
}


def check(title: str, verdicts: dict[str, Verdict], capsys) -> None:
    with capsys.disabled():
        print("\n" + report(title, verdicts))
    assert not [name for name, v in verdicts.items() if v.kind == "wrong"]
    assert not [name for name, v in verdicts.items() if v.kind == "inconclusive"]


@pytest.mark.parametrize("name", COMMON)
def test_common_operator(name):
    """Oracle: polynomials fitted to plain torch."""
    verdict = judge_operator(OPERATORS[name], degree=2)
    assert verdict.kind == "right", verdict.why


@pytest.mark.slow
def test_every_differentiable_operator(capsys):
    """Oracle: polynomials fitted to plain torch."""
    verdicts = {n: judge_operator(info, degree=DEGREES.get(n, 2), count=8) for n, info in OPERATORS.items()}
    check("op_db", verdicts, capsys)
    assert sum(v.kind == "right" for v in verdicts.values()) >= 0.9 * sum(
        v.kind != "skipped" for v in verdicts.values()
    )


# Points so near to a pole, and steps so small, that the oracle loses its way.
COARSE = ("tan", "round.decimals_3")


@pytest.mark.slow
def test_every_gradient(capsys):
    """Oracle: polynomials fitted to plain torch and its autograd."""
    judged = {n: info for n, info in OPERATORS.items() if n not in COARSE}
    verdicts = {n: judge_operator(info, degree=2, count=3, backward=True) for n, info in judged.items()}
    check("op_db, backward", verdicts, capsys)
    assert sum(v.kind == "refused" for v in verdicts.values()) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_every_module(training, capsys):
    """Oracle: polynomials fitted to plain torch, its autograd included."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        verdicts = {info.name: judge_module(info, training, degree=3, count=8) for info in module_db}
    check(f"module_db ({'train' if training else 'eval'})", verdicts, capsys)
