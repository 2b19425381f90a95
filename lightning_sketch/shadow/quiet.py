"""Run the user's code again as if it had not been run: random state, module state, logs and metrics are put back."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from lightning_sketch.shadow.places import IMMUTABLE, Places, by_name, is_metric
from lightning_sketch.shadow.random_state import RandomState

CONTAINERS = (list, dict, set, deque)
_WORLD = (nn.Module, Dataset, DataLoader, pl.LightningDataModule, pl.Callback)


class ModuleState:
    """What a module and all its submodules hold besides the values of tensors.

    Attributes, the contents of containers (also nested ones, and those in objects of the user's own classes), numpy
    arrays, and generators that the module owns. Values of parameters and buffers are not part of it: a re-run is given
    its own. Neither are metrics, which are silent in a re-run.

    Args:
        places: of any module, as they are now; its present state is remembered.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self.held_metrics: list[torchmetrics.Metric | torchmetrics.MetricCollection] = []  # in plain containers
        self.tensors: list[tuple[nn.Module, str, Tensor, int]] = []  # with owner, attribute and version
        self._values = places.values
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._restore_contents: list[Callable[[], Any]] = []
        self._seen: set[int] = set()
        kind: Any = type(places.module)
        self._packages = _own_packages(kind)
        for m, key, value in places.mutable():
            if not is_metric(m):
                self._remember(value, m, key)

    def _remember(self, value: Any, owner: nn.Module, key: str) -> None:
        """Remember whatever may be changed in place."""
        if isinstance(value, Tensor):
            if not value.is_inference():
                self.tensors.append((owner, key, value, value._version))
            return
        if is_metric(value):
            self.held_metrics.append(value)
            return
        if id(value) in self._seen:
            return
        if not isinstance(value, tuple):
            self._seen.add(id(value))
        if isinstance(value, (*CONTAINERS, tuple)):
            if isinstance(value, dict):
                self._dicts.append((value, dict(value)))
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

    def restore(self, present: ModuleState | None = None) -> None:
        """Put every attribute and the contents of every container back.

        Args:
            present: how the module is now, of the same places, if that is known.
        """
        if present is None:
            self.places.set_values(self._values)
        else:
            self.places.change_values(self._values, present._values)
        for held, contents in self._dicts:
            if held or contents:
                held.clear()
                held.update(contents)
        for restore in self._restore_contents:
            restore()

    def refuse_changed_tensors(self) -> None:
        """Refuse tensors outside parameters and buffers that have been changed in place since.

        Raises:
            ConfigurationError: naming one.
        """
        changed = [(m, key, tensor) for m, key, tensor, version in self.tensors if tensor._version != version]
        for name in by_name(self.places.module, changed):
            raise ConfigurationError(
                f"`{name}`: `training_step` changes this tensor in place, but it is neither a parameter nor a "
                "buffer, so the step cannot be run again from where it started: register it with "
                "`register_buffer`."
            )


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


@functools.lru_cache(maxsize=32)
def _own_packages(kind: type) -> frozenset[str]:
    """Where the user's helper objects are from, such as a running average, but not the world behind them."""
    packages = frozenset(map(_package, kind.__mro__))
    return packages - {"lightning", "pytorch_lightning", "torch", "builtins"}


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


Start = Callable[[RandomState, "ModuleState | None"], Places]


@contextmanager
def quiet(places: Places, device: torch.device) -> Iterator[Start]:
    """Within, the user's module may be run without a trace, as often as wanted.

    Yields:
        What is called before every run: the generators start from the state given, and the module's attributes from
        theirs; ``None`` leaves them as they are. It returns the places of the module. Afterwards all go on from where
        they are now.

    Args:
        places: of the LightningModule (or any module).
        device: of the module.
    """
    present_random = RandomState.capture(device)
    places = places.now()
    module: Any = places.module
    present_module = ModuleState(places)
    metrics = [*places.metrics, *present_module.held_metrics]
    present_held = [ModuleState(Places(m)) for m in present_module.held_metrics]
    trainer: Any = getattr(module, "_trainer", None)
    loggers = list(trainer.loggers) if trainer is not None else []
    present_checkpoint = CheckpointFunction.apply

    nothing_ran = True
    put_back = True  # tensors and submodules too; whoever takes up recorded states does that by `call_with_tensors`

    def start(random_state: RandomState, module_state: ModuleState | None) -> Places:
        nonlocal nothing_ran, put_back
        unchanged, nothing_ran = nothing_ran, False
        random_state.restore()
        if module_state is None:
            return places
        if unchanged and module_state.places is places:
            put_back = False
            module_state.restore(present_module)
            return module_state.places
        module_state.restore()
        put_back = put_back or module_state.places is not places
        if put_back:
            module_state.places.put_back()
        now = module_state.places.now()  # before anything of ours is among them
        silence()
        return now

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
            state.places.put_back()
        present_module.restore()
        if put_back:
            places.put_back()
        present_random.restore()
