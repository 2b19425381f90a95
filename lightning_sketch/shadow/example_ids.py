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
        self.given: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.given.clear()
        for batch in self.batch_sampler:
            self.given.append(list(batch))
            yield batch

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "batch_sampler":  # not yet set while being unpickled in a worker
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)


class ExampleIds:
    """Dataset rows of every training batch, by tracing the batch sampler, by a key of the batch, or by a callable.

    Args:
        ids: ``"auto"`` (trace), a key of the batch, or ``callable(batch) -> (B,)`` integers.

    Raises:
        ConfigurationError: if ``ids`` is none of these.
    """

    def __init__(self, ids: str | Callable[[Any], Any]) -> None:
        if not isinstance(ids, str) and not callable(ids):
            raise ConfigurationError(f"`ids` must be 'auto', a key of the batch or a callable but is {ids!r}.")
        self.ids = ids
        self._traced: list[tuple[DataLoader[Any], _TracedBatchSampler, Any]] = []
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
        self._restore_loaders()
        refuse_untraceable(dataloader)
        sampler = dataloader.batch_sampler
        traced = _TracedBatchSampler(sampler)
        dataloader.__dict__["batch_sampler"] = traced  # DataLoader.__setattr__ forbids the public way
        self._traced.append((dataloader, traced, sampler))

    def remove(self) -> None:
        """Leave strategy and dataloaders as they were; may be called twice."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._restore_loaders()

    def _restore_loaders(self) -> None:
        for dataloader, _, sampler in self._traced:
            dataloader.__dict__["batch_sampler"] = sampler
        self._traced.clear()

    def next_batch(self) -> list[int] | None:
        """Take the traced rows of the next training batch; ``None`` where ids come from the batch itself."""
        if self.ids != "auto":
            return None
        if not self._traced or not self._traced[0][1].given:
            raise ConfigurationError(f'`ids="auto"` lost track of the batches (is the train dataloader unusual?): {_REMEDY}.')
        return self._traced[0][1].given.popleft()

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
