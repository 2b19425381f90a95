"""Run the user's code again as if it had not been run: random state, module state, logs and metrics are put back."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.data import DataLoader, Dataset

from lightning_sketch.errors import ConfigurationError

# What an empty nn.Module keeps for itself: hooks and submodules stay
STRUCTURE = frozenset(nn.Module().__dict__) - {"training"}
CONTAINERS = (list, dict, set, deque)
_WORLD = (nn.Module, Dataset, DataLoader, pl.LightningDataModule, pl.Callback)
_IMMUTABLE = frozenset({int, float, bool, str, bytes, complex, type(None), torch.Size, torch.dtype, torch.device})


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
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._restore_contents: list[Callable[[], Any]] = []
        self._tensors: list[tuple[str, Tensor, int]] = []
        self._seen: set[int] = set()
        # Helper objects of the user's own, such as a running average, but not the world behind them
        self._packages = {_package(c) for c in type(module).__mro__} - {
            "lightning",
            "pytorch_lightning",
            "torch",
            "builtins",
        }
        for path, m in module.named_modules():
            attributes = {k: v for k, v in m.__dict__.items() if k not in STRUCTURE}
            self._attributes.append((m.__dict__, attributes))
            self._remember_dict(m._parameters)
            self._remember_dict(m._buffers)
            if not _is_metric(m):
                for name, value in attributes.items():
                    if type(value) not in _IMMUTABLE:
                        self._remember(value, f"{path}.{name}" if path else name)

    def _remember(self, value: Any, name: str) -> None:
        """Remember whatever may be changed in place."""
        if isinstance(value, Tensor):
            if not value.is_inference():
                self._tensors.append((name, value, value._version))
            return
        if _is_metric(value) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, (*CONTAINERS, tuple)):
            if isinstance(value, dict):
                self._remember_dict(value)
            elif not isinstance(value, tuple):
                self._restore_contents.append(_refill(value, list(value)))
            for held in value.values() if isinstance(value, dict) else value:
                if type(held) not in _IMMUTABLE:
                    self._remember(held, name)
        elif isinstance(value, np.ndarray):
            self._restore_contents.append(_overwrite(value, value.copy()))
        elif isinstance(value, np.random.Generator):
            self._restore_contents.append(_set_bit_generator(value, value.bit_generator.state))
        elif isinstance(value, (torch.Generator, np.random.RandomState)):
            self._restore_contents.append(functools.partial(value.set_state, value.get_state()))  # type: ignore[arg-type]
        elif isinstance(value, random.Random):
            self._restore_contents.append(functools.partial(value.setstate, value.getstate()))
        elif _package(type(value)) in self._packages and hasattr(value, "__dict__") and not isinstance(value, _WORLD):
            self._remember(value.__dict__, name)

    def _remember_dict(self, value: dict[Any, Any]) -> None:
        self._restore_contents.append(_refill(value, dict(value)))

    def restore(self) -> None:
        """Put every attribute and the contents of every container back."""
        for present, attributes in self._attributes:
            for name in [k for k in present if k not in attributes and k not in STRUCTURE]:
                del present[name]
            present.update(attributes)
        for restore in self._restore_contents:
            restore()

    def refuse_changed_tensors(self) -> None:
        """Refuse tensors outside parameters and buffers that have been changed in place since.

        Raises:
            ConfigurationError: naming one.
        """
        for name, tensor, version in self._tensors:
            if tensor._version != version:
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
        (container.extend if isinstance(container, (list, deque)) else container.update)(contents)

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


def _metrics(module: nn.Module) -> Iterator[torchmetrics.Metric | torchmetrics.MetricCollection]:
    """Every metric of a module, also those that it holds in plain containers."""
    for m in module.modules():
        if _is_metric(m):
            yield m  # type: ignore[misc]
            continue
        for name, value in list(m.__dict__.items()):
            if name in STRUCTURE:
                continue
            held = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            )
            yield from (v for v in held if _is_metric(v))


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


@contextmanager
def quiet(module: Any, random_state: RandomState, module_state: ModuleState | None = None) -> Iterator[None]:
    """Within, the user's module may be run without a trace; it starts from ``random_state`` and ``module_state``.

    Args:
        module: the LightningModule (or any module).
        random_state: what the generators start from; afterwards they go on as before.
        module_state: what the module's attributes start from; the present ones if ``None``.
    """
    present_random = RandomState.capture(random_state.device)
    present_module = ModuleState(module)
    own = {id(m) for m in module.modules()}
    metrics = list(_metrics(module))
    present_foreign = [ModuleState(m) for m in metrics if id(m) not in own]
    trainer: Any = getattr(module, "_trainer", None)
    loggers = list(trainer.loggers) if trainer is not None else []
    present_checkpoint = CheckpointFunction.apply
    try:
        if module_state is not None:
            module_state.restore()
        for metric in metrics:
            stub = _silence(metric)
            metric.__dict__.update(forward=stub, update=stub, compute=stub, reset=_nothing)
        module.__dict__.update(log=_nothing, log_dict=_nothing, print=_nothing)
        if loggers:
            trainer.loggers = [DummyLogger()]
        random_state.restore()
        CheckpointFunction.apply = _refuse_reentrant  # type: ignore[method-assign]
        yield
    finally:
        CheckpointFunction.apply = present_checkpoint  # type: ignore[method-assign]
        if loggers:
            trainer.loggers = loggers
        for state in present_foreign:
            state.restore()
        present_module.restore()
        present_random.restore()
