"""Scaled dot-product attention, where torch would call a fused kernel: written out in operators that have rules."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_sketch.jets.registry import jet_rule

aten = torch.ops.aten


def _scores(q: Any, k: Any, causal: bool, mask: Any, scale: float | None) -> Any:
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores if mask is None else scores + mask


@jet_rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def flash_attention(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, *, attn_mask: Any = None, scale: Any = None
) -> tuple[Any, Any]:
    """``softmax(scale q k^T + mask) v`` and the logarithms of the sums; the fused CPU kernel has no dropout."""
    scores = _scores(q, k, is_causal, attn_mask, scale)
    return torch.softmax(scores, -1) @ v, scores.logsumexp(-1)


@jet_rule(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def flash_attention_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, dropout_p: float, is_causal: bool, *,
    attn_mask: Any = None, scale: Any = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """``dS = P (dP - sum(dP P))`` with ``dP = grad v^T``: the adjoints of softmax and of the two products."""
    p = torch.softmax(_scores(q, k, is_causal, attn_mask, scale), -1)
    dp = p * (grad @ v.mT)
    ds = (dp - p * dp.sum(-1, keepdim=True)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return ds @ k, ds.mT @ q, p.mT @ grad
