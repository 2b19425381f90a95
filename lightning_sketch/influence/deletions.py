"""Deletions as users give them, and as weights ``x`` of examples."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.errors import ConfigurationError


def one_deletion(examples: Any, weights: Any, like: Tensor) -> Tensor:
    """Return ``x``, ``(n,)``, from exactly one of the two; ``like`` is ``(n, ...)`` of the fit.

    Raises:
        ConfigurationError: both or none, or what :func:`many_deletions` refuses.
    """
    if (examples is None) is (weights is None):
        raise ConfigurationError("give exactly one of `examples` and `weights`.")
    if examples is not None:
        return _of_examples(examples, like)
    return _of_weights(weights, like, ndim=1)


def many_deletions(sets: Any, like: Tensor) -> Tensor:
    """Return ``x``, ``(m, n)``, from a list of lists of examples, or from an array of weights.

    Raises:
        ConfigurationError: examples that do not exist or stand twice; weights of another shape, above 1 or not finite.
    """
    if isinstance(sets, Sequence):
        if not sets:
            raise ConfigurationError("`sets` is empty: give at least one list of examples.")
        return torch.stack([_of_examples(examples, like) for examples in sets])
    return _of_weights(sets, like, ndim=2)


def _of_examples(examples: Any, like: Tensor) -> Tensor:
    n = len(like)
    try:
        index = torch.as_tensor(examples)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"`examples` is {examples!r}: give a flat list of integers.") from error
    whole = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
    if index.ndim != 1 or not (whole or not len(index)):
        raise ConfigurationError(f"`examples` is {examples!r}: give a flat list of integers.")
    if len(index) and not (int(index.min()) >= 0 and int(index.max()) < n):
        raise ConfigurationError(f"`examples` holds {examples}: this model was fitted to examples 0 to {n - 1}.")
    if len(index) != len(index.unique()):
        raise ConfigurationError(f"`examples` holds {examples}, with an entry twice: list every one once.")
    x = like.new_zeros(n)
    x[index.long()] = 1
    return x


def _of_weights(weights: Any, like: Tensor, ndim: int) -> Tensor:
    try:
        x = torch.as_tensor(weights, device=like.device).detach().to(like.dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"`weights` is {type(weights).__name__}: give an array of numbers.") from error
    if x.ndim != ndim or x.shape[-1] != len(like):
        shape = f"({len(like)},)" if ndim == 1 else f"(m, {len(like)})"
        raise ConfigurationError(f"`weights` has shape {tuple(x.shape)}: give {shape}, one for each example.")
    if not (torch.isfinite(x) & (x <= 1)).all():
        raise ConfigurationError("`weights` must be finite and at most 1, which deletes an example; 0 keeps it.")
    return x
