"""The processes of one run: what each saw goes to all of them, and what each carries goes to the first."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sketch.errors import ConfigurationError, LightningSketchError

T = TypeVar("T")
_ALIGNMENT = 16  # bytes, so that a tensor of any dtype may begin there
_END = "end"


@dataclass(frozen=True)
class _Layout:
    """How a tensor lies in the bytes that are sent: dimensions in the order of its memory, kept for dropout's sake."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]
    on_device: bool

    @classmethod
    def of(cls, t: Tensor) -> _Layout:
        order = sorted(range(t.ndim), key=t.stride, reverse=True)
        return cls(t.dtype, tuple(t.shape[d] for d in order), tuple(order), t.device.type != "cpu")

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def padded_bytes(self) -> int:
        return -(-self.num_bytes // _ALIGNMENT) * _ALIGNMENT

    def restore(self, flat: Tensor, device: torch.device) -> Tensor:
        """The tensor in its first bytes ``flat``, with its dimensions in the order that they had."""
        t = flat[: self.num_bytes].view(self.dtype).reshape(self.shape)
        t = t.permute([self.order.index(d) for d in range(len(self.order))])
        return t.to(device if self.on_device else "cpu", copy=True)  # `torch.set_rng_state` is given no views


class Ranks:
    """The processes of a run, each with a number, its rank. A single one talks to nobody.

    Every method must be called on all of them, in the same order.

    Args:
        size: how many there are.
        rank: of this one, from 0.
        device: where the tensors of this one are.
        on_device: how many share its device; on a CPU, all those of this host.
    """

    def __init__(self, size: int = 1, rank: int = 0, device: torch.device | None = None, on_device: int = 1) -> None:
        self.size = size
        self.on_device = on_device
        self.rank = rank
        self.device = torch.device("cpu") if device is None else device

    @classmethod
    def of(cls, trainer: Any) -> Ranks:
        """Those of a Trainer that is set up."""
        device = trainer.strategy.root_device
        on_device = getattr(trainer.strategy, "parallel_devices", [device]).count(device)
        return cls(trainer.world_size, trainer.global_rank, device, on_device)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, value: T) -> list[T]:
        """Give ``value`` to all and return those of all, by rank.

        Args:
            value: anything that can be pickled; tensors in it, also inside objects, are sent as they are.

        Raises:
            ConfigurationError: on all of them, if something in it cannot be pickled.
        """
        if self.size == 1:
            return [value]
        try:
            skeleton, tensors = _take_apart(value)
        except Exception as error:
            skeleton, tensors = None, []  # the others wait for an answer
            problem: str | None = f"{type(error).__name__}: {error}"
        else:
            problem = None
        layouts = [_Layout.of(t) for t in tensors]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, (problem, skeleton, layouts))
        for problem, _, _ in parts:
            if problem is not None:
                raise ConfigurationError(
                    f"A training batch cannot be sent to the other processes ({problem}): make it of tensors, numbers, "
                    "strings and containers of these."
                )
        length = max(sum(layout.padded_bytes for layout in layouts) for _, _, layouts in parts)
        flat = self._flattened(tensors, layouts, length)
        gathered = [torch.empty_like(flat) for _ in parts] if length else [flat] * self.size
        if length:
            dist.all_gather(gathered, flat)
        return [
            value if rank == self.rank else _put_together(skeleton, self._split(flat, layouts))
            for rank, ((_, skeleton, layouts), flat) in enumerate(zip(parts, gathered, strict=True))
        ]

    def _flattened(self, tensors: list[Tensor], layouts: list[_Layout], length: int) -> Tensor:
        flat = torch.zeros(length, dtype=torch.uint8, device=self.device)
        start = 0
        for t, layout in zip(tensors, layouts, strict=True):
            packed = t.detach().permute(layout.order).contiguous().reshape(-1).view(torch.uint8)
            flat[start : start + len(packed)] = packed
            start += layout.padded_bytes
        return flat

    def _split(self, flat: Tensor, layouts: list[_Layout]) -> list[Tensor]:
        sizes = [layout.padded_bytes for layout in layouts]
        parts = flat[: sum(sizes)].split(sizes)
        return [layout.restore(part, self.device) for layout, part in zip(layouts, parts, strict=True)]

    def collect(self, items: Iterable[T]) -> Iterator[T]:
        """Yield on the first process the items of all, one at a time, by rank; on the others nothing.

        It must be exhausted on all of them. Tensors of other processes arrive on the CPU.
        """
        if self.is_first:
            yield from items
            for rank in range(1, self.size):
                yield from self._receive(rank)
            return
        for item in items:
            skeleton, tensors = _take_apart(item)
            dist.send_object_list([skeleton, [(t.dtype, t.shape) for t in tensors]], dst=0)
            for t in tensors:
                dist.send(t.detach().to(self.device).contiguous(), dst=0)
        dist.send_object_list([_END, None], dst=0)

    def _receive(self, rank: int) -> Iterator[Any]:
        while True:
            message: list[Any] = [None, None]
            dist.recv_object_list(message, src=rank)
            skeleton, layouts = message
            if skeleton == _END:
                return
            tensors = []
            for dtype, shape in layouts:
                t = torch.empty(shape, dtype=dtype, device=self.device)
                dist.recv(t, src=rank)
                tensors.append(t.cpu())
            yield _put_together(skeleton, tensors)

    def agree(self, error: Exception | None) -> None:
        """Raise on all of them what one met, so that none waits for another that has stopped.

        Args:
            error: what this process met, or ``None``.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        failed = torch.tensor([error is not None], dtype=torch.uint8, device=self.device)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if not failed.item():
            return
        kind = type(error) if isinstance(error, LightningSketchError) else RuntimeError
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, None if error is None else (kind, str(error)))
        rank, (kind, message) = next((rank, e) for rank, e in enumerate(found) if e is not None)
        if rank == self.rank:
            assert error is not None
            raise error
        raise kind(f"{message} (met by the process of rank {rank})")


def _take_apart(value: Any) -> tuple[bytes, list[Tensor]]:
    """A pickle of ``value`` without its tensors, and these."""
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if type(obj) is not Tensor or obj.layout != torch.strided or obj.is_quantized:
                return None
            tensors.append(obj)
            return len(tensors) - 1

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue(), tensors


def _put_together(skeleton: bytes, tensors: list[Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: int) -> Tensor:
            return tensors[pid]

    return Unpickler(io.BytesIO(skeleton)).load()


class BufferSync:
    """Tells when ``DistributedDataParallel`` has given all processes the buffers of the first.

    Args:
        model: what the strategy calls; watched if it is a ``DistributedDataParallel``.
    """

    def __init__(self, model: Any) -> None:
        self._happened = False
        self._undo: Callable[[], Any] = lambda: None
        if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
            return
        original = model._sync_buffers

        def sync_buffers() -> None:
            original()
            self._happened = True

        model.__dict__["_sync_buffers"] = sync_buffers
        self._undo = lambda: model.__dict__.pop("_sync_buffers", None)

    def happened(self) -> bool:
        """Whether it has since this was asked last."""
        happened, self._happened = self._happened, False
        return happened

    def remove(self) -> None:
        """Leave the model as it was; may be called twice."""
        self._undo()
        self._undo = lambda: None
