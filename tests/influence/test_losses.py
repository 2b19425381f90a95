"""The table of losses."""

import pytest
import torch
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, poisson_nll_loss

from lightning_sketch import ConfigurationError
from lightning_sketch.influence import LOSSES, autograd_loss

N, C = 6, 4
REFERENCE = {
    "squared": lambda f, y: (f - y).square().sum() / 2,
    "softmax": lambda f, y: cross_entropy(f, y, reduction="sum"),
    "logistic": lambda f, y: binary_cross_entropy_with_logits(f, y, reduction="sum"),
    "poisson": lambda f, y: poisson_nll_loss(f, y, reduction="sum"),
    "autograd": lambda f, y: ((1 + (f - y).square()).sqrt()).sum() + f.sum(dim=-1).square().sum(),
}


def example(name):
    torch.manual_seed(0)
    f = torch.randn(N, C).double()
    y = {
        "softmax": torch.randint(C, (N,)),
        "logistic": torch.randint(2, (N, C)),
        "poisson": torch.randint(5, (N, C)),
    }.get(name, torch.randn(N, C))
    loss = autograd_loss(REFERENCE["autograd"]) if name == "autograd" else LOSSES[name]
    return loss, f, loss.targets(y, f)


@pytest.mark.parametrize("name", REFERENCE)
def test_values_gradients_hessians_and_roots(name):
    """Oracle: autograd through torch's own losses, one example at a time."""
    loss, f, y = example(name)
    for i in range(N):
        one = slice(i, i + 1)
        reference = lambda v, one=one: REFERENCE[name](v, y[one])  # noqa: E731
        torch.testing.assert_close(loss.value(f, y)[i], reference(f[one]))
        torch.testing.assert_close(loss.gradient(f, y)[i], jacobian(reference, f[one])[0], rtol=1e-12, atol=1e-13)
        own = hessian(reference, f[one])[0, :, 0]
        torch.testing.assert_close(loss.hessian(f, y)[i], own, rtol=1e-12, atol=1e-13)
        root = loss.root(f, y)[i]
        torch.testing.assert_close(root @ root.T, own, rtol=1e-12, atol=1e-13)
    assert loss.quadratic is (name == "squared")


def test_saturated_outputs_keep_finite_roots():
    """Oracle: the softmax's Hessian vanishes where one class has all the probability."""
    f = torch.tensor([[800.0, 0.0, -800.0]]).double()
    for of in (LOSSES["softmax"].root, LOSSES["softmax"].hessian):
        assert torch.equal(of(f, torch.tensor([0])), torch.zeros(1, 3, 3).double())


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("softmax", torch.tensor([0, 1, 2, 3, 4, 0]), "classes from 0 to 3"),
        ("softmax", torch.full((N,), 0.5), "classes from 0 to 3"),
        ("softmax", torch.zeros(N, C), "class indices"),
        ("logistic", torch.full((N, C), 0.5), "0 or 1"),
        ("poisson", torch.full((N, C), -1.0), "counts"),
        ("squared", torch.zeros(N, C + 1), "one for each of the outputs"),
        ("autograd", torch.zeros(N - 1, C), "6 rows"),
    ],
)
def test_targets_that_cannot_be_right_are_refused(name, targets, message):
    """Oracle: the sentence."""
    loss, f, _ = example(name)
    with pytest.raises(ConfigurationError, match=f"`targets`.*{message}"):
        loss.targets(targets, f)


def test_a_loss_that_is_not_convex_is_refused():
    """Oracle: the Hessian of ``-f^2`` is ``-2``."""
    loss = autograd_loss(lambda f, y: -(f - y).square().sum())
    with pytest.raises(ConfigurationError, match=r"`loss` is not convex.*-2"):
        loss.hessian(torch.zeros(2, 3).double(), torch.zeros(2, 3).double())
