"""Which rows of the training dataset are in this batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_sketch.errors import ConfigurationError

_REMEDY = 'let every batch carry its dataset rows and pass `ids="key"` or `ids=callable(batch) -> (B,) ints`'


class _TracedBatchSampler:
    """A batch sampler that remembers what it gave out, in order."""

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler
        self._given: deque[tuple[int, list[int]]] = deque()
        self._first: int | None = None  # what Lightning counts the first batch given out as

    def __iter__(self) -> Iterator[Any]:
        # a deque of its own for every epoch: workers may still prefetch for the last one
        given = self._given = deque()
        self._first = None
        for i, batch in enumerate(self.batch_sampler):
            given.append((i, list(batch)))
            yield batch

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "batch_sampler":  # not yet set while being unpickled in a worker
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    def take(self, batch_idx: int, started: int) -> list[int] | None:
        """Return the rows of this batch of the epoch; forgets it and those before, which collated to ``None``.

        Args:
            batch_idx: Lightning's count of the batch.
            started: how many batches of the epoch Lightning counts as started before. In an epoch that is resumed in
                its middle the dataloader begins anew, but Lightning counts on.
        """
        if self._first is None:
            self._first = started
        while self._given:
            i, rows = self._given.popleft()
            if self._first + i >= batch_idx:
                return rows if self._first + i == batch_idx else None
        return None


class ExampleIds:
    """Dataset rows of every training batch, by tracing the batch sampler, by a key of the batch, or by a callable.

    Args:
        ids: ``"auto"`` (trace), a key of the batch, or ``callable(batch) -> (B,)`` integers.

    Raises:
        ConfigurationError: if ``ids`` is none of these.
    """

    def __init__(self, ids: Callable[[Any], Any] | str) -> None:
        if not isinstance(ids, str) and not callable(ids):
            raise ConfigurationError(f"`ids` must be 'auto', a key of the batch or a callable but is {ids!r}.")
        self.ids = ids
        self._traced: tuple[DataLoader[Any], _TracedBatchSampler] | None = None
        self._undo: Callable[[], None] | None = None

    def install(self, trainer: Any) -> None:
        """Trace the train dataloader that the Trainer is about to build; only ``"auto"`` needs it."""
        if self.ids != "auto":
            return
        strategy = trainer.strategy
        original = strategy.process_dataloader

        def process_dataloader(dataloader: Any) -> Any:
            dataloader = original(dataloader)
            if trainer.training:
                self._trace(dataloader)
            return dataloader

        strategy.process_dataloader = process_dataloader

        def undo() -> None:
            strategy.__dict__.pop("process_dataloader", None)

        self._undo = undo

    def _trace(self, dataloader: Any) -> None:
        self._restore_loader()
        refuse_untraceable(dataloader)
        traced = _TracedBatchSampler(dataloader.batch_sampler)
        dataloader.__dict__["batch_sampler"] = traced  # DataLoader.__setattr__ forbids the public way
        self._traced = (dataloader, traced)

    def remove(self) -> None:
        """Leave strategy and dataloader as they were; may be called twice."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._restore_loader()

    def _restore_loader(self) -> None:
        if self._traced is not None:
            dataloader, traced = self._traced
            dataloader.__dict__["batch_sampler"] = traced.batch_sampler
            self._traced = None

    def check(self, trainer: Any) -> None:
        """Refuse dataloaders that are not the one traced, such as several in a list or a mapping.

        Raises:
            ConfigurationError: naming the remedy.
        """
        loader = trainer.train_dataloader
        if self.ids == "auto" and (self._traced is None or loader is not self._traced[0]):
            refuse_untraceable(loader)

    def next_batch(self, trainer: Any, batch_idx: int) -> list[int] | None:
        """Return the traced rows of the next training batch; ``None`` where ids come from the batch itself.

        Raises:
            ConfigurationError: if the batches do not come from the one traced dataloader, in its order.
        """
        if self.ids != "auto":
            return None
        self.check(trainer)
        started = trainer.fit_loop.epoch_loop.batch_progress.current.started
        rows = None if self._traced is None else self._traced[1].take(batch_idx, started)
        if rows is None:
            raise ConfigurationError(
                f'`ids="auto"` lost track of the batches (is the train dataloader unusual?): {_REMEDY}.'
            )
        return rows

    def of_batch(self, batch: Any, traced: list[int] | None) -> Tensor:
        """Return the dataset rows of ``batch``, int64 on the CPU, shape ``(B,)``.

        Raises:
            ConfigurationError: if the batch does not tell, or tells something else than ``B`` integers.
        """
        if self.ids == "auto":
            found: Any = traced
        elif callable(self.ids):
            found = self.ids(batch)
        elif isinstance(batch, Mapping) and self.ids in batch:
            found = batch[self.ids]
        else:
            keys = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise ConfigurationError(f"`ids={self.ids!r}` is not a key of the batch (which has {keys}): {_REMEDY}.")
        ids = torch.as_tensor(found)
        if ids.ndim != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise ConfigurationError(f"`ids` must give (B,) integers but gave {ids.dtype} of shape {tuple(ids.shape)}.")
        ids = ids.to("cpu", torch.int64)
        size = batch_size(batch)
        if size is not None and size != len(ids):
            raise ConfigurationError(f"`ids` gave {len(ids)} examples but the batch holds {size}: {_REMEDY}.")
        return ids


def refuse_untraceable(dataloader: Any) -> None:
    """Refuse a dataloader whose batch sampler does not determine the rows of every batch.

    Raises:
        ConfigurationError: naming the reason and the remedy.
    """
    reason = None
    if not isinstance(dataloader, DataLoader):
        reason = f"the train dataloader is a {type(dataloader).__name__}"
    elif isinstance(dataloader.dataset, IterableDataset):
        reason = "the train dataset is an IterableDataset, which has no rows"
    elif dataloader.batch_sampler is None:
        reason = "the train dataloader has batch_size=None"
    elif not getattr(dataloader, "in_order", True):
        reason = "the train dataloader has in_order=False"
    elif type(dataloader) is not DataLoader and type(dataloader).__iter__ is not DataLoader.__iter__:
        reason = f"the train dataloader is a {type(dataloader).__name__} with an iterator of its own"
    if reason is not None:
        raise ConfigurationError(f'`ids="auto"` cannot know the examples of a batch, since {reason}: {_REMEDY}.')


def batch_size(batch: Any) -> int | None:
    """Return the common first dimension of the tensors in a batch, or ``None`` if they have none."""
    sizes = {t.shape[0] for t in tensors_of(batch) if t.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested mappings and sequences."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors_of(value)
