"""Real retraining of a small GELU net on scikit-learn's digits, all deletion sets at once, by hand-written derivatives.

Every parameter leads with an axis D, one training for each row of deletion weights. In shape comments B is the batch, U
the hidden units (64), F the features (64) and C the classes (10). The study: six epochs of batches of 48, Adam with eps
inside the root, learning rate 1e-2 falling linearly to zero, float64.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

SETS_AT_ONCE = 8  # more would not stay in the processor's cache


def retrain(
    initial: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    batches: Sequence[np.ndarray],
    units: np.ndarray,
    x: np.ndarray,
    test_inputs: Tensor,
    test_targets: Tensor,
    *,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-3,
) -> tuple[dict[str, Tensor], Tensor]:
    """Train once for each row of ``x`` on the same batches, with batch loss ``(1/B) sum_i (1 - x[units[i]]) l_i``.

    Args:
        initial: Weight ``(U, F)`` and bias ``(U,)`` of the first layer, weight ``(C, U)`` and bias ``(C,)`` of the
            second, in this order and under any names, float64.
        inputs: Training inputs ``(examples, F)``, float64.
        targets: Training classes ``(examples,)``, int64.
        batches: The training examples of each step, in order, all epochs in one list.
        units: Unit of each training example, ``(examples,)``; -1 belongs to none.
        x: Deletion weights ``(D, n)``: 1 deletes a unit, 0 keeps it.
        test_inputs: Test inputs ``(tests, F)``, float64.
        test_targets: Test classes ``(tests,)``, int64.
        lr: Learning rate; step ``t`` of ``T`` (zero-based) takes ``lr * (1 - t / T)``.
        betas: Decay rates of Adam's moments.
        eps: Added to the second moment under the root.

    Returns:
        The final parameters, ``(D, *S)`` by name, and the cross-entropy of every test example in nats, ``(D, tests)``.
    """
    # One more column of zeros: unit -1 is never deleted.
    weight_of_unit = 1 - torch.nn.functional.pad(torch.as_tensor(x, dtype=torch.float64), (0, 1))
    example_weights = weight_of_unit[:, torch.as_tensor(units)]
    parts = [
        _train_together(initial, inputs, targets, batches, weights, lr, betas, eps)
        for weights in torch.split(example_weights, SETS_AT_ONCE)
    ]
    final = {name: torch.cat([part[name] for part in parts]) for name in initial}
    logits, _, _ = _forward(list(final.values()), test_inputs)
    own = logits[:, torch.arange(len(test_targets)), test_targets]
    return final, logits.logsumexp(-1) - own


def _train_together(
    initial: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    batches: Sequence[np.ndarray],
    example_weights: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> dict[str, Tensor]:
    """Train for each row of ``example_weights``, ``(D, examples)``; the arguments are else those of ``retrain``."""
    # One buffer (D, parameters) holds all parameters, so that an optimizer step is a few operations on the whole of it.
    theta = torch.cat([value.flatten() for value in initial.values()]).repeat(len(example_weights), 1)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    pieces = torch.split(theta, [value.numel() for value in initial.values()], dim=1)
    parameters = {name: piece.view(-1, *initial[name].shape) for name, piece in zip(initial, pieces, strict=True)}
    for t, batch in enumerate(batches):
        rows = torch.as_tensor(batch)
        gradients = _gradient(
            list(parameters.values()), inputs[rows], targets[rows], example_weights[:, rows] / len(rows)
        )
        gradient = torch.cat([value.flatten(1) for value in gradients], dim=1)
        # m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  theta = theta - lr_t m_hat / sqrt(v_hat + eps)
        first.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
        second.mul_(betas[1]).add_(gradient.square_(), alpha=1 - betas[1])
        rate = lr * (1 - t / len(batches)) / (1 - betas[0] ** (t + 1))
        theta -= rate * first / (second / (1 - betas[1] ** (t + 1)) + eps).sqrt()
    return parameters


def _forward(parameters: list[Tensor], inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits (D, B, C), the hidden layer h before GELU (D, B, U), and Phi(h) (D, B, U)."""
    weight1, bias1, weight2, bias2 = parameters
    hidden = inputs @ weight1.mT + bias1[:, None]
    cdf = (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return (hidden * cdf) @ weight2.mT + bias2[:, None], hidden, cdf


def _gradient(parameters: list[Tensor], inputs: Tensor, targets: Tensor, weights: Tensor) -> list[Tensor]:
    """The gradient of ``sum_i weights[:, i] l_i`` by each parameter; ``weights`` is (D, B)."""
    logits, hidden, cdf = _forward(parameters, inputs)
    d_logits = logits.softmax(-1)
    d_logits[:, torch.arange(len(targets)), targets] -= 1
    d_logits *= weights[..., None]
    # (h Phi(h))' = Phi(h) + h phi(h)
    slope = cdf + hidden * torch.exp(-hidden * hidden / 2) / math.sqrt(2 * math.pi)
    d_hidden = (d_logits @ parameters[2]) * slope
    return [d_hidden.mT @ inputs, d_hidden.sum(1), d_logits.mT @ (hidden * cdf), d_logits.sum(1)]
