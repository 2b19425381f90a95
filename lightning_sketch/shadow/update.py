"""Jets of the optimizer's update: the user's own optimizer class, stepped on JetTensor parameters."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress, islice, repeat
from operator import attrgetter, is_, is_not
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.jets.rules.constants import refuse_numbers
from lightning_sketch.jets.tensor import JetTensor, Lead, constant, wrap
from lightning_sketch.shadow.carried import flatten
from lightning_sketch.shadow.checks import Readings
from lightning_sketch.shadow.flat import Copies
from lightning_sketch.shadow.places import IMMUTABLE, Places
from lightning_sketch.shadow.quiet import ModuleState
from lightning_sketch.shadow.random_state import RandomState
from lightning_sketch.shadow.record import TrackedTensors

# (name of the parameter, key of the optimizer's state) -> coefficients, None where they are zero
StateBlocks = dict[tuple[str, str], Tensor | None]
# (name of the parameter, key of the optimizer's state) -> a number of the state, on the CPU
Counts = dict[tuple[str, str], Tensor]

_GRAD, _REQUIRES_GRAD = attrgetter("grad"), attrgetter("requires_grad")
_READS_NUMBERS = (
    "The optimizer or `configure_gradient_clipping` reads a Python number (`.item()`, `float()`) off a tensor that "
    "depends on the weights of the examples, which loses its derivatives: keep it a tensor, or use another optimizer."
)
_TRANSIENT = 8  # blocks of one parameter that kernels of an optimizer hold at a time; 6.5 were measured


@dataclass(frozen=True)
class OptimizerSnapshot:
    """An optimizer before its step: what its update is a function of.

    Attributes:
        optimizer: the user's.
        groups: parameter groups; hyper-parameters copied, parameters by name, those left out that are not trained.
        held: the user's parameters, in the order of the groups, likewise.
        copies: copies of their values, by name, in the same order.
        trainable: names of the parameters that require grad.
        state: state by name of the parameter, copied; of those that have any.
        gradients: copies of the user's gradients, by name, of parameters that have one.
        random_state: generators before clipping and update.
        module_state: the module's attributes before clipping and update; ``None`` if none of its code runs there.
    """

    optimizer: Optimizer
    groups: list[dict[str, Any]]
    held: list[Tensor]
    copies: Copies
    trainable: frozenset[str]
    state: dict[str, dict[str, Any]]
    gradients: Copies
    random_state: RandomState
    module_state: ModuleState | None

    @classmethod
    def capture(
        cls,
        optimizer: Optimizer,
        held: Held,
        names: Mapping[int, str],
        values: TrackedTensors,
        gradients: TrackedTensors,
        places: Places,
        counts: Counts,
        others: Iterable[str],
    ) -> OptimizerSnapshot:
        """Copy what the coming step will change.

        Args:
            optimizer: the user's.
            held: what it holds now.
            names: of the module's parameters, by ``id``.
            values: copies of their values.
            gradients: where their gradients are copied to, over those of the step before.
            places: of the user's LightningModule.
            counts: numbers of the state that are known on the CPU already.
            others: names of parameters that the training step had as those that the optimizer does not change.

        Raises:
            ConfigurationError: if the optimizer holds a parameter that is not the module's.
        """
        members = held.members(names, others)
        rest = iter(members.names)
        groups = [
            {k: list(islice(rest, size)) if k == "params" else _copy(v) for k, v in group.items()}
            for group, size in zip(optimizer.param_groups, members.sizes, strict=True)
        ]
        state: dict[str, dict[str, Any]] = {}
        if optimizer.state:
            for name, p in zip(members.names, members.params, strict=True):
                state[name] = {k: _copy(counts.get((name, k), v)) for k, v in optimizer.state.get(p, {}).items()}
        of_run = dict(zip(members.names, map(_GRAD, members.params), strict=True))
        if not all(map(is_not, of_run.values(), repeat(None))):
            of_run = {name: g for name, g in of_run.items() if g is not None}
        gradients.note(of_run)
        module: Any = places.module
        random_state = RandomState.capture(module.device)
        module_state = ModuleState(places.now()) if is_overridden("configure_gradient_clipping", module) else None
        copies, of_gradients = values.copies_of(members.names), gradients.copies_of(of_run)
        return cls(
            optimizer,
            groups,
            members.params,
            copies,
            members.trainable,
            state,
            of_gradients,
            random_state,
            module_state,
        )


@dataclass(frozen=True)
class MadeStep:
    """What the user's step of the optimizer left, side by side, to be captured before work on jets fills the caches.

    Attributes:
        gradients: copies of the gradients before clipping, of the parameters that have one after the step, too.
        clipped: these after the step, joined as ``gradients`` are.
        params: all parameters after it, joined as the copies of the snapshot are.
        like_before: whether they have the shapes, dtypes and memory order that they had.
    """

    gradients: Copies
    clipped: list[Tensor]
    params: list[Tensor]
    like_before: bool

    @classmethod
    def capture(cls, snapshot: OptimizerSnapshot) -> MadeStep:
        """Take note of what has just been left; tensors that are not worth a copy are not copied."""
        of_held = dict(zip(snapshot.copies.values, map(_GRAD, snapshot.held), strict=True))
        gradients = snapshot.gradients
        clipped = [*map(of_held.__getitem__, gradients.values)]
        if not all(map(is_not, clipped, repeat(None))):
            gradients = Copies({name: g for name, g in gradients.values.items() if of_held[name] is not None})
            clipped = [of_held[name] for name in gradients.values]
        copies, held = snapshot.copies, snapshot.held
        return cls(gradients, gradients.join(clipped), copies.join(held), copies.like(held))


class Held:
    """What an optimizer holds, looked into only where something has changed.

    A step may change what it holds and what is trained: what requires grad or has a gradient.

    Args:
        optimizer: as it is now.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        groups = [group["params"] for group in optimizer.param_groups]
        self._params, self._sizes = [*chain.from_iterable(groups)], [*map(len, groups)]
        self._flags = _flags(self._params)
        self._divided: tuple[Any, tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] | None = None
        self._members: tuple[Any, Members] | None = None

    def now(self, optimizer: Optimizer) -> Held:
        """Return this, or another if the optimizer, ``optimizer``, holds something else, or what is trained is not."""
        return self if self._holds(optimizer) and _flags(self._params) == self._flags else Held(optimizer)

    def at_step(self, optimizer: Optimizer) -> Held:
        """Return :meth:`now`, or this where all that is held has been trained, even if it is not from here on."""
        trained = all(map(is_, self._flags, repeat(True)))
        return self if trained and self._holds(optimizer) else self.now(optimizer)

    def _holds(self, optimizer: Optimizer) -> bool:
        groups = [group["params"] for group in optimizer.param_groups]
        return [*map(len, groups)] == self._sizes and all(map(is_, chain.from_iterable(groups), self._params))

    def divide(self, places: Places) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensors of a module by name: what a step may change, in the order of the optimizer ...

        ... other parameters that do not require grad, and the rest.
        """
        key = places, [*map(_REQUIRES_GRAD, places.params.values())]
        if self._divided is None or self._divided[0] != key:
            names = {id(t): name for name, t in places.tensors.items()}
            found = [names.pop(id(p), None) for p, trained in zip(self._params, self._flags, strict=True) if trained]
            others = {name: places.tensors[name] for name in names.values()}
            frozen = {name: t for name, t in others.items() if name in places.params and not t.requires_grad}
            rest = {name: t for name, t in others.items() if name not in frozen}
            self._divided = key, ({name: places.tensors[name] for name in found if name is not None}, frozen, rest)
        return self._divided[1]

    def members(self, names: Mapping[int, str], others: Iterable[str]) -> Members:
        """Return what a step may change, and what a training step had as such.

        Args:
            names: of the module's parameters, by ``id``.
            others: names of parameters that the training step had as those that the optimizer does not change.

        Raises:
            ConfigurationError: if it is a parameter that is not the module's.
        """
        key = [*others]
        if self._members is None or self._members[0] != key:
            left_out = set(key)
            chosen = [
                bool(trained) or names.get(id(p)) not in left_out
                for p, trained in zip(self._params, self._flags, strict=True)
            ]
            params = [*compress(self._params, chosen)]
            found = [names.get(id(p)) for p in params]
            if None in found:
                p = params[found.index(None)]
                raise ConfigurationError(
                    f"`configure_optimizers`: the optimizer holds a parameter of shape {tuple(p.shape)} that was "
                    "not registered in the module when training started: register it in `__init__`."
                )
            of_params = iter(chosen)
            sizes = [sum(islice(of_params, size)) for size in self._sizes]
            trainable = frozenset(name for name, p in zip(found, params, strict=True) if name and p.requires_grad)
            self._members = key, Members(params, [name for name in found if name is not None], sizes, trainable)
        return self._members[1]


@dataclass(frozen=True)
class Members:
    """Parameters of an optimizer.

    Attributes:
        params: in its order.
        names: likewise.
        sizes: how many are of each of its groups.
        trainable: names of those that require grad.
    """

    params: list[Tensor]
    names: list[str]
    sizes: list[int]
    trainable: frozenset[str]


def _flags(params: Sequence[Tensor]) -> list[bool | str]:
    """Whether each requires grad, or else has a gradient."""
    flags: list[bool | str] = [*map(_REQUIRES_GRAD, params)]
    if all(flags):
        return flags
    return [flag or ("" if p.grad is None else "has grad") for p, flag in zip(params, flags, strict=True)]


def ask_counts(optimizer: Optimizer, names: Mapping[int, str], readings: Readings) -> Counts:
    """Ask for the numbers that an optimizer keeps on the device, such as the step counts of fused kernels.

    The kernels that our steps use read them one by one.

    Returns:
        Where they are found once ``readings`` are read.
    """
    counts: Counts = {}
    asked = {
        (names[id(p)], key): value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if id(p) in names and _is_count_on_device(value) and value.shape != p.shape
    }

    def keep(values: np.ndarray) -> None:
        for (place, value), number in zip(asked.items(), values, strict=True):
            counts[place] = torch.tensor(number, dtype=value.dtype)

    if asked:
        readings.ask(keep, torch.stack([value.double() for value in asked.values()]))
    return counts


def _is_count_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and not value.is_cpu


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value if type(value) in IMMUTABLE else copy.deepcopy(value)


class _NormOfNorms(TorchFunctionMode):
    """Within, the norm of a stack of norms is the root of one sum of squares.

    A gradient that is zero but for rounding (a bias before a batch norm) has a norm whose series is noise over noise;
    its square, which the total is made of, is as small as it should be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.squares: dict[int, tuple[Tensor, Tensor]] = {}  # id of a norm -> (the norm, kept alive; its square)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func is torch.linalg.vector_norm
            and (args[1:] or (kwargs.get("ord", 2),)) == (2,)
            and set(kwargs) <= {"ord"}
        ):
            known = self.squares.get(id(args[0]))
            square = args[0].square().sum() if known is None else known[1].sum()
            return self._remember(square.sqrt(), square)
        if func is torch.stack and len(args) == 1 and all(id(x) in self.squares for x in args[0]):
            return self._remember(func(*args, **kwargs), torch.stack([self.squares[id(x)][1] for x in args[0]]))
        return func(*args, **kwargs)

    def _remember(self, norm: Tensor, square: Tensor) -> Tensor:
        self.squares[id(norm)] = (norm, square)
        return norm


