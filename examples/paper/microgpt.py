"""The microgpt of *How to sketch a learning algorithm* (Gunn, arXiv 2604.07328) as a LightningModule.

The model is Karpathy's ``microgpt``: a character-level transformer of one layer and 4,192 parameters, trained on one
name per step. As in the paper GELU takes the place of ReLU and Adam's ``eps`` of 1e-3 stands inside the root, so that
training is an analytic function of the weight of every name.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lightning_sketch.optim import StableAdamW

BOS = 26  # stands before a name and ends it; the letters a-z are 0-25
VOCABULARY = 27
IGNORED = -100  # padding: no loss is taken there
BLOCK, WIDTH, HEADS = 16, 16, 4


def load_names(path: str | Path, limit: int | None = None) -> list[str]:
    """Read the first ``limit`` names of a file, one name a line, and shuffle them with ``random.Random(42)``.

    Args:
        path: Text file of lower-case names of the letters a-z.
        limit: How many names to keep; None keeps all.

    Returns:
        The names in training order.
    """
    names = Path(path).read_text(encoding="utf-8").split()[:limit]
    random.Random(42).shuffle(names)
    return names


class NamesDataset(Dataset[Tensor]):
    """Names as tokens: ``dataset[i]`` is an int64 tensor ``(L,)``, BOS, the letters and BOS, with ``L <= BLOCK + 1``.

    Args:
        names: Lower-case names of the letters a-z; longer ones than ``BLOCK`` are cut.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        tokens = [BOS, *(ord(letter) - ord("a") for letter in self.names[index]), BOS]
        return torch.tensor(tokens[: BLOCK + 1])


def collate_names(items: list[Tensor]) -> Tensor:
    """Stack names to ``(B, L)``, the shorter ones padded with ``IGNORED``; batches of one name do without."""
    return pad_sequence(items, batch_first=True, padding_value=IGNORED)


class MicroGPT(lightning.LightningModule):
    """One pre-norm transformer layer without biases, and its training by Adam with a linearly falling learning rate.

    Every weight starts from ``N(0, 0.08^2)``. RMSNorm has no parameters: ``x / sqrt(mean(x^2) + 1e-5)``.

    Args:
        steps: Training steps ``T``; step ``t`` (zero-based) has learning rate ``lr * (1 - t / T)``.
        lr: Learning rate of the first step.

    Shape:
        ``forward``: int64 tokens ``(B, T)`` to logits ``(B, T, VOCABULARY)``, ``T <= BLOCK``.
    """

    def __init__(self, steps: int = 1000, lr: float = 0.01) -> None:
        super().__init__()
        self.steps, self.lr = steps, lr
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = nn.Embedding(BLOCK, WIDTH)
        self.attn_wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attn_wk = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attn_wv = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attn_wo = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp_fc1 = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.mlp_fc2 = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.08)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``(B, T, VOCABULARY)`` of the token after each of ``tokens``, ``(B, T)``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = _rms_norm(self.wte(tokens) + self.wpe(positions))
        x = x + self._attention(_rms_norm(x))
        x = x + self.mlp_fc2(F.gelu(self.mlp_fc1(_rms_norm(x))))
        logits: Tensor = self.lm_head(x)
        return logits

    def _attention(self, x: Tensor) -> Tensor:
        """Causal self-attention of ``HEADS`` heads, ``(B, T, WIDTH)`` to the same shape."""
        query, key, value = (
            project(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project in (self.attn_wq, self.attn_wk, self.attn_wv)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.attn_wo(mixed.transpose(1, 2).flatten(-2))
        return output

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean over all positions of ``-log p(next token)``, in nats, for names ``(B, L)``."""
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = self(inputs.masked_fill(inputs == IGNORED, BOS))  # causal: what stands behind a name cannot reach it
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def configure_optimizers(self) -> Any:
        """Return Adam with ``eps`` inside the root, and the linear decay stepped after every batch."""
        optimizer = StableAdamW(self.parameters(), lr=self.lr, betas=(0.85, 0.99), eps=1e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _rms_norm(x: Tensor) -> Tensor:
    """``x / sqrt(mean(x^2) + 1e-5)`` over the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)
