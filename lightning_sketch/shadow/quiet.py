"""Run the user's code again as if it had not been run: random state, module state, logs and metrics are put back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchmetrics
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

# What an empty nn.Module keeps for itself: tensors are replaced by functional_call, hooks and submodules stay
_STRUCTURE = frozenset(nn.Module().__dict__) - {"training"}
_CONTAINERS = (list, dict, set, deque)


@dataclass(frozen=True)
class RandomState:
    """The state of every generator that a training step draws from: torch on CPU and on its own device, numpy, Python."""

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


@dataclass(frozen=True)
class ModuleState:
    """Attributes of a module and all its submodules, with the contents of lists, dicts, sets and deques."""

    entries: list[tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]]

    @classmethod
    def capture(cls, module: nn.Module) -> ModuleState:
        """Remember every attribute but parameters, buffers, submodules and hooks."""
        entries = []
        for m in module.modules():
            attributes = {k: v for k, v in m.__dict__.items() if k not in _STRUCTURE}
            containers = [(v, v.copy()) for v in attributes.values() if isinstance(v, _CONTAINERS)]
            entries.append((m.__dict__, attributes, containers))
        return cls(entries)

    def restore(self) -> None:
        """Put every attribute and the contents of every container back."""
        for present, attributes, containers in self.entries:
            for name in [k for k in present if k not in _STRUCTURE and k not in attributes]:
                del present[name]
            present.update(attributes)
            for container, contents in containers:
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(contents)


def _metrics(module: nn.Module) -> Iterator[torchmetrics.Metric | torchmetrics.MetricCollection]:
    kinds = (torchmetrics.Metric, torchmetrics.MetricCollection)
    for m in module.modules():
        if isinstance(m, kinds):
            yield m
            continue
        for value in list(m.__dict__.values()):
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            yield from (v for v in held if isinstance(v, kinds))


def _silence(metric: torchmetrics.Metric | torchmetrics.MetricCollection) -> Callable[..., Any]:
    zero = torch.zeros(())
    value: Any = zero
    if isinstance(metric, torchmetrics.MetricCollection):
        value = dict.fromkeys(metric.keys(keep_base=False), zero)
    return lambda *args, **kwargs: value


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def quiet(module: Any, random_state: RandomState, module_state: ModuleState | None = None) -> Iterator[None]:
    """Within, the user's module may be run without a trace; it starts from ``random_state`` and ``module_state``.

    Args:
        module: the LightningModule (or any module).
        random_state: what the generators start from; afterwards they go on as before.
        module_state: what the module's attributes start from; the present ones if ``None``.
    """
    present_random = RandomState.capture(random_state.device)
    present_module = ModuleState.capture(module)
    foreign = [m for m in _metrics(module) if not any(m is s for s in module.modules())]
    present_foreign = [ModuleState.capture(m) for m in foreign]
    trainer = getattr(module, "_trainer", None)
    loggers = list(trainer.loggers) if trainer is not None else []
    try:
        if module_state is not None:
            module_state.restore()
        for metric in _metrics(module):
            stub = _silence(metric)
            metric.__dict__.update(forward=stub, update=stub, compute=stub, reset=_nothing)
        module.__dict__.update(log=_nothing, log_dict=_nothing, print=_nothing)
        if loggers:
            trainer.loggers = [DummyLogger()]
        random_state.restore()
        yield
    finally:
        if loggers:
            trainer.loggers = loggers
        for state in present_foreign:
            state.restore()
        present_module.restore()
        present_random.restore()
