"""Laws of the cost, counted and not timed: affine in directions, quadratic in the degree, blind to the number of units.

A product of two factors that both vary costs, per direction of degree R and in units of the plain product, ``2R +
R(R-1)/2`` real products, or ``4R`` and ``R(R-1)/2`` complex ones, of three or four real products each. A product with
a constant factor costs R or 2R.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FEATURES, Classifier, fit, sketch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sketch.jets import JetTensor

BATCH = 8


class Work(TorchDispatchMode):
    """Counts what reaches the kernels, below the JetTensors.

    Attributes:
        flops: of matrix products and convolutions, two for a multiplication and an addition.
        elements: that operators other than views wrote.
        operators: how many calls.
        touching: bytes of the largest tensor that each operator other than views was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.elements = self.operators = 0
        self.touching: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, JetTensor) for t in types):
            return NotImplemented
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        self.operators += 1
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm"):
            self.flops += 2 * result.numel() * given[-2].shape[-1]
        elif name == "convolution":
            self.flops += 2 * result.numel() * args[1][0].numel()
        elif name == "convolution_backward":
            grad, _, weight = args[:3]
            self.flops += 2 * grad.numel() * weight[0].numel() * sum(args[-1][:2])  # of the input, of the weight
        self.elements += sum(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))
        self.touching[name] = max([self.touching[name], *(t.nbytes for t in given)])
        return result


class Attention(nn.Module):
    """One causal head between two embeddings, so that no product has a constant factor."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.tokens(x)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True)).mean(1)


def perceptron() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 7)), torch.randn(
        BATCH, 5
    )


def convolutions() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv2d(2, 6, 3), nn.SiLU(), nn.Conv2d(6, 4, 3, padding=1), nn.Flatten(), nn.Linear(36, 7)
    return nn.Sequential(*layers), torch.randn(BATCH, 2, 5, 5)


def attention() -> tuple[nn.Module, Tensor]:
    return Attention(), torch.randint(0, 7, (BATCH, 6))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "attention": attention,
}


def work(name: str, degree: int, directions: int, real: bool) -> Work:
    """Count one gradient on jets, or a plain one if there are no directions."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    targets = torch.randint(0, 7, (BATCH,))
    lead = (degree, 1 if real else 2, directions)

    def jets(value: Tensor, requires_grad: bool) -> Tensor:
        if not directions:
            return value.detach().requires_grad_(requires_grad)
        return JetTensor(value.detach(), 1e-3 * torch.randn(*lead, *value.shape), requires_grad)

    params = {key: jets(p, True) for key, p in model.named_parameters()}
    weights = jets(torch.ones(BATCH), False)
    with Work() as counted, sdpa_kernel(SDPBackend.MATH):
        losses = F.cross_entropy(functional_call(model, params, (inputs,)), targets, reduction="none")
        torch.autograd.grad((losses * weights).mean(), list(params.values()))
    return counted


def constant_factor(name: str) -> int:
    """Flops of the plain products with a constant factor: the first layer's input, forward and in its gradient."""
    of_first_layer = {"perceptron": BATCH * 5 * 16, "convolutions": BATCH * 6 * 3 * 3 * 2 * 3 * 3, "attention": 0}
    return 2 * 2 * of_first_layer[name]


@pytest.mark.parametrize("real", [True, False], ids=["real", "complex"])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_operation_count(name, real):
    """Oracle: the operation count of the module's docstring; third differences in the degree are zero."""
    directions = 4
    plain = work(name, 1, 0, real).flops
    constant = constant_factor(name)
    varying = plain - constant
    parts = 1 if real else 2
    found = [(work(name, degree, directions, real).flops - plain) / directions for degree in range(1, 7)]
    pairs = np.array([r * (r - 1) / 2 for r in range(1, 7)])
    alone = parts * np.arange(1, 7) * (constant + 2 * varying)
    if real:
        assert found == (alone + pairs * varying).tolist()
    else:
        assert (found <= alone + 4 * pairs * varying).all()
        assert (found >= alone + 3 * pairs * varying).all()
    assert not np.diff(found, 3).any()


@pytest.mark.parametrize("name", MODELS)
def test_elementwise_work_is_at_most_quadratic_in_the_degree(name):
    """Oracle: twice the degree, at most four times the work; compositions by powers would be cubic."""
    low, high = (work(name, degree, 1, False).elements for degree in (8, 16))
    assert high <= 4 * low


@pytest.mark.parametrize("real", [True, False], ids=["real", "complex"])
@pytest.mark.parametrize("name", MODELS)
def test_work_is_affine_in_the_directions(name, real):
    """Oracle: equal differences; the number of operators does not depend on it at all."""
    counted = [work(name, 3, directions, real) for directions in (4, 8, 12)]
    for quantity in ("flops", "elements"):
        few, more, most = (getattr(c, quantity) for c in counted)
        assert most - more == more - few > 0, quantity
    assert len({c.operators for c in counted}) == 1


class Steps(pl.Callback):
    """Counts every training batch, all that callbacks and Trainer do included."""

    def __init__(self) -> None:
        self.counted: list[Work] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.counted.append(Work())
        self.counted[-1].__enter__()

    def on_train_batch_end(self, *_: object) -> None:
        self.counted[-1].__exit__(None, None, None)


def whole_step(tmp_path, units: int, directions: int, degree: int = 2) -> Work:
    """Count the third step of a tracked training of 12 examples in ``units`` units."""
    along = np.random.default_rng(0).normal(size=(directions, units, 2)).view(np.complex128)[..., 0]
    steps = Steps()
    of_example = [*range(11), units - 1]
    tracked = sketch(tmp_path, along, degree, units=of_example, directions_per_pass=directions)
    fit(Classifier, [steps, tracked], epochs=1)
    return steps.counted[2]


def test_a_step_does_not_depend_on_the_number_of_units(tmp_path):
    """Oracle: a run of as many examples in fewer units; only indexing may touch the directions, stored once."""
    few, many = whole_step(tmp_path, 100, 4), whole_step(tmp_path, 100_000, 4)
    assert (few.flops, few.elements, few.operators) == (many.flops, many.elements, many.operators)
    directions = 2 * 4 * 100_000 * 8  # real and imaginary parts, float64
    assert {name: size for name, size in many.touching.items() if size >= 100_000} == {"index": directions}


def test_a_step_is_affine_in_the_directions(tmp_path):
    """Oracle: equal differences; the number of operators does not depend on it at all."""
    counted = [whole_step(tmp_path, 12, directions) for directions in (4, 8, 12)]
    for quantity in ("flops", "elements"):
        few, more, most = (getattr(c, quantity) for c in counted)
        assert most - more == more - few > 0, quantity
    assert len({c.operators for c in counted}) == 1


def test_a_step_is_quadratic_in_the_degree(tmp_path):
    """Oracle: third differences of the products are zero; batch of 4, layers FEATURES-6-3, two of five products vary
    in one factor."""
    found = [whole_step(tmp_path, 12, 4, degree).flops for degree in range(1, 7)]
    assert not np.diff(found, 3).any()
    assert np.diff(found, 2)[0] <= 4 * 4 * 2 * 4 * 6 * 3 * 3
    assert FEATURES == 5
