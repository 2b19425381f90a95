"""Where a module keeps its submodules, tensors and attributes, found by one walk that holds until something moves."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Mapping
from itertools import chain, compress, repeat
from operator import getitem, is_, is_not, ne, setitem
from typing import Any, TypeVar

import torch
import torchmetrics
from torch import Tensor, nn

T = TypeVar("T")

# What an empty nn.Module keeps for itself: hooks and submodules stay
STRUCTURE = frozenset(nn.Module().__dict__) - {"training"}
IMMUTABLE = frozenset({int, float, bool, str, bytes, complex, type(None), torch.Size, torch.dtype, torch.device})
_STORES = ("_modules", "_parameters", "_buffers")


def by_name(module: nn.Module, attributes: Iterable[tuple[nn.Module, str, T]]) -> dict[str, T]:
    """Name attributes of submodules, ``(owner, attribute, value)``, such as ``net.center``.

    Paths take longer to make than all the rest, so only what was found in a walk is named.
    """
    attributes = list(attributes)
    if not attributes:
        return {}
    paths = {m: f"{path}." if path else "" for path, m in module.named_modules()}
    return {f"{paths.get(owner, '')}{key}": value for owner, key, value in attributes}


_METRICS: dict[type, bool] = {}  # isinstance is slow for abstract classes


def is_metric(value: object) -> bool:
    """Whether it is a metric or a collection of metrics."""
    kind = type(value)
    if kind not in _METRICS:
        _METRICS[kind] = issubclass(kind, (torchmetrics.Metric, torchmetrics.MetricCollection))
    return _METRICS[kind]


class Places:
    """Where a module and its submodules keep tensors and attributes.

    A walk through hundreds of submodules takes longer than what is done with what it finds. Whether anything has moved
    since is told in a fraction of that time, by :meth:`now`: no loop over modules is one of Python.

    Args:
        module: any module.

    Attributes:
        module: the module.
        modules: it and all its submodules.
        params: ``dict(module.named_parameters())``.
        buffers: ``dict(module.named_buffers())``.
        tensors: both.
        metrics: those of the modules that are metrics.
        of_each_type: one of the modules of each type.
        attributes: every attribute but hooks, submodules, parameters and buffers, as owner and name.
        values: of the attributes, when they were last looked at.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules = list(module.modules())
        self.params, self.buffers = dict(module.named_parameters()), dict(module.named_buffers())
        self.tensors = {**self.params, **self.buffers}
        self.metrics: list[Any] = [m for m in self.modules if is_metric(m)]
        self.of_each_type = [*{type(m): m for m in self.modules}.values()]
        self._owners = [m.__dict__ for m in self.modules]
        self._sizes = list(map(len, self._owners))
        self._own = [[key for key in owner if key not in STRUCTURE] for owner in self._owners]
        self.attributes = [(m, key) for m, own in zip(self.modules, self._own, strict=True) for key in own]
        self._cells = [m.__dict__ for m, _ in self.attributes], [key for _, key in self.attributes]
        self.values = self._read()
        self._mutable: list[tuple[nn.Module, str, Any]] | None = None  # made when it is asked for
        self._store_cells = [owner for owner in self._owners for _ in _STORES], _STORES * len(self.modules)
        self._filled = self._stores()
        self._lengths = list(map(len, self._filled))
        self._keys = [*chain.from_iterable(self._filled)]
        self._held = [*chain.from_iterable(map(dict.values, self._filled))]
        others: list[Any] = [store for m in self.modules for store in (m._modules, m._buffers)]
        self._others, self._no_others = [s for s in others if s], [s for s in others if not s]
        own: list[dict[str, Any]] = [store for m in self.modules for store in (m._parameters, m._buffers)]
        self._of_tensors = [store for store in own if store]
        self._tensor_keys = [*chain.from_iterable(self._of_tensors)]
        stores = [*chain.from_iterable(map(repeat, self._of_tensors, map(len, self._of_tensors)))]
        self._tensor_cells = stores, self._tensor_keys, [*chain.from_iterable(map(dict.values, self._of_tensors))]
        self._empty = [store for store in own if not store]
        names = {id(t): name for name, t in self.tensors.items()}  # by identity, so that tied weights stay tied
        self._named = [(s, key, names[id(t)]) for s in self._of_tensors for key, t in s.items() if t is not None]

    def _read(self) -> list[Any]:
        return list(map(getitem, *self._cells))

    def _stores(self) -> list[dict[str, Any]]:
        """The dictionaries of submodules, parameters and buffers that are not empty."""
        return [*filter(None, map(getitem, *self._store_cells))]

    def now(self) -> Places:
        """Return these, with the present ``values``, if nothing has moved, or else those of another walk."""
        filled = self._stores()
        if (
            list(map(len, self._owners)) == self._sizes
            and list(map(len, filled)) == self._lengths
            and all(map(is_, filled, self._filled))
            and [*chain.from_iterable(filled)] == self._keys
            and all(map(is_, chain.from_iterable(map(dict.values, filled)), self._held))
        ):
            try:
                values = self._read()
            except KeyError:  # one attribute in the place of another
                return Places(self.module)
            if not all(map(is_, self.values, values)):
                changed = compress(zip(self.values, values, strict=True), map(is_not, self.values, values))
                if not IMMUTABLE.issuperset(map(type, chain.from_iterable(changed))):
                    self._mutable = None
                self.values = values
            return self
        return Places(self.module)

    def others(self) -> list[Any]:
        """Return the submodules and buffers that are in the places now, for :meth:`reassigned`."""
        return [*chain.from_iterable(map(dict.values, self._others))]

    def reassigned(self, others: list[Any]) -> bool:
        """Whether there are now submodules and buffers besides ``others``, or not all of these."""
        now = self.others()
        return any(self._no_others) or len(now) != len(others) or not all(map(is_, now, others))

    def mutable(self) -> list[tuple[nn.Module, str, Any]]:
        """Return the attributes whose values may be changed in place, as owner, name and value."""
        if self._mutable is None:
            pairs = zip(self.attributes, self.values, strict=True)
            self._mutable = [(*place, v) for place, v in pairs if type(v) not in IMMUTABLE]
        return self._mutable

    def read(self, names: Container[str]) -> dict[str, Tensor]:
        """Return the parameters and buffers of these names that are in their places."""
        found = {name: store.get(key) for store, key, name in self._named if name in names}
        return {name: t for name, t in found.items() if t is not None}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Put others in the place of parameters and buffers, by name."""
        for store, key, name in self._named:
            if name in tensors:
                store[key] = tensors[name]

    def put_back(self) -> None:
        """Put parameters and buffers back, and take away what has been registered since."""
        deque(map(setitem, *self._tensor_cells), maxlen=0)
        # the order is that of `named_parameters`
        if [*chain.from_iterable(self._of_tensors)] != self._tensor_keys:
            for store in self._of_tensors:
                store.clear()
            deque(map(setitem, *self._tensor_cells), maxlen=0)
        for store in filter(None, self._empty):
            store.clear()

    def change_values(self, values: list[Any], present: list[Any]) -> None:
        """Give the attributes other ``values``, where they have the ``present`` ones and no others have been made."""
        for owner, key, value in compress(zip(*self._cells, values, strict=True), map(is_not, values, present)):
            owner[key] = value

    def set_values(self, values: list[Any]) -> None:
        """Give the attributes earlier ``values``, and delete those that have been made since."""
        deque(map(setitem, *self._cells, values), maxlen=0)
        changed = map(ne, map(len, self._owners), self._sizes)
        for owner, own in compress(zip(self._owners, self._own, strict=True), changed):
            for key in [key for key in owner if key not in STRUCTURE and key not in own]:
                del owner[key]
