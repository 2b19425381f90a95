"""The models that the benchmarks measure, and one gradient of each, plain and on jets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch.jets import JetTensor
from lightning_sketch.optim import StableAdamW
from lightning_sketch.shadow.planning import StepSize, directions_per_pass

# What every Trainer of the benchmarks is given: nothing printed, nothing written.
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int, norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width) if norm else nn.Identity()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width) if norm else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder of 0.8M parameters."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        vocabulary, width, layers, heads, context = 65, 128, 4, 4, 64
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, norm) for _ in range(layers)))
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(h)))


@dataclass
class Case:
    """A model with one batch."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def loss(self, params: dict[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """Mean cross-entropy; ``weights``, one per example, may be jets."""
        logits = functional_call(self.model, params, (self.inputs,))
        losses = F.cross_entropy(logits.flatten(0, -2), self.targets.flatten(), reduction="none")
        if weights is None:
            return losses.mean()
        return (losses.view(len(weights), -1) * weights.unsqueeze(1)).sum() / losses.numel()

    def plain(self) -> Callable[[], None]:
        """Return one plain gradient."""
        params = {name: p.detach().requires_grad_() for name, p in self.model.named_parameters()}
        return lambda: torch.autograd.grad(self.loss(params), list(params.values())) and None

    def jets(self, degree: int, directions: int, real: bool) -> Callable[[], None]:
        """Return one gradient on jets, of parameters whose coefficients all differ from zero."""
        lead = (degree, 1 if real else 2, directions)
        params = {}
        for name, p in self.model.named_parameters():
            coefficients = 1e-3 * torch.randn(*lead, *p.shape, dtype=p.dtype, device=p.device)
            params[name] = JetTensor(p.detach(), coefficients, requires_grad=True)
        ones = torch.ones(len(self.inputs), device=self.inputs.device)
        weights = JetTensor(ones, 1e-3 * torch.randn(*lead, len(ones), device=ones.device))

        def gradient() -> None:
            with sdpa_kernel(SDPBackend.MATH):
                torch.autograd.grad(self.loss(params, weights), list(params.values()))

        return gradient

    def in_passes(self, degree: int, directions: int, real: bool) -> Callable[[], None]:
        """Return the gradients along all directions, as many at a time as `SketchCallback` would carry."""
        size = StepSize(0, 0, 0, self.largest())
        each = directions_per_pass(size, 1 if real else 2, degree, self.inputs.device)
        counts = [min(each, directions - start) for start in range(0, directions, each)]
        gradients = {count: self.jets(degree, count, real) for count in set(counts)}

        def all_gradients() -> None:
            for count in counts:
                gradients[count]()

        return all_gradients

    def largest(self) -> int:
        """Bytes of the largest output of a layer, or parameter."""
        sizes = [p.nbytes for p in self.model.parameters()]
        handles = [m.register_forward_hook(lambda *a: sizes.append(a[2].nbytes)) for m in self.model.modules()]
        self.model(self.inputs)
        for handle in handles:
            handle.remove()
        return max(sizes)


def mlp() -> Case:
    """512-512-512-10, batch of 64."""
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10))
    return Case("MLP", model, torch.randn(64, 256), torch.randint(0, 10, (64,)))


def cnn() -> Case:
    """Two convolutions of 32 and 64 channels on 16 x 16 images, batch of 16."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.GELU(), nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.GELU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip
    return Case("CNN", model, torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,)))


def gpt(norm: bool = True) -> Case:
    """0.8M parameters, 8 sequences of 64 tokens."""
    return Case("GPT", GPT(norm=norm), torch.randint(0, 65, (8, 64)), torch.randint(0, 65, (8, 64)))


CASES = {"mlp": mlp, "cnn": cnn, "gpt": gpt}


class Training(pl.LightningModule):
    """Cross-entropy of a model, with two tensors of optimizer state a parameter."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model = case.model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return StableAdamW(self.parameters(), lr=1e-3)


def train(case: Case, rows: Tensor, callbacks: list[pl.Callback], accelerator: str = "cpu") -> None:
    """Train one epoch on rows of a case's batch, in batches of its size."""
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator=accelerator,
        devices=1,
        callbacks=callbacks,
        **QUIET,
    )
    data = TensorDataset(case.inputs[rows], case.targets[rows])
    trainer.fit(Training(case), DataLoader(data, batch_size=len(case.inputs)))
