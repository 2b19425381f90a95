"""Tests of ``StableAdamW`` against its formulas."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.optim import StableAdamW


def reference_run(
    theta: np.ndarray, gradients: list[np.ndarray], lr: float, betas: tuple[float, float], eps: float, decay: float
) -> np.ndarray:
    """The docstring's formulas in numpy."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients, start=1):
        theta = theta - lr * decay * theta
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        theta = theta - lr * (m / (1 - betas[0] ** t)) / np.sqrt(v / (1 - betas[1] ** t) + eps)
    return theta


def run_optimizer(optimizer: torch.optim.Optimizer, param: torch.Tensor, gradients: list[np.ndarray]) -> None:
    """Step with each gradient in turn."""
    for gradient in gradients:
        param.grad = torch.from_numpy(gradient)
        optimizer.step()


@pytest.fixture
def gradients() -> list[np.ndarray]:
    """Seven gradients of shape (3, 4); one element is always zero, as for an unused embedding row."""
    values = np.random.default_rng(0).normal(size=(7, 3, 4))
    values[:, 1, 1] = 0.0
    return list(values)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_follow_the_formula(gradients: list[np.ndarray], decay: float) -> None:
    """Oracle: a numpy loop over the formulas."""
    start = np.random.default_rng(1).normal(size=(3, 4))
    param = torch.nn.Parameter(torch.tensor(start))
    run_optimizer(StableAdamW([param], lr=0.05, betas=(0.8, 0.95), eps=1e-2, weight_decay=decay), param, gradients)
    expected = reference_run(start, gradients, 0.05, (0.8, 0.95), 1e-2, decay)
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-14, atol=1e-15)


def test_defaults_are_those_documented(gradients: list[np.ndarray]) -> None:
    """Oracle: the numpy loop with the documented defaults."""
    start = np.ones((3, 4))
    param = torch.nn.Parameter(torch.tensor(start))
    run_optimizer(StableAdamW([param]), param, gradients)
    expected = reference_run(start, gradients, 1e-3, (0.9, 0.999), 1e-3, 1e-2)
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-14)


def test_equals_adamw_where_both_add_no_epsilon(gradients: list[np.ndarray]) -> None:
    """Oracle: torch.optim.AdamW with eps = 0, where both denominators are sqrt(v_hat)."""
    gradients = [np.where(gradient == 0, 1.0, gradient) for gradient in gradients]
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.1}
    run_optimizer(StableAdamW([ours], **settings), ours, gradients)
    run_optimizer(torch.optim.AdamW([theirs], **settings), theirs, gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


def test_state_has_the_layout_of_torch_adam(gradients: list[np.ndarray]) -> None:
    """Oracle: the state of torch.optim.AdamW under float32, key by key."""
    gradients = [gradient.astype(np.float32) for gradient in gradients]
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    optimizer, reference = StableAdamW([ours]), torch.optim.AdamW([theirs])
    run_optimizer(optimizer, ours, gradients)
    run_optimizer(reference, theirs, gradients)
    assert optimizer.state[ours].keys() == reference.state[theirs].keys()
    for key, expected in reference.state[theirs].items():
        torch.testing.assert_close(optimizer.state[ours][key], expected)  # also shape, dtype and device


def test_resumed_from_its_state_dict_it_continues_bit_for_bit(gradients: list[np.ndarray]) -> None:
    """Oracle: the uninterrupted run."""
    param = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    optimizer = StableAdamW([param], lr=0.1)
    run_optimizer(optimizer, param, gradients[:3])
    resumed = torch.nn.Parameter(param.detach().clone())
    other = StableAdamW([resumed], lr=0.7, weight_decay=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run_optimizer(optimizer, param, gradients[3:])
    run_optimizer(other, resumed, gradients[3:])
    assert torch.equal(param, resumed)


def test_groups_have_their_own_settings_and_parameters_without_gradient_stay(gradients: list[np.ndarray]) -> None:
    """Oracle: the numpy loop with each group's settings."""
    fast, slow, unused = (torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(3))
    optimizer = StableAdamW(
        [{"params": [fast, unused], "lr": 0.1}, {"params": [slow], "eps": 0.5, "betas": (0.5, 0.6)}], lr=0.01
    )
    for gradient in gradients:
        fast.grad, slow.grad = torch.from_numpy(gradient), torch.from_numpy(gradient)
        optimizer.step()
    expected_fast = reference_run(np.ones((3, 4)), gradients, 0.1, (0.9, 0.999), 1e-3, 1e-2)
    expected_slow = reference_run(np.ones((3, 4)), gradients, 0.01, (0.5, 0.6), 0.5, 1e-2)
    np.testing.assert_allclose(fast.detach().numpy(), expected_fast, rtol=1e-14)
    np.testing.assert_allclose(slow.detach().numpy(), expected_slow, rtol=1e-14)
    assert torch.equal(unused, torch.ones_like(unused))
    assert unused not in optimizer.state


def test_closure_is_called_once_with_gradients_on_and_its_loss_returned() -> None:
    """Oracle: one step by hand, 1 - 0.1 * 2 / sqrt(2^2 + 1)."""
    param = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = StableAdamW([param], lr=0.1, eps=1.0, weight_decay=0.0)
    calls = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = (2 * param).sum()
        loss.backward()
        calls.append(loss.item())
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert calls == [2.0]
    assert param.item() == pytest.approx(1 - 0.2 / 5**0.5, rel=1e-15)


def test_a_schedule_changes_the_learning_rate(gradients: list[np.ndarray]) -> None:
    """Oracle: with beta1 = beta2 = 0 a step is lr_t g / sqrt(g^2 + eps)."""
    param = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = StableAdamW([param], lr=0.1, betas=(0.0, 0.0), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 7)
    for gradient in gradients:
        run_optimizer(optimizer, param, [gradient])
        schedule.step()
    expected = -sum(0.1 * (1 - t / 7) * g / np.sqrt(g**2 + 1e-3) for t, g in enumerate(gradients))
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("lr", float("nan")), ("eps", -1e-8), ("weight_decay", -0.1)]
    + [("betas", betas) for betas in [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,)]],
)
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    """Oracle: the message names the argument; given for all or for one group, it is refused."""
    param = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigurationError, match=f"`{name}`"):
        StableAdamW([param], **{name: value})
    with pytest.raises(ConfigurationError, match=f"`{name}`"):
        StableAdamW([{"params": [param], name: value}])


def test_complex_parameters_and_sparse_gradients_are_refused() -> None:
    """Oracle: the message names the argument."""
    with pytest.raises(ConfigurationError, match=r"`params`.*complex"):
        StableAdamW([torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))])
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    optimizer = StableAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigurationError, match=r"`params`.*sparse"):
        optimizer.step()
