"""What every method of unlearning shares: its arguments, its report, and what it leaves as it was."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lightning_sketch.errors import ConfigurationError, InstabilityError
from lightning_sketch.shadow.example_ids import batch_size
from lightning_sketch.shadow.places import Places
from lightning_sketch.shadow.quiet import quiet
from lightning_sketch.shadow.weighting import PerExampleLoss
from lightning_sketch.unlearning.losses import per_example_loss

T = TypeVar("T")


class LossPair(NamedTuple):
    """Mean loss of a set of examples before and after unlearning, in the units of the loss."""

    before: float
    after: float


@dataclass(frozen=True, eq=False, repr=False)
class UnlearningReport:
    """What a method did.

    Args:
        method: its name.
        module: the unlearned module, the given one if ``inplace``.
        num_forget: examples to forget.
        num_retain: examples to retain; None if none were given.
        num_held_out: examples held out; None if none were given.
        forget_loss: mean loss of the examples to forget, in evaluation mode.
        retain_loss: of those to retain.
        held_out_loss: of those held out.
        change_norm: Euclidean norm of the change of all parameters.
        relative_change: the same divided by the norm of the parameters before.
        steps: changes of the parameters.
        stopped: why the method ended.
        history: mean loss of the examples to forget after every epoch; empty for methods without epochs.
        seconds: wall-clock time of the change, without that of the losses before and after.
        seed: of all random draws.
        details: tensors of the method's own, see there.
    """

    method: str
    module: Any
    num_forget: int
    num_retain: int | None
    num_held_out: int | None
    forget_loss: LossPair
    retain_loss: LossPair | None
    held_out_loss: LossPair | None
    change_norm: float
    relative_change: float
    steps: int
    stopped: str
    history: tuple[float, ...]
    seconds: float
    seed: int
    details: Mapping[str, Tensor]

    def __repr__(self) -> str:
        losses = {"forget": self.forget_loss, "retain": self.retain_loss, "held-out": self.held_out_loss}
        shown = "; ".join(f"{name} loss {v.before:.4g} -> {v.after:.4g}" for name, v in losses.items() if v is not None)
        return (
            f"UnlearningReport({self.method}: {shown}; relative change of parameters {self.relative_change:.2g}; "
            f"steps={self.steps}, stopped by {self.stopped})"
        )


@dataclass(frozen=True)
class Outcome:
    """What a method says of its own work; the fields are those of :class:`UnlearningReport`."""

    steps: int
    stopped: str
    history: tuple[float, ...] = ()
    details: Mapping[str, Tensor] = field(default_factory=dict)


class Batches:
    """The batches of a DataLoader, or one batch, as the module takes them; may be iterated again.

    Tensors are moved to the device of the module, and those of floating point are converted to float64 where all of its
    parameters are, as a Trainer of ``precision="64-true"`` does.

    Args:
        data: a batch or a DataLoader.
        module: that takes them.
        argument: name of the argument, for errors.

    Raises:
        ConfigurationError: when iterated, if there is no example.
    """

    def __init__(self, data: Any, module: nn.Module, argument: str) -> None:
        if isinstance(data, (Dataset, Iterator)):
            raise ConfigurationError(f"`{argument}` is a {type(data).__name__}: give a batch or a DataLoader.")
        self._data = data
        self._argument = argument
        like = next(module.parameters())
        self._device = like.device
        self._double = {p.dtype for p in module.parameters() if p.is_floating_point()} == {torch.float64}

    def __iter__(self) -> Iterator[Any]:
        empty = True
        for batch in self._data if isinstance(self._data, DataLoader) else [self._data]:
            if batch_size(batch) != 0:
                empty = False
                yield apply_to_collection(batch, Tensor, self._move)
        if empty:
            raise ConfigurationError(f"`{self._argument}` is empty: give at least one example.")

    def _move(self, t: Tensor) -> Tensor:
        return t.to(self._device, torch.float64) if self._double and t.is_floating_point() else t.to(self._device)


class Run:
    """One unlearning in progress: the module, in evaluation mode, and its data.

    Attributes:
        module: the one to change.
        parameters: those of the module that require a gradient, by name.
        initial: all parameters and buffers before the change, by name.
        forget: batches to forget.
        retain: batches to retain, or None.
        losses: losses of the examples of a batch, ``(B,)``.
        generator: of random draws.
        before: mean losses before the change, of ``forget``, ``retain`` and ``held_out``.
        sizes: examples in every batch of each.
        progress: whether to show progress; None is in terminals.
        changed_buffers: names of buffers that the method sets; the others are put back at the end.
    """

    def __init__(
        self,
        module: nn.Module,
        initial: Mapping[str, Tensor],
        data: Mapping[str, Any],
        loss: Literal["auto"] | PerExampleLoss,
        seed: int,
        progress: bool | None,
    ) -> None:
        self.module = module
        self.initial = initial
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigurationError("`module` has no parameter that requires a gradient: leave one free.")
        self.losses = per_example_loss(loss, module)
        sets = {name: Batches(given, module, name) for name, given in data.items() if given is not None}
        self.forget: list[Any] = list(sets.pop("forget"))
        self.retain = sets.get("retain")
        self.held_out = sets.get("held_out")
        self.generator = torch.Generator().manual_seed(seed)
        self.progress = progress
        self.before: dict[str, float] = {}
        self.sizes: dict[str, list[int]] = {}
        self.changed_buffers: set[str] = set()

    def mean_loss(self, batches: Iterable[Any], argument: str) -> float:
        """Return the mean loss of all examples of ``argument``.

        Raises:
            InstabilityError: if it is not finite.
        """
        total, sizes = 0.0, []
        for batch in batches:
            with torch.no_grad():
                losses = self.losses(batch)
            total += float(losses.double().sum())
            sizes.append(len(losses))
        self.sizes[argument] = sizes
        if not abs(total) < float("inf"):
            raise InstabilityError(
                f"the loss of `{argument}` is not finite: lower the learning rate, stop earlier (`held_out`), or check "
                "the data and the model."
            )
        return total / sum(sizes)

    def measure(self) -> dict[str, float]:
        """Return the mean loss of every set that was given, by argument."""
        sets: dict[str, Any] = {"forget": self.forget, "retain": self.retain, "held_out": self.held_out}
        return {name: self.mean_loss(batches, name) for name, batches in sets.items() if batches is not None}

    def summed_gradient(self, batches: Iterable[Any], description: str = "") -> tuple[dict[str, Tensor], int]:
        """Return the gradient of the sum of all losses by every parameter, batch by batch, and the number of them."""
        total = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        count = 0
        for batch in self.follow(batches, description):
            losses = self.losses(batch)
            count += len(losses)
            found = torch.autograd.grad(losses.sum(), list(self.parameters.values()), allow_unused=True)
            for name, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    total[name] += gradient
        return total, count

    def follow(self, items: Iterable[T], description: str) -> Iterator[T]:
        """Yield the items, with a progress bar."""
        hidden = None if self.progress is None else not self.progress
        yield from tqdm(items, desc=description, disable=hidden, leave=False)

    def change(self) -> tuple[float, float]:
        """Return the norm of the change of all parameters, and of the parameters before."""
        pairs = [(p.detach(), self.initial[name]) for name, p in self.module.named_parameters()]
        return norm(p - before for p, before in pairs), norm(before for _, before in pairs)

    def scale_change(self, factor: float) -> None:
        """Shorten the change of all parameters."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.initial[name] + factor * (p - self.initial[name]))


