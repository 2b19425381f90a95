"""Plain tensors that a training step carries to the next one: they have no coefficients, so nobody may read them."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.jets.tensor import JetTensor
from lightning_sketch.shadow.places import Places, by_name
from lightning_sketch.shadow.quiet import ModuleState

_HOLDERS = (list, tuple, dict, deque)
_TENSOR_OR_HOLDER = (Tensor, *_HOLDERS)


class _Carried(torch.Tensor):
    """Stands for a value of the run whose coefficients are not known: any operator on it is an error."""

    location: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = next((a.location for a in flatten((args, kwargs)) if isinstance(a, _Carried)), "?")
        raise ConfigurationError(
            f"`{name}`: `training_step` reads a tensor that an earlier step or a hook left there and that may depend "
            "on the weights of the examples, but only parameters and buffers are tracked: register it with "
            "`register_buffer` and set it in `training_step`, or keep what does not depend on the data as a Python "
            "number."
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"_Carried({self.location})"


def flatten(value: Any) -> Iterator[Any]:
    """Yield what nested mappings and sequences hold."""
    if isinstance(value, _HOLDERS):
        for held in value.values() if isinstance(value, dict) else value:
            yield from flatten(held)
    else:
        yield value


def _attributes(places: Places) -> Iterator[tuple[nn.Module, str, Any]]:
    return (attribute for attribute in places.mutable() if isinstance(attribute[2], _TENSOR_OR_HOLDER))


class AttributeWatch:
    """Tells which attributes hold floating-point tensors that others than ``training_step`` left there."""

    def __init__(self) -> None:
        self._left: dict[tuple[nn.Module, str], list[tuple[Callable[[], Any], int]]] | None = None

    def note(self, places: Places) -> list[tuple[nn.Module, str]]:
        """Called after every ``training_step``; return which attributes hold any, as owner and name."""
        self._left = {}
        for m, key, value in _attributes(places):
            for t in flatten(value):
                if isinstance(t, Tensor) and _may_vary(t):
                    self._left.setdefault((m, key), []).append((weakref.ref(t), t._version))
        return list(self._left)

    def changed(self, before: ModuleState) -> frozenset[str]:
        """Return their names, given the state before a ``training_step``; all is constant before the first."""
        if self._left is None:
            return frozenset()
        return frozenset(
            by_name(
                before.places.module,
                (
                    (m, key, t)
                    for m, key, t, version in before.tensors
                    if _may_vary(t) and all(t is not r() or version != v for r, v in self._left.get((m, key), []))
                ),
            )
        )


def _may_vary(t: Tensor) -> bool:
    return t.dtype.is_floating_point and not t.is_inference()


def varying_attributes(module: nn.Module, left: Sequence[tuple[nn.Module, str]]) -> frozenset[str]:
    """Return the attributes, such as ``net.center``, that hold varying tensors outside parameters and buffers.

    Call it after a step, under ``quiet``: what it left there would be read by the next one without coefficients.

    Args:
        module: after the step.
        left: those in which the run left tensors, as owner and name.
    """
    values = ((m, key, m.__dict__.get(key)) for m, key in left)
    varying = (
        (m, key, value)
        for m, key, value in values
        if any((type(v) is JetTensor and v.block is not None) or type(v) is _Carried for v in flatten(value))
    )
    return frozenset(by_name(module, varying))


def forbid_reading(module: nn.Module, names: frozenset[str]) -> None:
    """Put in the place of every tensor in these attributes one that raises when it is read. Call it under ``quiet``."""
    if not names:
        return
    stand_ins: dict[Any, _Carried] = {}
    named = by_name(module, ((m, key, (m, key, value)) for m, key, value in _attributes(Places(module))))
    for name in names & named.keys():
        owner, key, value = named[name]
        owner.__dict__[key] = _replaced(value, name, stand_ins)


def _replaced(value: Any, name: str, stand_ins: dict[Any, _Carried]) -> Any:
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        kind = (name, value.shape, value.dtype)
        if kind not in stand_ins:
            stand_in: _Carried = torch.Tensor._make_wrapper_subclass(
                _Carried, value.shape, dtype=value.dtype, device=value.device
            )
            stand_in.location = name
            stand_ins[kind] = stand_in
        return stand_ins[kind]
    if isinstance(value, dict):
        for k, v in value.items():  # in place: it may be known by other names, and quiet puts its contents back
            value[k] = _replaced(v, name, stand_ins)
    elif isinstance(value, (list, deque)):
        for i, v in enumerate(value):
            value[i] = _replaced(v, name, stand_ins)
    elif isinstance(value, tuple):
        parts = [_replaced(v, name, stand_ins) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
