"""microgpt's training in numpy with hand-written derivatives, for real or complex deletion weights.

It trains N parameter sets at once, one for each row of deletion weights; every array leads with that axis N. Every
formula is holomorphic (no conjugate, no modulus), so with complex weights the final parameters continue the real run
analytically.
Model and training: Karpathy, *microgpt*, with GELU and Adam's eps inside the root as in Gunn (arXiv 2604.07328).
Letters in shape comments: N parameter sets, T positions, C width 16, H heads, V vocabulary 27.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import erf

Array = npt.NDArray[Any]

HEADS = 4
BOS = 26
BLOCK = 16


def encode(name: str) -> Array:
    """Return BOS, the letters a-z as 0-25 and BOS, int64, cut to ``BLOCK + 1`` tokens."""
    return np.array([BOS, *(ord(letter) - ord("a") for letter in name), BOS])[: BLOCK + 1]


def train(
    initial: Mapping[str, Array],
    sequences: Sequence[Array],
    x: Array,
    *,
    order: Sequence[int] | None = None,
    lr: float = 0.01,
    betas: tuple[float, float] = (0.85, 0.99),
    eps: float = 1e-3,
) -> dict[str, Array]:
    """Train N times on the same sequences, one sequence a step, sequence ``i`` with loss weight ``1 - x[:, i]``.

    Args:
        initial: Real parameters ``(*S)`` by their names in ``MicroGPT``.
        sequences: Tokens of each example, int64 ``(L_i,)`` with BOS at both ends.
        x: Deletion weights ``(N, len(sequences))``, float64 or complex128.
        order: Which sequence each step takes; None takes each one once, in order.
        lr: Learning rate; step ``t`` of ``T`` (zero-based) takes ``lr * (1 - t / T)``.
        betas: Decay rates of Adam's moments.
        eps: Added to the second moment under the root.

    Returns:
        The final parameters, ``(N, *S)`` by name, of the dtype of ``x``.
    """
    steps = range(len(sequences)) if order is None else order
    # One buffer (N, parameters) holds all parameters, so that an optimizer step is a few operations on the whole of it.
    theta = np.tile(np.concatenate([value.ravel() for value in initial.values()]), (len(x), 1)).astype(x.dtype)
    first, second, gradient = np.zeros_like(theta), np.zeros_like(theta), np.zeros_like(theta)
    parameters = _named_views(theta, initial)
    gradients = _named_views(gradient, initial)
    for t, i in enumerate(steps):
        _, computed = loss_and_gradient(parameters, sequences[i])
        for name, value in computed.items():
            gradients[name][...] = value
        gradient *= 1 - x[:, i, None]
        # m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  theta = theta - lr_t m_hat / sqrt(v_hat + eps)
        first += (1 - betas[0]) * (gradient - first)
        second += (1 - betas[1]) * (gradient * gradient - second)
        rate = lr * (1 - t / len(steps)) / (1 - betas[0] ** (t + 1))
        theta -= rate * first / np.sqrt(second / (1 - betas[1] ** (t + 1)) + eps)
    return parameters


def loss_and_gradient(parameters: Mapping[str, Array], tokens: Array) -> tuple[Array, dict[str, Array]]:
    """Return the mean over positions of ``-log p(next token)``, ``(N,)`` in nats, and its gradient ``(N, *S)`` by name.

    Args:
        parameters: ``(N, *S)`` by name.
        tokens: One sequence, int64 ``(T + 1,)``.
    """
    p = {name.removesuffix(".weight"): value for name, value in parameters.items()}
    inputs, targets = tokens[:-1], tokens[1:]
    length = len(inputs)

    # Forward; every activation is (N, T, C) unless said.
    x1, s1 = _norm(p["wte"][:, inputs] + p["wpe"][:, :length])
    x2, s2 = _norm(x1)
    q, k, v = (_heads(_linear(x2, p[name])) for name in ("attn_wq", "attn_wk", "attn_wv"))  # (N, H, T, C/H)
    scale = q.shape[-1] ** -0.5
    causal = np.tri(length, dtype=bool)
    attention = _softmax(scale * q @ k.swapaxes(-1, -2), causal)  # (N, H, T, T)
    mixed = _unheads(attention @ v)
    x3 = x1 + _linear(mixed, p["attn_wo"])
    x4, s4 = _norm(x3)
    hidden = _linear(x4, p["mlp_fc1"])  # (N, T, 4C)
    cdf = (1 + erf(hidden / np.sqrt(2))) / 2
    active = hidden * cdf
    x5 = x3 + _linear(active, p["mlp_fc2"])
    probability = _softmax(_linear(x5, p["lm_head"]))  # (N, T, V)
    loss = -np.log(probability[:, np.arange(length), targets]).mean(axis=1)

    # Backward; d_y is the derivative of the loss by y.
    d_logits = probability / length
    d_logits[:, np.arange(length), targets] -= 1 / length
    g = {"lm_head": _outer(d_logits, x5)}
    d_x5 = d_logits @ p["lm_head"]
    g["mlp_fc2"] = _outer(d_x5, active)
    # (h Phi(h))' = Phi(h) + h phi(h)
    d_hidden = (d_x5 @ p["mlp_fc2"]) * (cdf + hidden * np.exp(-hidden * hidden / 2) / np.sqrt(2 * np.pi))
    g["mlp_fc1"] = _outer(d_hidden, x4)
    d_x3 = d_x5 + _norm_backward(d_hidden @ p["mlp_fc1"], x4, s4)
    g["attn_wo"] = _outer(d_x3, mixed)
    d_mixed = _heads(d_x3 @ p["attn_wo"])
    d_attention = d_mixed @ v.swapaxes(-1, -2)
    # softmax: d_score = a * (d_a - sum(a * d_a))
    d_scores = scale * attention * (d_attention - (attention * d_attention).sum(-1, keepdims=True))
    d_q = _unheads(d_scores @ k)
    d_k = _unheads(d_scores.swapaxes(-1, -2) @ q)
    d_v = _unheads(attention.swapaxes(-1, -2) @ d_mixed)
    g["attn_wq"], g["attn_wk"], g["attn_wv"] = _outer(d_q, x2), _outer(d_k, x2), _outer(d_v, x2)
    d_x2 = d_q @ p["attn_wq"] + d_k @ p["attn_wk"] + d_v @ p["attn_wv"]
    d_x0 = _norm_backward(d_x3 + _norm_backward(d_x2, x2, s2), x1, s1)
    g["wte"], g["wpe"] = np.zeros_like(p["wte"]), np.zeros_like(p["wpe"])
    for position, token in enumerate(inputs):  # a loop, for a letter may occur twice
        g["wte"][:, token] += d_x0[:, position]
    g["wpe"][:, :length] = d_x0
    return loss, {f"{name}.weight": value for name, value in g.items()}


def flatten(parameters: Mapping[str, Array]) -> Array:
    """Join parameters ``(N, *S)`` to one array ``(N, parameters)``, in the order of the mapping."""
    return np.concatenate([value.reshape(len(value), -1) for value in parameters.values()], axis=1)


def _named_views(flat: Array, like: Mapping[str, Array]) -> dict[str, Array]:
    """Split ``(N, parameters)`` to views ``(N, *S)`` by name."""
    ends = np.cumsum([value.size for value in like.values()])
    pieces = np.split(flat, ends[:-1], axis=1)
    return {name: piece.reshape(-1, *like[name].shape) for name, piece in zip(like, pieces, strict=True)}


def _linear(x: Array, weight: Array) -> Array:
    """``x W^T``: (N, T, in) and (N, out, in) to (N, T, out)."""
    return x @ weight.swapaxes(-1, -2)


def _outer(d_y: Array, x: Array) -> Array:
    """The gradient of W in ``y = x W^T``: (N, T, out) and (N, T, in) to (N, out, in)."""
    return d_y.swapaxes(-1, -2) @ x


def _norm(x: Array) -> tuple[Array, Array]:
    """``y = s x`` with ``s = (mean(x^2) + 1e-5)^(-1/2)``: return y (N, T, C) and s (N, T, 1)."""
    s = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return s * x, s


def _norm_backward(d_y: Array, y: Array, s: Array) -> Array:
    """``d_x = s (d_y - y mean(y d_y))``, from ``ds/dx_j = -s^3 x_j / C``."""
    return np.asarray(s * (d_y - y * (y * d_y).mean(-1, keepdims=True)))


def _softmax(scores: Array, mask: Array | None = None) -> Array:
    """Softmax over the last axis, zero where ``mask`` is False; the shift cancels, so it need not be holomorphic."""
    powers = np.exp(scores - scores.real.max(-1, keepdims=True))
    if mask is not None:
        powers = powers * mask
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def _heads(x: Array) -> Array:
    """(N, T, C) to (N, H, T, C/H)."""
    return x.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)


def _unheads(x: Array) -> Array:
    """(N, H, T, C/H) to (N, T, C)."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
