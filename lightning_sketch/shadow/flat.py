"""One operation for many tensors: models are made of hundreds, and calling costs more than the arithmetic of most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

_JOINED = 1 << 20  # entries at most: larger tensors are not worth a copy


def sums(function: Callable[..., Sequence[Tensor]], *columns: Sequence[Tensor]) -> Tensor:
    """Sum elementwise functions over each of many tensors.

    Args:
        function: is given one flat tensor of each column; returns ``m`` tensors in float64 of the same length.
        columns: ``n`` tensors each; those of one place have the same shape and dtype.

    Returns:
        float64, ``(m, n)``; ``(0,)`` without tensors.
    """
    sizes = [t.numel() for t in columns[0]]
    groups = _joined(columns[0], sizes)
    found = []
    for rows in groups:
        values = function(*(_flatten_dense_tensors([column[i] for i in rows]) for column in columns))
        lengths = tuple(sizes[i] for i in rows)
        found.append(torch.stack([v.sum()[None] if len(rows) == 1 else _sums_of_segments(v, lengths) for v in values]))
    if not found:
        return torch.zeros(0, dtype=torch.float64)
    if len(found) == 1:
        return found[0]
    joined = torch.cat(found, 1)
    return joined[:, _on_device(_inverse([i for rows in groups for i in rows]), joined.device)]


def _joined(tensors: Sequence[Tensor], sizes: list[int]) -> list[Sequence[int]]:
    """Rows to be laid side by side: of one dtype, and not too many entries."""
    dtypes = [t.dtype for t in tensors]
    if len(set(dtypes)) == 1 and sum(sizes) <= _JOINED:
        return [range(len(sizes))]
    groups: list[Sequence[int]] = []
    for dtype in set(dtypes):
        group: list[int] = []
        entries = 0
        for i, size in enumerate(sizes):
            if dtypes[i] != dtype:
                continue
            if group and entries + size > _JOINED:
                groups.append(group)
                group, entries = [], 0
            group.append(i)
            entries += size
        groups.append(group)
    return groups


def _sums_of_segments(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    # `unsafe` saves a look at the lengths, which waits for the device
    return torch.segment_reduce(values, "sum", lengths=_on_device(lengths, values.device), unsafe=True)


def _inverse(places: list[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(places)), key=places.__getitem__))


@lru_cache(maxsize=32)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)