def reserve(snapshot: OptimizerSnapshot, params: Mapping[str, JetTensor], blocks: StateBlocks, lead: Lead) -> None:
    """Take the memory that :func:`step` needs and give it back: what is missing is missed before anything has changed.

    Args:
        snapshot: as in :func:`step`, which is given the same.
        params: parameters by name.
        blocks: coefficients of the optimizer's state.
        lead: ``(R, P, K)``.

    Raises:
        torch.OutOfMemoryError: on a GPU, if there is not so much.
    """
    device = snapshot.held[0].device
    if device.type == "cuda":
        torch.empty(needed_bytes(snapshot, params, blocks, lead), dtype=torch.uint8, device=device)


def needed_bytes(snapshot: OptimizerSnapshot, params: Mapping[str, JetTensor], blocks: StateBlocks, lead: Lead) -> int:
    """Return about how much memory :func:`step` takes: coefficients that did not exist yet, and what kernels hold.

    The arguments are those of :func:`reserve`.
    """
    largest = created = 0
    per_param: int | None = None
    for name, gradient in snapshot.gradients.values.items():
        missing = int(params[name].block is None)
        state = snapshot.state.get(name)
        if state:
            missing += sum(
                isinstance(v, Tensor) and v.shape == gradient.shape and blocks.get((name, k)) is None
                for k, v in state.items()
            )
        else:
            per_param = count_state_tensors(snapshot.optimizer) if per_param is None else per_param
            missing += per_param
        size = gradient.numel() * gradient.element_size()
        largest, created = max(largest, size), created + missing * size
    return math.prod(lead) * (created + _TRANSIENT * largest)


