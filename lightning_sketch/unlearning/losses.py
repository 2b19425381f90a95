"""The training loss of every example, as a function of a module's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.prediction.outputs import logits, targets_of
from lightning_sketch.shadow.example_ids import batch_size
from lightning_sketch.shadow.weighting import REMEDY, LossWeighting, PerExampleLoss, training_loss
from lightning_sketch.shadow.wrapping import arguments_of, own_training_step


def per_example_loss(loss: Literal["auto"] | PerExampleLoss, module: Any) -> Callable[[Any], Tensor]:
    """Return the function of a batch that gives the losses of its examples, ``(B,)``, differentiable in parameters.

    Args:
        loss: ``callable(module, batch) -> (B,)``, or ``"auto"``: the module's ``per_example_loss(batch)`` if it has
            one; else the ``torch.nn.functional`` losses inside its ``training_step``; else, for a plain module, the
            cross-entropy of ``module(x)`` on batches ``(x, y)`` with classes ``y``.
        module: whose loss it is.

    Raises:
        ConfigurationError: if ``loss`` is neither; and, from the function, if the losses are not one for each example.
    """
    weighting = LossWeighting(loss, "batch")
    function = weighting.per_example(module)
    if function is None:
        function = cross_entropy
        if hasattr(module, "training_step"):
            return lambda batch: _checked(_intercepted(weighting, module, batch), batch)
    return lambda batch: _checked(function(module, batch), batch)


def cross_entropy(module: Any, batch: Any) -> Tensor:
    """Return the cross-entropy of ``module(x)``, ``(B, C)``, with the classes ``y``, ``(B,)``, of a batch ``(x, y)``.

    Raises:
        ConfigurationError: for other batches and outputs.
    """
    outputs, targets = logits(module, batch), targets_of(batch)
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or targets.is_floating_point():
        raise ConfigurationError(
            f"`loss='auto'` is the cross-entropy of outputs (B, C) with classes (B,), but they have shapes "
            f"{tuple(outputs.shape)} and {tuple(targets.shape)} ({targets.dtype}): give `loss=callable(module, batch) "
            "-> (B,)`."
        )
    return F.cross_entropy(outputs, targets, reduction="none")


def _intercepted(weighting: LossWeighting, module: Any, batch: Any) -> Tensor:
    """The loss is affine in the weights of examples: its gradient by them is the examples' shares, l_i = B dL/dw_i."""
    size = batch_size(batch)
    if size is None:
        raise ConfigurationError(
            f"`loss='auto'` needs batches whose tensors share their first dimension (the examples): {REMEDY}."
        )
    like = next(p for p in module.parameters() if p.is_floating_point())
    step = own_training_step(module)
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        weights = torch.ones(size, dtype=like.dtype, device=like.device, requires_grad=True)
        loss = training_loss(weighting(module, step, arguments_of(step, batch, 0), weights))
        if loss is None:
            raise ConfigurationError("`training_step` returned no loss for a batch: leave such batches out.")
        (shares,) = torch.autograd.grad(loss, weights, create_graph=differentiable)
    return shares * size


def _checked(losses: Any, batch: Any) -> Tensor:
    size = batch_size(batch)
    if not isinstance(losses, Tensor) or losses.ndim != 1 or (size is not None and len(losses) != size):
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigurationError(f"`loss` must return one loss per example, ({size or 'B'},), but returned {found}.")
    return losses
