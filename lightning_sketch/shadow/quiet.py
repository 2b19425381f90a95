"""Run the user's code again as if it had not been run: random state, module state, logs and metrics are put back."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.data import DataLoader, Dataset

from lightning_sketch.errors import ConfigurationError

T = TypeVar("T")

# What an empty nn.Module keeps for itself: hooks and submodules stay
STRUCTURE = frozenset(nn.Module().__dict__) - {"training"}
CONTAINERS = (list, dict, set, deque)
_WORLD = (nn.Module, Dataset, DataLoader, pl.LightningDataModule, pl.Callback)
IMMUTABLE = frozenset({int, float, bool, str, bytes, complex, type(None), torch.Size, torch.dtype, torch.device})
_EMPTY: dict[Any, Any] = {}


def modules_of(module: nn.Module) -> list[nn.Module]:
    """``list(module.modules())`` in a third of the time: it is asked for several times a step."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [module]
    while waiting:
        m = waiting.pop()
        if m is not None and m not in found:
            found[m] = None
            waiting.extend(reversed(m._modules.values()))
    return list(found)


def named_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``dict(module.named_parameters())`` and ``dict(module.named_buffers())`` in half the time."""
    params: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    visited: set[nn.Module] = set()
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module | None]] = [("", module)]
    while waiting:
        prefix, m = waiting.pop()
        if m is None or m in visited:
            continue
        visited.add(m)
        for key, p in m._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                params[prefix + key] = p
        for key, b in m._buffers.items():
            if b is not None and id(b) not in seen:
                seen.add(id(b))
                buffers[prefix + key] = b
        if m._modules:
            waiting.extend([(f"{prefix}{name}.", child) for name, child in m._modules.items()][::-1])
    return params, buffers


def by_name(module: nn.Module, attributes: Iterable[tuple[nn.Module, str, T]]) -> dict[str, T]:
    """Name attributes of submodules, ``(owner, attribute, value)``, such as ``net.center``.

    Paths take longer to make than all the rest, so only what was found in a walk is named.
    """
    attributes = list(attributes)
    paths = {m: f"{path}." if path else "" for path, m in module.named_modules()} if attributes else {}
    return {f"{paths.get(owner, '')}{key}": value for owner, key, value in attributes}


@dataclass(frozen=True)
class RandomState:
    """The state of the global generators: torch on CPU and on the module's own device, numpy, Python."""

    device: torch.device
    cpu: Tensor
    own: Tensor | None
    numpy: Any
    python: Any

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """Read the present state."""
        own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), own, np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Make this the present state."""
        torch.set_rng_state(self.cpu)
        if self.own is not None:
            torch.cuda.set_rng_state(self.own, self.device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


class ModuleState:
    """What a module and all its submodules hold besides the values of tensors.

    Attributes, the contents of containers (also nested ones, and those in objects of the user's own classes), numpy
    arrays, and generators that the module owns. Values of parameters and buffers are not part of it: a re-run is given
    its own. Neither are metrics, which are silent in a re-run.

    Args:
        module: any module; its present state is remembered.
    """

    def __init__(self, module: nn.Module) -> None:
        self.metrics: list[torchmetrics.Metric | torchmetrics.MetricCollection] = []  # submodules
        self.held_metrics: list[torchmetrics.Metric | torchmetrics.MetricCollection] = []  # in plain containers
        self.tensors: list[tuple[nn.Module, str, Tensor, int]] = []  # with owner, attribute and version
        self._module = module
        self._attributes: list[tuple[dict[str, Any], dict[str, Any], int]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._restore_contents: list[Callable[[], Any]] = []
        self._seen: set[int] = set()
        # Helper objects of the user's own, such as a running average, but not the world behind them
        self._packages = {_package(c) for c in type(module).__mro__} - {
            "lightning",
            "pytorch_lightning",
            "torch",
            "builtins",
        }
        for m in modules_of(module):
            present = m.__dict__
            attributes = {k: v for k, v in present.items() if k not in STRUCTURE}
            self._attributes.append((present, attributes, len(present)))
            self._remember_dict(m._parameters)
            self._remember_dict(m._buffers)
            if _is_metric(m):
                self.metrics.append(m)  # type: ignore[arg-type]
                continue
            for key, value in attributes.items():
                if type(value) not in IMMUTABLE:
                    self._remember(value, m, key)

    def _remember(self, value: Any, owner: nn.Module, key: str) -> None:
        """Remember whatever may be changed in place."""
        if isinstance(value, Tensor):
            if not value.is_inference():
                self.tensors.append((owner, key, value, value._version))
            return
        if _is_metric(value):
            self.held_metrics.append(value)
            return
        if id(value) in self._seen:
            return
        if not isinstance(value, tuple):
            self._seen.add(id(value))
        if isinstance(value, (*CONTAINERS, tuple)):
            if isinstance(value, dict):
                self._remember_dict(value)
            elif not isinstance(value, tuple):
                self._restore_contents.append(_refill(value, list(value)))
            for held in value.values() if isinstance(value, dict) else value:
                if type(held) not in IMMUTABLE:
                    self._remember(held, owner, key)
        elif isinstance(value, np.ndarray):
            self._restore_contents.append(_overwrite(value, value.copy()))
        elif isinstance(value, np.random.Generator):
            self._restore_contents.append(_set_bit_generator(value, value.bit_generator.state))
        elif isinstance(value, (torch.Generator, np.random.RandomState)):
            self._restore_contents.append(functools.partial(value.set_state, value.get_state()))  # type: ignore[arg-type]
        elif isinstance(value, random.Random):
            self._restore_contents.append(functools.partial(value.setstate, value.getstate()))
        elif _package(type(value)) in self._packages and hasattr(value, "__dict__") and not isinstance(value, _WORLD):
            self._remember(value.__dict__, owner, key)

    def _remember_dict(self, value: dict[Any, Any]) -> None:
        # Most are empty, and what is made for every module of every step is paid for in garbage collection
        self._dicts.append((value, dict(value) if value else _EMPTY))

    def restore(self) -> None:
        """Put every attribute and the contents of every container back."""
        for present, attributes, size in self._attributes:
            present.update(attributes)
            if len(present) != size:
                for name in present.keys() - attributes.keys() - STRUCTURE:
                    del present[name]
        for present, contents in self._dicts:
            if present or contents:
                present.clear()
                present.update(contents)
        for restore in self._restore_contents:
            restore()

    def refuse_changed_tensors(self) -> None:
        """Refuse tensors outside parameters and buffers that have been changed in place since.

        Raises:
            ConfigurationError: naming one.
        """
        changed = [(m, key, tensor) for m, key, tensor, version in self.tensors if tensor._version != version]
        for name in by_name(self._module, changed):
            raise ConfigurationError(
                f"`{name}`: `training_step` changes this tensor in place, but it is neither a parameter nor a "
                "buffer, so the step cannot be run again from where it started: register it with "
                "`register_buffer`."
            )


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _refill(container: Any, contents: Any) -> Callable[[], None]:
    def restore() -> None:
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(contents)

    return restore


def _overwrite(array: np.ndarray, contents: np.ndarray) -> Callable[[], None]:
    def restore() -> None:
        if array.flags.writeable:
            array[...] = contents

    return restore


def _set_bit_generator(generator: np.random.Generator, state: Any) -> Callable[[], None]:
    def restore() -> None:
        generator.bit_generator.state = state

    return restore


_KINDS: dict[type, bool] = {}  # isinstance is slow for abstract classes, and asked of every attribute of every module


def _is_metric(value: object) -> bool:
    kind = type(value)
    if kind not in _KINDS:
        _KINDS[kind] = issubclass(kind, (torchmetrics.Metric, torchmetrics.MetricCollection))
    return _KINDS[kind]


def _silence(metric: torchmetrics.Metric | torchmetrics.MetricCollection) -> Callable[..., Any]:
    zero = torch.zeros(())
    value: Any = zero
    if isinstance(metric, torchmetrics.MetricCollection):
        value = dict.fromkeys(metric.keys(keep_base=False), zero)
    return lambda *args, **kwargs: value


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _refuse_reentrant(*args: Any) -> None:
    raise ConfigurationError(
        "`training_step` calls `torch.utils.checkpoint.checkpoint` with `use_reentrant=True`, whose backward pass "
        "hides the graph from a re-run: pass `use_reentrant=False`."
    )


Start = Callable[[RandomState, "ModuleState | None"], None]


@contextmanager
def quiet(module: Any, device: torch.device) -> Iterator[Start]:
    """Within, the user's module may be run without a trace, as often as wanted.

    Yields:
        What is called before every run: the generators start from the state given, and the module's attributes from
        theirs; ``None`` leaves them as they are. Afterwards all go on from where they are now.

    Args:
        module: the LightningModule (or any module).
        device: of the module.
    """
    present_random = RandomState.capture(device)
    present_module = ModuleState(module)
    metrics = [*present_module.metrics, *present_module.held_metrics]
    present_held = [ModuleState(m) for m in present_module.held_metrics]
    trainer: Any = getattr(module, "_trainer", None)
    loggers = list(trainer.loggers) if trainer is not None else []
    present_checkpoint = CheckpointFunction.apply

    def start(random_state: RandomState, module_state: ModuleState | None) -> None:
        if module_state is not None:
            module_state.restore()
            silence()
        random_state.restore()

    def silence() -> None:
        for metric in metrics:
            stub = _silence(metric)
            metric.__dict__.update(forward=stub, update=stub, compute=stub, reset=_nothing)
        module.__dict__.update(log=_nothing, log_dict=_nothing, print=_nothing)

    try:
        silence()
        if loggers:
            trainer.loggers = [DummyLogger()]
        CheckpointFunction.apply = _refuse_reentrant  # type: ignore[method-assign]
        yield start
    finally:
        CheckpointFunction.apply = present_checkpoint  # type: ignore[method-assign]
        if loggers:
            trainer.loggers = loggers
        for state in present_held:
            state.restore()
        present_module.restore()
        present_random.restore()
