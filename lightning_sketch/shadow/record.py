"""What one call of the user's ``training_step`` saw, so that it can be run again exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sketch.shadow.quiet import ModuleState, RandomState, quiet
from lightning_sketch.shadow.weighting import LossWeighting, training_loss


@dataclass
class StepRecord:
    """One micro-batch of the user's run.

    Attributes:
        args: what ``training_step`` was called with; the batch first.
        units: unit of every example, int64 ``(B,)``, -1 = not deletable.
        random_state: generators at entry.
        module_state: attributes at entry.
        buffers: the module's buffers at entry, copied.
        accumulate: over how many micro-batches the gradient is averaged.
        loss: the user's loss, before division by ``accumulate``.
    """

    args: tuple[Any, ...]
    units: Tensor
    random_state: RandomState
    module_state: ModuleState
    buffers: dict[str, Tensor]
    accumulate: int = 1
    loss: Tensor | None = None


class _Call(nn.Module):
    """Lets ``functional_call`` replace a module's tensors while any function of it runs."""

    def __init__(self, module: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self) -> Any:
        return self.function()


def call_with_tensors(module: nn.Module, tensors: dict[str, Tensor], function: Callable[[], Any]) -> Any:
    """Run ``function()`` while parameters and buffers of ``module`` are replaced; reassigned ones are written back to ``tensors``."""
    prefixed = {f"module.{name}": t for name, t in tensors.items()}
    try:
        return torch.func.functional_call(_Call(module, function), prefixed, ())
    finally:
        tensors.update({name.removeprefix("module."): t for name, t in prefixed.items()})


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Choose kernels that are made of operators with rules: attention by matrix products, no fused encoder layers."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def replay(
    module: Any,
    record: StepRecord,
    training_step: Callable[..., Any],
    weighting: LossWeighting,
    weights: Tensor,
    tensors: dict[str, Tensor],
) -> Tensor:
    """Run the recorded step again with weighted examples and replaced tensors, and return its loss.

    Args:
        module: the user's LightningModule.
        record: the step.
        training_step: the module's unwrapped training step.
        weighting: how weights enter the loss.
        weights: shape ``(B,)``.
        tensors: parameters and buffers by name; buffers that the step reassigns are written back here.

    Returns:
        The weighted loss, before division by ``record.accumulate``.
    """
    with quiet(module, record.random_state, record.module_state), differentiable_kernels(), torch.enable_grad():
        outputs = call_with_tensors(module, tensors, lambda: weighting(module, training_step, record.args, weights))
        loss = training_loss(outputs)
    assert loss is not None, "a step whose training_step returned None is not recorded"
    return loss
