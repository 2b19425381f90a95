"""Influence at the last layer in closed form against autograd."""

import pytest
import torch
from torch.autograd.functional import hessian
from torch.nn.functional import cross_entropy

from lightning_sketch import ConfigurationError
from lightning_sketch.influence import classifier as implementation
from lightning_sketch.influence import classifier_influence

D, C = 4, 3
DAMPING = 0.01


def head(n, bias=True):
    torch.manual_seed(0)
    h, y = torch.randn(n, D).double(), torch.randint(C, (n,))
    weight = torch.randn(C, D).double()
    return h, y, torch.cat([weight, torch.randn(C, 1).double()], dim=1) if bias else weight


def logits_of(h, parameters):
    weight = parameters.reshape(C, -1)
    return h @ weight[:, :D].T + (weight[:, D] if weight.shape[1] > D else 0)


def autograd_scores(h, y, parameters, curvature, damping):
    """``-g_i' F^-1 mean(g)`` with the gradient of every example and the Hessian of their mean loss by autograd."""
    flat = parameters.flatten().requires_grad_()
    gradients = torch.stack(
        [torch.autograd.grad(cross_entropy(logits_of(h[i], flat)[None], y[i : i + 1]), flat)[0] for i in range(len(h))]
    )
    identity = torch.eye(flat.numel()).double()
    fisher = {
        "diag_fisher": lambda: torch.diag(gradients.square().mean(0)),
        "full_fisher": lambda: gradients.T @ gradients / len(h),
        "softmax_hessian": lambda: hessian(lambda t: cross_entropy(logits_of(h, t), y), flat.detach()),
    }[curvature]()
    return -gradients @ torch.linalg.solve(fisher + damping * identity, gradients.mean(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [4, 40], ids=["n < P", "n > P"])
@pytest.mark.parametrize("curvature", implementation.CURVATURES)
def test_scores_equal_those_of_autograd(curvature, n, bias):
    """Oracle: per-example gradients and Hessians by autograd."""
    h, y, parameters = head(n, bias)
    found = classifier_influence(h, logits_of(h, parameters), y, curvature=curvature, damping=DAMPING, bias=bias)
    torch.testing.assert_close(found, autograd_scores(h, y, parameters, curvature, DAMPING), rtol=1e-8, atol=1e-10)
    assert found.mean() <= 0


def test_signs():
    """Oracle: the loss itself, after one small Newton-like step on an example that is weighted up."""
    h, y, parameters = head(40)
    scores = classifier_influence(h, logits_of(h, parameters), y, curvature="softmax_hessian")
    step = 1e-4
    flat = parameters.flatten()
    curvature = hessian(lambda t: cross_entropy(logits_of(h, t), y), flat) + DAMPING * torch.eye(len(flat))
    before = cross_entropy(logits_of(h, flat), y)
    for i in (int(scores.argmin()), int(scores.argmax())):
        gradient = torch.func.grad(lambda t, i=i: cross_entropy(logits_of(h[i], t)[None], y[i : i + 1]))(flat)
        after = cross_entropy(logits_of(h, flat - step * torch.linalg.solve(curvature, gradient)), y)
        torch.testing.assert_close((after - before) / step, scores[i], rtol=0.02, atol=1e-4)
    assert scores.min() < 0 < scores.max()


def test_limits_of_the_damping():
    """Oracle: -1 for all without damping, plain alignment of gradients with a large one."""
    h, y, parameters = head(4)
    logits = logits_of(h, parameters)
    none = classifier_influence(h, logits, y, curvature="full_fisher", damping=1e-9)
    torch.testing.assert_close(none, -torch.ones(4).double(), rtol=1e-5, atol=0)
    e = logits.softmax(1) - torch.nn.functional.one_hot(y, C)
    alignment = ((e @ e.T) * (h @ h.T + 1)).mean(dim=1)
    for curvature in implementation.CURVATURES:
        strong = classifier_influence(h, logits, y, curvature=curvature, damping=1e6)
        torch.testing.assert_close(strong * 1e6, -alignment, rtol=1e-4, atol=1e-9)


def test_many_examples_go_in_parts(monkeypatch):
    """Oracle: all at once."""
    h, y, parameters = head(40)
    logits = logits_of(h, parameters)
    whole = classifier_influence(h, logits, y, curvature="softmax_hessian")
    monkeypatch.setattr(implementation, "CHUNK_ENTRIES", 100)
    parts = classifier_influence(h, logits, y, curvature="softmax_hessian")
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3, D)}, "`features` and `logits`"),
        ({"features": torch.zeros(0, D), "logits": torch.zeros(0, C)}, "at least one"),
        ({"logits": torch.full((5, C), float("nan"))}, "NaN"),
        ({"targets": torch.full((5,), C)}, "`targets`"),
        ({"curvature": "kfac"}, "`curvature` is 'kfac'.*'diag_fisher'"),
        ({"damping": 0.0}, "`damping` is 0.0"),
    ],
)
def test_what_cannot_be_right_is_refused(change, message):
    """Oracle: the sentence."""
    arguments = {"features": torch.zeros(5, D), "logits": torch.zeros(5, C), "targets": torch.zeros(5).long()} | change
    with pytest.raises(ConfigurationError, match=message):
        classifier_influence(**arguments)


def test_systems_that_are_too_large_are_refused(monkeypatch):
    """Oracle: the sentence."""
    monkeypatch.setattr(implementation, "LARGEST_DENSE", 4)
    with pytest.raises(ConfigurationError, match=r"15 rows, above 4.*'diag_fisher'"):
        classifier_influence(torch.zeros(50, D), torch.zeros(50, C), torch.zeros(50).long(), curvature="full_fisher")
