"""Rules on a GPU, without one: nothing is read back, no tensor is made elsewhere, and fused kernels have rules.

The device ``meta`` has no data, so reading a number raises there, as does an operator on tensors of two devices.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

from lightning_sketch.jets import JetTensor, registry
from lightning_sketch.jets.registry import jet_rule

from .oracle import make_curve
from .sweep import judge_on_meta, modules_on_meta, operators_on_meta, report
from .test_databases import COMMON, OPERATORS

aten = torch.ops.aten

# What is read back: whether eigenvalues coincide, a rank changes, or a product's gradient has a factor zero.
READS = {
    "cumprod", "linalg.cond", "linalg.eigh", "linalg.eigvalsh", "linalg.matrix_norm", "linalg.pinv",
    "linalg.pinv.hermitian", "linalg.pinv.singular", "linalg.svdvals", "linalg.vander", "masked.cumprod", "norm.nuc",
    "pca_lowrank", "pinverse", "svd_lowrank",
}  # fmt: skip


# Rules that would be most easily written with a look at the numbers.
MORE = [
    "fft.irfft", "grid_sampler_3d", "index_reduce.prod", "masked_scatter", "nn.functional.embedding",
    "nn.functional.embedding_bag", "nn.functional.interpolate.bilinear", "scatter_reduce.prod", "stft", "take",
]  # fmt: skip


@pytest.fixture
def _without_their_kernels(monkeypatch):
    """Order 0 is otherwise what the kernel itself gives, and there is none for a CPU."""
    rules = [op for op in registry.registered_operators() if "fused" in op.name() or "cudnn" in op.name()]
    monkeypatch.setattr(registry, "_EXACT", registry._EXACT | {*rules, aten._masked_scale.default})


@pytest.fixture(autouse=True)
def _after_the_first_calls(monkeypatch):
    """The watch for kinks has looked at its first calls."""
    monkeypatch.setattr(registry, "LOOKS", 0)
    monkeypatch.setattr(registry, "_LOOKS_LEFT", {})
    monkeypatch.setattr(registry, "_RESOLVED", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def assert_not_wrong(title, verdicts, capsys, known=()):
    with capsys.disabled():
        print("\n" + report(title, {n: v for n, v in verdicts.items() if v.kind in ("wrong", "refused", "right")}))
    assert {n: v.why for n, v in verdicts.items() if v.kind == "wrong" and n not in known} == {}


def test_common_operators(capsys):
    """Oracle: the device ``meta``."""
    verdicts = {name: operators_on_meta(OPERATORS[name], 1) for name in [*COMMON, *MORE]}
    assert_not_wrong("op_db on meta", verdicts, capsys)


@pytest.mark.parametrize("training", [True, False])
def test_modules(training, capsys):
    """Oracle: the device ``meta``."""
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        verdicts = {info.name: modules_on_meta(info, training, 1) for info in module_db}
    assert_not_wrong("module_db on meta", verdicts, capsys)
    assert sum(v.kind == "right" for v in verdicts.values()) > 90


@pytest.mark.slow
def test_every_operator(capsys):
    """Oracle: the device ``meta``."""
    verdicts = {name: operators_on_meta(info, 6) for name, info in OPERATORS.items()}
    # the kernel of `meta` for the gradient of `cdist` does not broadcast empty batches as the real one does
    assert_not_wrong("op_db on meta", verdicts, capsys, READS | {"cdist"})


def test_this_test_can_fail():
    """Oracle: two wrong rules, one that reads and one that forgets the device."""
    library = torch.library.Library("device_tests", "DEF")
    for name in ("reads", "elsewhere"):
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, lambda x: x.clone(), "Meta")
    ops = torch.ops.device_tests

    @jet_rule(ops.reads.default)
    def reads(x):
        return x * float(x.primal.sum())

    @jet_rule(ops.elsewhere.default)
    def elsewhere(x):
        return x + torch.ones(x.shape, dtype=x.dtype)

    try:
        assert judge_on_meta(ops.reads, (torch.ones(3).double(),)).kind == "wrong"
        assert judge_on_meta(ops.elsewhere, (torch.ones(3).double(),)).kind == "wrong"
    finally:
        registry._REGISTERED.pop(ops.reads.default)
        registry._REGISTERED.pop(ops.elsewhere.default)
        library._destroy()


def jets(*shapes: tuple[int, ...]) -> list[JetTensor]:
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [make_curve(p, 3, 2, 2, generator).jet(requires_grad=True) for p in points]


def lstm_cell(inputs, hidden, c, b1, b2):
    i, f, g, o = (inputs + hidden + b1 + b2).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(inputs, hidden, h, b1, b2):
    (ir, iz, i_n), (hr, hz, hn) = (inputs + b1).chunk(3, 1), (hidden + b2).chunk(3, 1)
    z = (iz + hz).sigmoid()
    return ((1 - z) * (i_n + (ir + hr).sigmoid() * hn).tanh() + z * h,)


def statistics(run):
    """A batch normalisation together with the running statistics that it leaves."""

    def function(x, weight, bias, mean, variance):
        mean, variance = mean.detach().clone(), variance.detach().clone() ** 2
        return *run(x, weight, bias, mean, variance), mean, variance

    return function


FUSED = {
    "LSTM cell": (
        lambda *a: aten._thnn_fused_lstm_cell.default(*a)[:2],
        lstm_cell,
        [(3, 8), (3, 8), (3, 2), (8,), (8,)],
    ),
    "GRU cell": (
        lambda *a: aten._thnn_fused_gru_cell.default(*a)[:1],
        gru_cell,
        [(3, 6), (3, 6), (3, 2), (6,), (6,)],
    ),
    "sampling a grid": (
        lambda x, grid: (torch.cudnn_grid_sampler(x, grid.tanh()),),
        lambda x, grid: (nn.functional.grid_sample(x, grid.tanh(), align_corners=True),),
        [(1, 2, 3, 4), (1, 2, 2, 2)],
    ),
    "batch normalisation": (
        statistics(lambda *a: torch.cudnn_batch_norm(*a, True, 0.3, 0.1)[:1]),
        statistics(lambda *a: torch.native_batch_norm(*a, True, 0.3, 0.1)[:1]),
        [(3, 2, 4), (2,), (2,), (2,), (2,)],
    ),
    "batch normalisation, eval": (
        statistics(lambda *a: torch.cudnn_batch_norm(*a, False, 0.3, 0.1)[:1]),
        statistics(lambda *a: torch.native_batch_norm(*a, False, 0.3, 0.1)[:1]),
        [(3, 2, 4), (2,), (2,), (2,), (2,)],
    ),
}


@pytest.mark.usefixtures("_without_their_kernels")
@pytest.mark.parametrize("name", FUSED)
def test_fused_kernels_of_a_gpu(name):
    """Oracle: ordinary operators, forward and backward; there is no kernel for a CPU to compare with."""
    fused, written_out, shapes = FUSED[name]
    results = []
    for function in (fused, written_out):
        inputs = jets(*shapes)
        outputs = function(*inputs)
        losses = [(y * y * torch.linspace(-1, 2, y.numel()).double().view(y.shape)).sum() for y in outputs]
        grads = torch.autograd.grad(sum(losses), inputs, allow_unused=True)
        results.append([*(y.detach() for y in outputs), *(g for g in grads if g is not None)])
    assert len(results[0]) == len(results[1])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.primal, expected.primal)
        torch.testing.assert_close(found.coefficients, expected.coefficients)


@pytest.mark.usefixtures("_without_their_kernels")
def test_cells_without_biases():
    """Oracle: biases of zero."""
    for cell, gates in ((aten._thnn_fused_lstm_cell.default, 8), (aten._thnn_fused_gru_cell.default, 6)):
        inputs, hidden, state = jets((3, gates), (3, gates), (3, 2))
        zero = torch.zeros(gates, dtype=torch.float64)
        grads = [
            torch.autograd.grad(cell(inputs, hidden, state, *b)[0].sum(), [inputs, hidden, state])
            for b in ((), (zero, zero))
        ]
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found.coefficients, expected.coefficients)


@pytest.mark.usefixtures("_without_their_kernels")
def test_scaling_by_a_mask():
    """Oracle: the product."""
    (x,) = jets((3, 4))
    mask = torch.tensor([0, 1, 1, 0], dtype=torch.uint8)
    torch.testing.assert_close(
        aten._masked_scale(x, mask, 2.5).detach().coefficients, (x * mask * 2.5).detach().coefficients
    )


def test_ctc_takes_the_kernel_that_keeps_its_table():
    """Oracle: the flag itself."""
    (x,) = jets((5, 2, 4))
    assert not torch._use_cudnn_ctc_loss(x, torch.tensor([[1, 2], [3, 1]]), [5, 5], [2, 2], 0)