def step(
    snapshot: OptimizerSnapshot,
    params: dict[str, JetTensor],
    gradients: dict[str, JetTensor | None],
    blocks: StateBlocks,
    lead: Lead,
    clip: Callable[[Optimizer], None],
) -> StateBlocks:
    """Update ``params`` in place by one step of the user's optimizer class.

    Args:
        snapshot: the user's optimizer before its own step.
        params: parameters by name; primal and coefficients are updated in place, as is their ``grad`` by clipping.
        gradients: their gradients; parameters without one are left alone by the optimizer, as in the user's run.
        blocks: coefficients of the optimizer's state.
        lead: ``(R, P, K)``.
        clip: the user's gradient clipping, given the optimizer that holds the JetTensor parameters.

    Returns:
        The coefficients of the state after the step.

    Raises:
        ConfigurationError: if the optimizer keeps tensors where their coefficients cannot be followed.
        UnsupportedOperatorError: if it turns a varying tensor into a Python number.
    """
    twin = _twin(snapshot.optimizer)
    twin.param_groups = [{**group, "params": [params[name] for name in group["params"]]} for group in snapshot.groups]
    for group in twin.param_groups:
        for kernel in ("foreach", "fused", "capturable"):  # they hide the structure of the update
            if kernel in group:
                group[kernel] = False
    for name, jet in params.items():
        jet.grad = gradients[name]
        state = snapshot.state.get(name)
        if state:
            twin.state[jet] = {k: _state_jet(name, k, v, jet, blocks, lead) for k, v in state.items()}
    with torch.no_grad(), refuse_numbers(_READS_NUMBERS):
        with _NormOfNorms():
            clip(twin)
        _plain_step(twin)
    _refuse_hidden_state(twin)
    # a parameter that has left the optimizer may come back to its state
    after: StateBlocks = {place: block for place, block in blocks.items() if place[0] not in params}
    for name, jet in params.items():
        for key, value in twin.state.get(jet, {}).items():
            if type(value) is JetTensor:
                after[name, key] = value.block
    return after


