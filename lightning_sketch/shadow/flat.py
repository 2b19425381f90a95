"""One operation for many tensors: models are made of hundreds, and calling costs more than the arithmetic of most."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, repeat
from operator import attrgetter
from typing import Any

import numpy as np
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
        for group in self._groups:
            alone = len(group) == 1
            self._bases.append(given[group[0]].clone() if alone else _flatten_dense_tensors([given[i] for i in group]))
        shapes = list(map(_SHAPE, given))
        self._parts: list[Any] = []  # indices, shapes, strides and offsets of the tensors of each group
        for group in self._groups:
            starts = accumulate((self._sizes[i] for i in group), initial=0)
            self._parts.append(([shapes[i] for i in group], [given[i].stride() for i in group], list(starts)[:-1]))
        self.values = self._split(tensors)

    def _split(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The parts of the bases, by name."""
        found: dict[int, Tensor] = {}
        for group, base, parts in zip(self._groups, self._bases, self._parts, strict=True):
            views = [base] if len(group) == 1 else map(torch.as_strided, repeat(base), *parts)
            found.update(zip(group, views, strict=True))
        return {name: found[i] for i, name in enumerate(names)}

    def clone(self) -> Copies:
        """Return copies of these, which lie side by side as they do."""
        cloned = copy.copy(self)
        cloned._bases = [base.clone() for base in self._bases]
        cloned.values = cloned._split(self.values)
        return cloned

    @property
    def joined(self) -> list[Tensor]:
        """The copies as :meth:`join` gives them."""
        return [base.reshape(-1) for base in self._bases]

    def like(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors have the shapes, dtypes and memory order of the copies."""
        return _forms(tensors) == self._forms

    @torch.no_grad()
    def overwrite(self, joined: Sequence[Tensor]) -> None:
        """Copy others of the same names: what :meth:`join` gave for tensors that are :meth:`like` the copies."""
        for base, flat in zip(self._bases, joined, strict=True):
            base.copy_(flat.view_as(base))

    @torch.inference_mode()  # takes less time than `no_grad`
    def join(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Lay tensors of the same shapes side by side, as the copies are; one that is by itself is not copied."""
        if len(self._groups) == 1:
            return [_flatten_dense_tensors(tensors)]
        return [_flatten_dense_tensors([tensors[i] for i in group]) for group in self._groups]

    @torch.inference_mode()
    def squares(self, function: Callable[..., Sequence[Tensor]], *columns: Sequence[Tensor]) -> Tensor:
        """Sum the squares of elementwise functions over each of the tensors.

        Args:
            function: is given one flat tensor of each column and of the copies; returns ``m`` as long, bool or numbers.
            columns: what :meth:`join` gave.

        Returns:
            float64, ``(m, n)``; ``(0,)`` without tensors.
        """
        found = [
            _squares(function(*flat), [self._sizes[i] for i in group])
            for group, *flat in zip(self._groups, *columns, self.joined, strict=True)
        ]
        if not found:
            return torch.zeros(0, dtype=torch.float64)
        if len(found) == 1:
            return found[0]
        places = [i for group in self._groups for i in group]
        return torch.cat(found, 1)[:, _on_device(_inverse(places), found[0].device)]


def known_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether tensors hold the values of others. Not known, so not true, of NaN and on a device to be waited for."""
    return all(map(_on_host, some)) and all(map(torch.equal, some, others))


def known_same_and_finite(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether :func:`known_same` holds of floating-point tensors, and none of their values is infinite."""
    return all(map(_on_host, some)) and all(torch.dist(a, b, 1).item() == 0 for a, b in zip(some, others, strict=True))


def read_at_once(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Return the numbers of tensors, float64; those on a device are read together, since every read waits for it."""
    remote = [t.reshape(-1) for t in tensors if not _on_host(t)]
    read = iter(torch.cat(remote).cpu().split([len(t) for t in remote]) if remote else ())
    return [(t if _on_host(t) else next(read).view(t.shape)).double().numpy() for t in tensors]


def _on_host(t: Tensor) -> bool:
    return t.is_cpu


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


def _squares(values: Sequence[Tensor], lengths: list[int]) -> Tensor:
    """Sums over parts of ``m`` flat tensors, ``(m, len(lengths))``."""
    if len(lengths) == 1:  # it may be large
        sums = [v.count_nonzero() if v.dtype == torch.bool else v.double().square().sum() for v in values]
        return torch.stack(sums)[:, None].double()
    squares = torch.stack([*values]).double().square()
    parts = _on_device(tuple(lengths * len(values)), squares.device)
    # `unsafe` saves a look at the lengths, which waits for the device
    return torch.segment_reduce(squares.reshape(-1), "sum", lengths=parts, unsafe=True).reshape(len(values), -1)


def _inverse(places: list[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(places)), key=places.__getitem__))


@lru_cache(maxsize=32)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)
