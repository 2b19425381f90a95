"""The last linear layer of a classifier: which it is, and what goes in and comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.influence import classifier_influence
from lightning_sketch.influence.classifier import Curvature
from lightning_sketch.prediction.outputs import targets_of
from lightning_sketch.unlearning.protocol import Run


@contextmanager
def _calls(layers: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Give the list of calls of these layers: name, input and output."""
    found: list[tuple[str, Tensor, Tensor]] = []

    def recorder(name: str) -> Callable[..., None]:
        return lambda _, args, output: found.append((name, args[0], output))

    handles = [layer.register_forward_hook(recorder(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def find_head(run: Run, head: str) -> str:
    """Return the name of the head: the one given, or of the ``nn.Linear`` that is called last.

    Raises:
        ConfigurationError: if there is no such layer.
    """
    layers = {name: m for name, m in run.module.named_modules() if isinstance(m, nn.Linear)}
    if head != "auto":
        if head not in layers:
            raise ConfigurationError(f"`head` is {head!r}: the module has the linear layers {sorted(layers)}.")
        return head
    with _calls(layers) as calls, torch.no_grad():
        run.losses(run.forget[0])
    if not calls:
        raise ConfigurationError("`head='auto'` found no nn.Linear that the loss calls: name one with `head`.")
    return calls[-1][0]


def head_influence(run: Run, head: str, batches: Sequence[Any], curvature: Curvature, damping: float) -> Tensor:
    """Return the influence of every example of the batches on their mean loss, ``(n,)``, through the head alone.

    Raises:
        ConfigurationError: if the loss is not the cross-entropy of what the head returns.
    """
    layer = run.module.get_submodule(head)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        with _calls({head: layer}) as calls, torch.no_grad():
            losses = run.losses(batch)
        targets = targets_of(batch).to(losses.device)
        if (
            len(calls) != 1
            or calls[0][2].shape[:-1] != losses.shape
            or not _is_cross_entropy(calls[0][2], targets, losses)
        ):
            raise ConfigurationError(
                f"`head`: the loss is not the cross-entropy of the outputs of `{head}`, called once with (B, d), which "
                "the influence at a classifier's last layer is of: name the layer that gives the logits, give such a "
                "`loss`, or use GradientAscent."
            )
        parts.append((calls[0][1], calls[0][2], targets))
    features, logits, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    bias = getattr(layer, "bias", None) is not None
    return classifier_influence(features, logits, targets, curvature=curvature, damping=damping, bias=bias)


def _is_cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor) -> bool:
    if targets.shape != losses.shape or targets.is_floating_point() or bool((targets >= logits.shape[1]).any()):
        return False
    if bool((targets < 0).any()):
        return False
    tolerance = torch.finfo(losses.dtype).eps ** 0.5
    expected = F.cross_entropy(logits.double(), targets.long(), reduction="none")
    return torch.allclose(expected, losses.double(), rtol=tolerance, atol=tolerance)