class Unlearner(ABC):
    """A method that makes a trained module forget examples, as far as it can."""

    def unlearn(
        self,
        module: nn.Module,
        forget: Any,
        retain: Any = None,
        *,
        held_out: Any = None,
        loss: Literal["auto"] | PerExampleLoss = "auto",
        inplace: bool = False,
        seed: int = 0,
        progress: bool | None = None,
    ) -> UnlearningReport:
        """Return a report with the unlearned module.

        The module runs in evaluation mode: dropout is off and BatchNorm uses its running statistics. Mode, buffers,
        ``.grad``, ``requires_grad``, logs, metrics and the global random state are left as they were; so is the module,
        unless ``inplace``, and in any case if an error is raised.

        Args:
            module: a LightningModule or any other; parameters that do not require a gradient are not changed.
            forget: the examples to forget, a batch or a DataLoader of batches. They are read once and kept.
            retain: examples to retain, likewise; methods that do not use them report their loss.
            held_out: examples that the model was not trained on, likewise: their loss is reported, and
                :class:`GradientAscent` and :class:`IMU` stop when that of ``forget`` reaches it.
            loss: ``callable(module, batch) -> (B,)`` losses of examples; or ``"auto"``: the module's
                ``per_example_loss(batch)``, else the ``torch.nn.functional`` losses inside its ``training_step``, else,
                for a plain module, the cross-entropy of ``module(x)`` on batches ``(x, y)``.
            inplace: change ``module`` itself.
            seed: of all random draws.
            progress: whether to show it; None is in terminals alone.

        Raises:
            ConfigurationError: any argument that can not be right; an empty set.
            InstabilityError: the loss is not finite any more.
        """
        if not isinstance(module, nn.Module):
            raise ConfigurationError(f"`module` is a {type(module).__name__}: give a torch.nn.Module.")
        if forget is None:
            raise ConfigurationError("`forget` is None: give the examples to forget.")
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        unlearned = module if inplace else copy.deepcopy(module)
        gradients = [(p, p.grad, p.requires_grad) for p in unlearned.parameters()]
        initial = {name: t.detach().clone() for name, t in tensors_of(unlearned)}
        kept = set(initial)  # put back at the end: all of it, unless the method succeeds
        try:
            with quiet(Places(unlearned), device), torch.enable_grad(), _recurrent_gradients(unlearned, device):
                torch.manual_seed(seed)
                unlearned.eval()
                data = {"forget": forget, "retain": retain, "held_out": held_out}
                run = Run(unlearned, initial, data, loss, seed, progress)
                run.before = run.measure()
                start = time.perf_counter()
                outcome = self._change(run)
                seconds = time.perf_counter() - start
                after = run.measure()
                change, size = run.change()
                kept = {name for name, _ in unlearned.named_buffers()} - run.changed_buffers
        finally:
            with torch.no_grad():
                for name, t in tensors_of(unlearned):
                    if name in kept:
                        t.copy_(initial[name])
            for p, gradient, required in gradients:
                p.grad = gradient
                p.requires_grad_(required)
        sizes = {name: sum(of_batches) for name, of_batches in run.sizes.items()}
        losses = {name: LossPair(value, after[name]) for name, value in run.before.items()}
        return UnlearningReport(
            method=type(self).__name__,
            module=unlearned,
            num_forget=sizes["forget"],
            num_retain=sizes.get("retain"),
            num_held_out=sizes.get("held_out"),
            forget_loss=losses["forget"],
            retain_loss=losses.get("retain"),
            held_out_loss=losses.get("held_out"),
            change_norm=change,
            relative_change=change / size if size else 0.0,
            steps=outcome.steps,
            stopped=outcome.stopped,
            history=outcome.history,
            seconds=seconds,
            seed=seed,
            details=outcome.details,
        )

    @abstractmethod
    def _change(self, run: Run) -> Outcome:
        """Change the parameters of ``run.module``."""


def _recurrent_gradients(module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Leave cuDNN out where it has no gradient in evaluation mode: in recurrent networks."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in module.modules())
    return torch.backends.cudnn.flags(enabled=False) if recurrent and device.type == "cuda" else nullcontext()


def loader_of(batches: list[Any]) -> DataLoader:
    """Return a DataLoader of batches that are there already, in their order."""
    return DataLoader(batches, batch_size=None, shuffle=False)  # type: ignore[arg-type]


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return all parameters and buffers with their names."""
    return [*module.named_parameters(), *module.named_buffers()]


def norm(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of all entries of all tensors."""
    return sum(float(t.double().square().sum()) for t in tensors) ** 0.5


def check_number(name: str, value: object, allowed: Callable[[float], bool], words: str) -> None:
    """Refuse what is no number, or not an allowed one.

    Raises:
        ConfigurationError: naming the argument, and in ``words`` what it must be.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not allowed(value):
        raise ConfigurationError(f"`{name}` is {value!r}: give {words}.")


def check_positive(**numbers: object) -> None:
    """Refuse arguments that are not positive and finite.

    Raises:
        ConfigurationError: naming the first.
    """
    for name, value in numbers.items():
        check_number(name, value, lambda v: 0 < v < float("inf"), "a positive number")
