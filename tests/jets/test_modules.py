"""Modules and losses, forward and backward, along real and complex directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .oracle import Curve, assert_right, make_curve
from .sweep import module_case

Case = tuple[Callable[[], nn.Module], tuple[Any, ...]]


def values(*shape: int) -> Tensor:
    """Values that require grad, apart from each other by at least 0.02, so that no fit crosses a tie of a pooling."""
    count = int(torch.Size(shape).numel())
    return ((torch.randperm(count) - 0.5 * count + 0.3).double() * (4 / count)).reshape(shape).requires_grad_()


def labels(*shape: int, classes: int = 4) -> Tensor:
    return torch.randint(classes, shape)


def probabilities(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64).mul(0.8).add(0.1)


def channels_last(x: Tensor) -> Tensor:
    return x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()


X, LINE, IMAGE, TOKENS = (5, 4), (2, 4, 7), (2, 4, 6, 5), (2, 3, 4)
layer = nn.TransformerEncoderLayer
CASES: dict[str, Callable[[], Case]] = {
    "Linear": lambda: (lambda: nn.Linear(4, 3), (values(*X),)),
    "Linear of a vector": lambda: (lambda: nn.Linear(4, 3), (values(4),)),
    "Linear of a batch of matrices": lambda: (lambda: nn.Linear(4, 3, bias=False), (values(*TOKENS),)),
    "Embedding": lambda: (lambda: nn.Embedding(6, 3), (labels(2, 5, classes=6),)),
    "Embedding, padding": lambda: (lambda: nn.Embedding(6, 3, padding_idx=2), (labels(2, 5, classes=6),)),
    "Embedding, by frequency": lambda: (lambda: nn.Embedding(4, 3, scale_grad_by_freq=True), (labels(2, 5),)),
    "Conv1d": lambda: (lambda: nn.Conv1d(4, 3, 3, stride=2, padding=1), (values(*LINE),)),
    "Conv1d, circular": lambda: (lambda: nn.Conv1d(4, 2, 3, padding=2, padding_mode="circular"), (values(*LINE),)),
    "Conv1d of one example": lambda: (lambda: nn.Conv1d(4, 3, 3), (values(4, 6),)),
    "Conv2d": lambda: (lambda: nn.Conv2d(4, 3, 3, padding=1), (values(*IMAGE),)),
    "Conv2d, channels last": lambda: (lambda: nn.Conv2d(4, 3, 3), (channels_last(values(*IMAGE)),)),
    "Conv2d, strided and dilated": lambda: (
        lambda: nn.Conv2d(4, 2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1)),
        (values(*IMAGE),),
    ),
    "Conv2d, groups": lambda: (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), (values(*IMAGE),)),
    "Conv2d, depthwise": lambda: (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (values(*IMAGE),)),
    "Conv2d, reflect": lambda: (lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), (values(*IMAGE),)),
    "Conv2d, replicate": lambda: (lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="replicate"), (values(*IMAGE),)),
    "ConvTranspose1d": lambda: (
        lambda: nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1, output_padding=1),
        (values(*LINE),),
    ),
    "ConvTranspose2d, groups": lambda: (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (values(*IMAGE),)),
    "LayerNorm": lambda: (lambda: nn.LayerNorm(4), (values(*TOKENS),)),
    "LayerNorm of two dimensions": lambda: (lambda: nn.LayerNorm((3, 4)), (values(*TOKENS),)),
    "LayerNorm, not affine": lambda: (lambda: nn.LayerNorm(4, elementwise_affine=False), (values(*X),)),
    "RMSNorm": lambda: (lambda: nn.RMSNorm(4), (values(*TOKENS),)),
    "GroupNorm": lambda: (lambda: nn.GroupNorm(2, 4), (values(*IMAGE),)),
    "InstanceNorm1d": lambda: (lambda: nn.InstanceNorm1d(4, affine=True), (values(*LINE),)),
    "InstanceNorm2d, tracking": lambda: (
        lambda: nn.InstanceNorm2d(4, track_running_stats=True),
        (values(*IMAGE),),
    ),
    "BatchNorm1d": lambda: (lambda: nn.BatchNorm1d(4), (values(*X),)),
    "BatchNorm1d of lines": lambda: (lambda: nn.BatchNorm1d(4, affine=False), (values(*LINE),)),
    "BatchNorm2d": lambda: (lambda: nn.BatchNorm2d(4), (values(*IMAGE),)),
    "BatchNorm2d, cumulative": lambda: (lambda: nn.BatchNorm2d(4, momentum=None), (values(*IMAGE),)),
    "BatchNorm2d, not tracking": lambda: (
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        (values(*IMAGE),),
    ),
    "BatchNorm2d, eval": lambda: (lambda: nn.BatchNorm2d(4).eval(), (values(*IMAGE),)),
    "Dropout": lambda: (lambda: nn.Dropout(0.4), (values(*X),)),
    "Dropout of a transposed input": lambda: (
        lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), Transposed(), nn.Dropout(0.4), nn.Tanh()),
        (values(*X),),
    ),
    "Dropout2d": lambda: (lambda: nn.Dropout2d(0.4), (values(*IMAGE),)),
    "AlphaDropout": lambda: (lambda: nn.AlphaDropout(0.4), (values(*X),)),
    "GELU": lambda: (nn.GELU, (values(*X),)),
    "GELU, tanh": lambda: (lambda: nn.GELU("tanh"), (values(*X),)),
    "SiLU": lambda: (nn.SiLU, (values(*X),)),
    "Mish": lambda: (nn.Mish, (values(*X),)),
    "Tanh": lambda: (nn.Tanh, (values(*X),)),
    "Sigmoid": lambda: (nn.Sigmoid, (values(*X),)),
    "LogSigmoid": lambda: (nn.LogSigmoid, (values(*X),)),
    "Softplus": lambda: (lambda: nn.Softplus(2.0, 3.0), (values(*X),)),
    "Softmax": lambda: (lambda: nn.Softmax(-1), (values(*X),)),
    "LogSoftmax": lambda: (lambda: nn.LogSoftmax(0), (values(*X),)),
    "ReLU": lambda: (nn.ReLU, (values(*X),)),
    "ReLU, in place": lambda: (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), (values(*X),)),
    "LeakyReLU": lambda: (lambda: nn.LeakyReLU(0.1), (values(*X),)),
    "PReLU": lambda: (nn.PReLU, (values(*X),)),
    "ELU": lambda: (nn.ELU, (values(*X),)),
    "SELU": lambda: (nn.SELU, (values(*X),)),
    "ReLU6": lambda: (nn.ReLU6, (values(*X),)),
    "Hardtanh": lambda: (nn.Hardtanh, (values(*X),)),
    "Hardswish": lambda: (nn.Hardswish, (values(*X),)),
    "Hardshrink": lambda: (nn.Hardshrink, (values(*X),)),
    "Softshrink": lambda: (nn.Softshrink, (values(*X),)),
    "GLU": lambda: (nn.GLU, (values(*X),)),
    "AvgPool1d": lambda: (lambda: nn.AvgPool1d(3, 2, 1), (values(*LINE),)),
    "AvgPool2d": lambda: (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), (values(*IMAGE),)),
    "AdaptiveAvgPool1d": lambda: (lambda: nn.AdaptiveAvgPool1d(3), (values(*LINE),)),
    "AdaptiveAvgPool2d": lambda: (lambda: nn.AdaptiveAvgPool2d((2, 3)), (values(*IMAGE),)),
    "AdaptiveAvgPool2d to a point": lambda: (lambda: nn.AdaptiveAvgPool2d(1), (values(*IMAGE),)),
    "MaxPool1d": lambda: (lambda: nn.MaxPool1d(2), (values(*LINE),)),
    "MaxPool2d": lambda: (lambda: nn.MaxPool2d(3, 2, 1), (values(2, 2, 5, 5),)),
    "MaxPool2d, channels last": lambda: (lambda: nn.MaxPool2d(2), (channels_last(values(2, 2, 4, 4)),)),
    "AdaptiveMaxPool1d": lambda: (lambda: nn.AdaptiveMaxPool1d(3), (values(2, 2, 7),)),
    "AdaptiveMaxPool2d": lambda: (lambda: nn.AdaptiveMaxPool2d(2), (values(2, 2, 5, 5),)),
    "MultiheadAttention": lambda: (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (values(*TOKENS),) * 3),
    "MultiheadAttention, no weights": lambda: (
        lambda: nn.MultiheadAttention(4, 2, dropout=0.3),
        (*(values(*TOKENS),) * 3, None, False),
    ),
    "MultiheadAttention, masked": lambda: (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True),
        (*(values(*TOKENS),) * 3, torch.tensor([[False, False, True], [False, False, False]])),
    ),
    "encoder layer": lambda: (lambda: layer(4, 2, 6, 0.2, batch_first=True), (values(*TOKENS),)),
    "encoder layer, gelu, norm first": lambda: (
        lambda: layer(4, 2, 6, 0.2, "gelu", norm_first=True),
        (values(*TOKENS),),
    ),
    "encoder layer, no dropout": lambda: (
        lambda: layer(4, 2, 6, 0.0, "gelu", batch_first=True),
        (values(*TOKENS),),
    ),
    "encoder layer, eval": lambda: (lambda: layer(4, 2, 6, 0.2, "gelu", batch_first=True).eval(), (values(*TOKENS),)),
    "encoder": lambda: (
        lambda: nn.TransformerEncoder(layer(4, 2, 5, 0.1, "gelu", batch_first=True), 2, nn.LayerNorm(4)),
        (values(*TOKENS), torch.ones(3, 3, dtype=torch.bool).triu(1)),
    ),
    "CrossEntropy": lambda: (nn.CrossEntropyLoss, (values(*X), labels(5))),
    "CrossEntropy, weighted and smoothed": lambda: (
        lambda: nn.CrossEntropyLoss(torch.rand(4) + 0.5, label_smoothing=0.1, ignore_index=1),
        (values(*X), torch.tensor([0, 1, 2, 3, 1])),
    ),
    "CrossEntropy of probabilities": lambda: (
        lambda: nn.CrossEntropyLoss(label_smoothing=0.2),
        (values(*X), probabilities(*X)),
    ),
    "CrossEntropy of images": lambda: (nn.CrossEntropyLoss, (values(2, 4, 3, 2), labels(2, 3, 2))),
    "CrossEntropy, each": lambda: (lambda: nn.CrossEntropyLoss(reduction="none"), (values(*X), labels(5))),
    "NLL": lambda: (lambda: nn.NLLLoss(torch.rand(4), ignore_index=2), (values(*X), labels(5))),
    "MSE": lambda: (nn.MSELoss, (values(*X), values(*X))),
    "BCE": lambda: (nn.BCELoss, (probabilities(*X).requires_grad_(), probabilities(*X))),
    "BCE with logits": lambda: (
        lambda: nn.BCEWithLogitsLoss(pos_weight=torch.rand(4)),
        (values(*X), probabilities(*X)),
    ),
    "Huber": lambda: (lambda: nn.HuberLoss(delta=0.7), (values(*X), values(*X))),
    "SmoothL1": lambda: (lambda: nn.SmoothL1Loss(beta=0.5), (values(*X), values(*X).detach() + 0.1)),
    "L1": lambda: (lambda: nn.L1Loss(reduction="sum"), (values(*X), values(*X).detach() + 0.1)),
    "KLDiv": lambda: (lambda: nn.KLDivLoss(reduction="batchmean"), (values(*X), probabilities(*X))),
    "KLDiv of logarithms": lambda: (lambda: nn.KLDivLoss(log_target=True), (values(*X), values(*X))),
    "GaussianNLL": lambda: (nn.GaussianNLLLoss, (values(*X), values(*X), probabilities(*X))),
    "PoissonNLL": lambda: (nn.PoissonNLLLoss, (values(*X), probabilities(*X))),
    "MultiMargin": lambda: (nn.MultiMarginLoss, (values(*X), labels(5))),
    "MultiLabelMargin": lambda: (nn.MultiLabelMarginLoss, (values(*X), labels(5, 4))),
    "RNN": lambda: (lambda: nn.RNN(4, 3, batch_first=True), (values(*TOKENS),)),
    "GRU": lambda: (lambda: nn.GRU(4, 2), (values(*TOKENS),)),
    "LSTM": lambda: (lambda: nn.LSTM(4, 2, batch_first=True), (values(*TOKENS),)),
}


class Apply(nn.Module):
    """A function of a parameter, well conditioned as a matrix, and of inputs."""

    def __init__(self, function: Callable[..., Any], rows: int = 3, columns: int = 3):
        super().__init__()
        self.function = function
        self.matrix = nn.Parameter(
            torch.eye(rows, columns) * torch.arange(2.0, 2.0 + columns) + torch.rand(rows, columns)
        )

    def forward(self, *inputs):
        return self.function(self.matrix, *inputs)


def ctc(tensors: bool) -> Case:
    lengths = ([4, 3], [2, 1])
    if tensors:
        lengths = (torch.tensor([4, 3]), torch.tensor([2, 1]))
    targets = torch.tensor([[1, 1], [2, 0]])
    return lambda: Apply(lambda w, x: nn.functional.ctc_loss(torch.log_softmax(x @ w, 2), targets, *lengths)), (
        values(4, 2, 3).detach(),
    )


linalg = torch.linalg
CASES |= {
    "inverse": lambda: (lambda: Apply(linalg.inv), ()),
    "solve": lambda: (lambda: Apply(linalg.solve), (values(3, 2),)),
    "solve from the right": lambda: (lambda: Apply(lambda a, b: linalg.solve(a, b, left=False)), (values(2, 2, 3),)),
    "solve, triangular": lambda: (
        lambda: Apply(lambda a, b: linalg.solve_triangular(a, b, upper=True)),
        (values(3, 2),),
    ),
    "Cholesky": lambda: (lambda: Apply(lambda a: linalg.cholesky(a @ a.mT)), ()),
    "Cholesky solve": lambda: (lambda: Apply(lambda a, b: torch.cholesky_solve(b, a)), (values(3, 2),)),
    "determinant": lambda: (lambda: Apply(lambda a: linalg.det(a) + linalg.det(a.mT)), ()),
    "logarithm of the determinant": lambda: (lambda: Apply(lambda a: torch.logdet(a @ a.mT)), ()),
    "LU": lambda: (lambda: Apply(lambda a: linalg.lu(a)[1:], 4, 3), ()),
    "QR": lambda: (lambda: Apply(linalg.qr, 4, 3), ()),
    "QR, wide": lambda: (lambda: Apply(linalg.qr, 3, 4), ()),
    "eigenvectors": lambda: (lambda: Apply(lambda a: linalg.eigh(a + a.mT)), ()),
    "singular values": lambda: (lambda: Apply(linalg.svdvals, 4, 3), ()),
    "singular vectors": lambda: (lambda: Apply(lambda a: linalg.svd(a, full_matrices=False), 4, 3), ()),
    "singular vectors, wide": lambda: (lambda: Apply(lambda a: linalg.svd(a, full_matrices=False), 3, 4), ()),
    "pseudoinverse": lambda: (lambda: Apply(linalg.pinv, 4, 3), ()),
    "least squares": lambda: (lambda: Apply(lambda a, b: linalg.lstsq(a, b).solution, 4, 3), (values(4, 2),)),
    "exponential": lambda: (lambda: Apply(linalg.matrix_exp), ()),
    "nuclear and spectral norm": lambda: (
        lambda: Apply(lambda a: linalg.matrix_norm(a, "nuc") + linalg.matrix_norm(a, 2)),
        (),
    ),
    "distances": lambda: (lambda: Apply(lambda a, b: torch.cdist(a, b, 2.0)), (values(2, 3),)),
    "distances in one set": lambda: (lambda: Apply(lambda a: nn.functional.pdist(a, 3.0)), ()),
    "EmbeddingBag": lambda: (lambda: nn.EmbeddingBag(6, 3, mode="sum"), (labels(2, 5, classes=6), None, values(2, 5))),
    "EmbeddingBag, means": lambda: (lambda: nn.EmbeddingBag(6, 3, padding_idx=1), (labels(2, 5, classes=6),)),
    "EmbeddingBag, maxima": lambda: (lambda: nn.EmbeddingBag(6, 3, mode="max"), (labels(2, 5, classes=6),)),
    "Embedding, largest norm": lambda: (lambda: nn.Embedding(6, 3, max_norm=1.0), (labels(2, 5, classes=6),)),
    "CTC": lambda: ctc(tensors=False),
    "CTC, lengths as tensors": lambda: ctc(tensors=True),
}


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(0, 2)


def curves_of(name: str, degree: int, parts: int, directions: int) -> tuple[Any, list[Curve]]:
    torch.manual_seed(3)
    build, inputs = CASES[name]()
    module = build().double()
    generator = torch.Generator().manual_seed(5)
    function, points = module_case(module, inputs, {})
    return function, [make_curve(p, degree, parts, directions, generator) for p in points]


@pytest.mark.parametrize("parts", [1, 2], ids=["real", "complex"])
@pytest.mark.parametrize("name", CASES)
def test_module(name, parts):
    """Oracle: polynomials fitted to plain torch and its autograd."""
    assert_right(*curves_of(name, 3, parts, 3 - parts), tolerance=1e-5)


@pytest.mark.parametrize("degree", [1, 3, 4])
@pytest.mark.parametrize("name", ["Linear", "BatchNorm1d", "encoder layer, gelu, norm first", "Conv2d, groups", "NLL"])
def test_other_degrees(name, degree):
    """Oracle: polynomials fitted to plain torch and its autograd."""
    assert_right(*curves_of(name, degree, 2, 2), tolerance=1e-4 if degree == 4 else 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunked_cross_entropy_of_a_linear_layer(reduction, weighted):
    """Oracle: the layer and the loss, one after the other."""
    options = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options").LinearCrossEntropyOptions
    target = torch.tensor([0, 4, 2, 2, 1, 3])
    class_weights = torch.rand(5, dtype=torch.float64) if weighted else None
    results = []
    for chunked in (False, True):
        generator = torch.Generator().manual_seed(0)
        points = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (5, 4), (5,))]
        x, weight, bias = (make_curve(p, 3, 2, 2, generator).jet(requires_grad=True) for p in points)
        kwargs = {"weight": class_weights, "ignore_index": 2, "reduction": reduction}
        if chunked:
            loss = nn.functional.linear_cross_entropy(
                x, weight, target, linear_bias=bias, options=options(batch_chunk_size=2), **kwargs
            )
        else:
            loss = nn.functional.cross_entropy(nn.functional.linear(x, weight, bias), target, **kwargs)
        results.append([loss.detach(), *torch.autograd.grad(loss, [x, weight, bias])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.primal, expected.primal)
        torch.testing.assert_close(found.coefficients, expected.coefficients)
