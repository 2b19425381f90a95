"""One operation for many tensors: models are made of hundreds, and calling costs more than the arithmetic of most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")
_JOINED = 1 << 20  # entries at most: larger tensors are not worth a copy


class Copies:
    """Copies of many tensors, which lie side by side in few.

    Args:
        tensors: to be copied, by name.

    Attributes:
        values: the copies by name, in the memory order of the tensors.
        dtypes: of each.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        given = [t.detach() for t in tensors.values()]
        self._forms = _forms(given)
        self._sizes = [t.numel() for t in given]
        self._groups = _groups(given)
        self._bases: list[Tensor] = []  # one of each group
        self.dtypes = tuple(t.dtype for t in given)
        copies = list(given)
        for group in self._groups:
            if len(group) == 1:
                base = copies[group[0]] = given[group[0]].clone()
            else:
                base = _flatten_dense_tensors([given[i] for i in group])
                for i, part in zip(group, base.split([self._sizes[i] for i in group]), strict=True):
                    copies[i] = part.view(given[i].shape)
            self._bases.append(base)
        self.values = dict(zip(tensors, copies, strict=True))

    @torch.no_grad()
    def overwrite(self, tensors: Mapping[str, Tensor]) -> bool:
        """Copy others of the same names, if they have the same shapes, dtypes and memory order; return whether."""
        given = list(tensors.values())
        if _forms(given) != self._forms:
            return False
        if given:
            torch._foreach_copy_(list(self.values.values()), given)
        return True

    @torch.no_grad()
    def sums(self, function: Callable[..., Sequence[Tensor]], *columns: Sequence[Tensor]) -> Tensor:
        """Sum elementwise functions over each of the tensors.

        Args:
            function: is given one flat tensor of each column and of the copies; returns ``m`` tensors in float64 of the
                same length.
            columns: as many tensors each as there are copies, of the same shapes.

        Returns:
            float64, ``(m, n)``; ``(0,)`` without tensors.
        """
        found = []
        for group, base in zip(self._groups, self._bases, strict=True):
            whole = len(self._groups) == 1
            flat = [_flatten_dense_tensors(column if whole else [column[i] for i in group]) for column in columns]
            lengths = tuple(self._sizes[i] for i in group)
            found.append(torch.stack([_sums_of_segments(v, lengths) for v in function(*flat, base.reshape(-1))]))
        if not found:
            return torch.zeros(0, dtype=torch.float64)
        if len(found) == 1:
            return found[0]
        places = [i for group in self._groups for i in group]
        return torch.cat(found, 1)[:, _on_device(_inverse(places), found[0].device)]


def _forms(tensors: Sequence[Tensor]) -> list[Any]:
    contiguous = list(map(Tensor.is_contiguous, tensors))
    strides = [] if all(contiguous) else [None if c else t.stride() for c, t in zip(contiguous, tensors, strict=True)]
    return [list(map(_SHAPE, tensors)), list(map(_DTYPE, tensors)), contiguous, strides]


def _groups(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Tensors to be laid side by side: contiguous, of one dtype and device, and of not too many entries."""
    groups: list[list[int]] = []
    last: dict[Any, tuple[list[int], int]] = {}  # the group of a kind that is not full, and its entries
    for i, t in enumerate(tensors):
        group, entries = last.get((t.dtype, t.device), ([], _JOINED))
        if not t.is_contiguous():  # by itself, in its own memory order
            groups.append([i])
            continue
        if entries + t.numel() > _JOINED:
            group, entries = [], 0
            groups.append(group)
        group.append(i)
        last[t.dtype, t.device] = group, entries + t.numel()
    return groups


def _sums_of_segments(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    if len(lengths) == 1:
        return values.sum()[None]
    # `unsafe` saves a look at the lengths, which waits for the device
    return torch.segment_reduce(values, "sum", lengths=_on_device(lengths, values.device), unsafe=True)


def _inverse(places: list[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(places)), key=places.__getitem__))


@lru_cache(maxsize=32)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)