def _twin(optimizer: Optimizer) -> Optimizer:
    """An optimizer of the same class and attributes without parameters, state or hooks."""
    twin: Optimizer = object.__new__(type(optimizer))
    for key, value in optimizer.__dict__.items():
        if key in ("step", "state", "param_groups"):  # a scheduler wraps `step` on the instance
            continue
        twin.__dict__[key] = OrderedDict() if "_hooks" in key else _copy(value)
    twin.state = defaultdict(dict)
    return twin


def _plain_step(twin: Optimizer) -> None:
    # One wrapper off: the outer one runs hooks that are registered for every optimizer of the process.
    method: Any = type(twin).step
    getattr(method, "__wrapped__", method)(twin)


def _refuse_hidden_state(twin: Optimizer) -> None:
    hidden = {k: v for k, v in twin.__dict__.items() if k not in ("state", "param_groups")}
    hidden |= {f"param_groups[..][{k!r}]": v for group in twin.param_groups for k, v in group.items() if k != "params"}
    hidden |= {f"state[..][{k!r}]": v for s in twin.state.values() for k, v in s.items() if not isinstance(v, Tensor)}
    for key, value in hidden.items():
        if any(type(v) is JetTensor for v in flatten(value)):
            raise ConfigurationError(
                f"`configure_optimizers`: {type(twin).__name__} keeps a tensor that depends on gradients in `{key}`, "
                "where its coefficients cannot be followed: keep it as a tensor in `optimizer.state[parameter]`."
            )


def _state_jet(name: str, key: str, value: Any, param: JetTensor, blocks: StateBlocks, lead: Lead) -> Any:
    """A tensor of the state as a JetTensor, if it depends on gradients: it did before, or has the parameter's shape."""
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        return _copy(value)
    value = value.clone()
    if (name, key) in blocks:
        return wrap(value, [blocks[name, key]], lead)
    return constant(value, lead) if value.ndim and value.shape == param.shape else value


def count_state_tensors(optimizer: Optimizer) -> int:
    """How many tensors of a parameter's shape the optimizer keeps for each parameter, tried on a copy of one parameter.

    Zero where it cannot be tried, as for an optimizer that insists on a closure.
    """
    param = next(p for group in optimizer.param_groups for p in group["params"]).detach().clone().requires_grad_()
    twin = _twin(optimizer)
    twin.param_groups = [{**optimizer.param_groups[0], "params": [param], "fused": False, "foreach": False}]
    param.grad = torch.ones_like(param)
    present = RandomState.capture(param.device)
    try:
        with torch.no_grad():
            _plain_step(twin)
    except Exception:
        return 0
    finally:
        present.restore()
    return sum(isinstance(v, Tensor) and v.shape == param.shape for v in twin.state[param].values())
