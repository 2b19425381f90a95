"""The rows of every training batch are known, whatever the dataloader, which is left as it was."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import fit
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Subset

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.shadow.example_ids import ExampleIds, batch_size

SIZE = 11


class Rows(Dataset):
    """Every example is its own row."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": torch.tensor([float(i)]), "row": i, "nested": (torch.tensor(i), {"y": torch.tensor([i, i])})}


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch["x"]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Follow(pl.Callback):
    """Compares the ids of every batch with the rows that it holds."""

    def __init__(self, ids: Any = "auto") -> None:
        self.ids = ExampleIds(ids)
        self.batches: list[list[int]] = []
        self.val_samplers: set[type] = set()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.ids.install(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        ids = self.ids.of_batch(batch, self.ids.next_batch(trainer, batch_idx))
        assert ids.dtype == torch.int64
        assert ids.tolist() == batch["row"].tolist()
        self.batches.append(ids.tolist())

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        self.val_samplers.add(type(trainer.val_dataloaders.batch_sampler))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.ids.remove()
        self.ids.remove()  # may be called twice

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.ids.remove()


def follow(train: Any, ids: Any = "auto", **options: Any) -> Follow:
    callback = Follow(ids)
    fit(Module, [callback], train, epochs=3, num_sanity_val_steps=0, **options)
    return callback


class Custom(BatchSampler):
    """Batches of different sizes, with rows that come again."""

    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([3, 1], [0, 0, 7], [10], [5, 4, 3, 2])

    def __len__(self) -> int:
        return 4


def without_row_0(examples: list[Any]) -> Any:
    batch = torch.utils.data.default_collate(examples)
    return None if 0 in batch["row"] else batch


LOADERS = {
    "in order": {"batch_size": 4},
    "shuffled": {"batch_size": 4, "shuffle": True},
    "incomplete batch dropped": {"batch_size": 4, "shuffle": True, "drop_last": True},
    "custom batch sampler": {"batch_sampler": Custom()},
    "sampler with replacement": {"batch_size": 3, "sampler": RandomSampler(range(SIZE), replacement=True)},
}


@pytest.mark.parametrize("name", LOADERS)
def test_rows_of_every_batch(name):
    """Oracle: the rows that the batches carry, compared in the callback."""
    loader = DataLoader(Rows(), **LOADERS[name])
    assert len(follow(loader).batches) == 3 * len(loader)


@pytest.mark.parametrize("persistent", [False, True])
def test_rows_with_workers_that_prefetch_beyond_the_epoch(persistent):
    """Oracle: the rows that the batches carry; workers have fetched more than the two batches of an epoch."""
    loader = DataLoader(
        Rows(), batch_size=2, shuffle=True, num_workers=2, persistent_workers=persistent, prefetch_factor=2
    )
    assert len(follow(loader, limit_train_batches=2).batches) == 6


def test_rows_with_validation_inside_the_epoch_and_reloading():
    """Oracle: the rows that the batches carry, and a validation loader whose sampler nobody wrapped."""
    loader = DataLoader(Rows(), batch_size=2, shuffle=True)
    callback = Follow()
    fit(
        Module,
        [callback],
        loader,
        val=DataLoader(Rows(), batch_size=4),
        epochs=2,
        val_check_interval=0.5,
        reload_dataloaders_every_n_epochs=1,
    )
    assert len(callback.batches) == 12
    assert callback.val_samplers == {BatchSampler}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("collate", "left"), [(None, [[0, 1], [2, 3], [4, 5]]), (without_row_0, [[2, 3], [4, 5], [6, 7]])]
)
def test_rows_after_a_checkpoint_in_mid_epoch(workers, collate, left, tmp_path):
    """Oracle: the rows that the batches carry; the dataloader begins anew, while Lightning counts on."""

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (1, 2):
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    loader = DataLoader(Rows(), batch_size=2, num_workers=workers, collate_fn=collate)
    fit(Module, [Saves()], loader, epochs=3)
    batches = follow(loader, checkpoint=tmp_path / "mid.ckpt").batches
    assert batches[:3] == left


def test_rows_of_overfitted_batches():
    """Oracle: the rows that the batches carry; the same ones in every epoch."""
    batches = follow(DataLoader(Rows(), batch_size=2, shuffle=True), overfit_batches=2).batches
    assert len(batches) == 6
    assert batches[:2] == batches[2:4]


def test_rows_are_those_of_the_train_dataset_itself():
    """Oracle: a subset counts its own rows."""

    class Positions(Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> Any:
            return {**SUBSET[i], "row": i}

    SUBSET = Subset(Rows(), [9, 7, 5, 3, 1, 0])
    assert len(follow(DataLoader(Positions(), batch_size=4, shuffle=True)).batches) == 6


def test_rows_of_a_data_module():
    """Oracle: the rows that the batches carry."""

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(Rows(), batch_size=3, shuffle=True)

    assert len(follow(Data()).batches) == 12


def test_batches_that_collate_to_nothing_do_not_shift_the_rows():
    """Oracle: the rows of the other batches, compared in the callback."""
    callback = follow(DataLoader(Rows(), batch_size=2, shuffle=True, collate_fn=without_row_0))
    assert len(callback.batches) == 3 * 5


@pytest.mark.parametrize("ids", ["row", lambda batch: batch["nested"][0]])
def test_rows_by_key_and_by_callable(ids):
    """Oracle: the rows that the batches carry."""
    assert len(follow(DataLoader(Rows(), batch_size=4, shuffle=True), ids).batches) == 9


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails):
    """Oracle: the strategy's own method and the dataloader's own sampler."""
    loader = DataLoader(Rows(), batch_size=4)
    sampler = loader.batch_sampler
    seen = []

    class Look(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(loader.batch_sampler is not sampler)
            if fails:
                raise RuntimeError("the user's")
            return super().training_step(batch, batch_idx)

    if fails:
        with pytest.raises(RuntimeError, match=r"the user's"):
            fit(Look, [Follow()], loader)
    else:
        _, trainer = fit(Look, [Follow()], loader)
        assert "process_dataloader" not in trainer.strategy.__dict__
    assert seen[0]
    assert loader.batch_sampler is sampler


def test_the_tracer_behaves_as_the_sampler():
    """Oracle: length and attributes of the sampler."""
    loader = DataLoader(Rows(), batch_size=4)

    class Look(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            traced = loader.batch_sampler
            assert len(traced) == 3
            assert traced.batch_size == 4
            return super().training_step(batch, batch_idx)

    fit(Look, [Follow()], loader)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return (Rows()[i] for i in range(4))


class OwnIterator(DataLoader):
    def __iter__(self) -> Any:
        return super().__iter__()


class Plain:
    """Batches without a dataloader."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        yield torch.utils.data.default_collate([Rows()[0]])


UNTRACEABLE = {
    "IterableDataset": lambda: DataLoader(Stream(), batch_size=2),
    "batch_size=None": lambda: DataLoader(Rows(), batch_size=None, sampler=[0, 1]),
    "in_order=False": lambda: DataLoader(Rows(), batch_size=2, in_order=False),
    "OwnIterator": lambda: OwnIterator(Rows(), batch_size=2),
    "is a Plain": lambda: Plain(),
}


@pytest.mark.parametrize("reason", UNTRACEABLE)
def test_dataloaders_that_do_not_tell_are_refused(reason):
    with pytest.raises(ConfigurationError, match=rf'`ids="auto"` cannot know.*{reason}.*`ids='):
        follow(UNTRACEABLE[reason]())


def test_several_dataloaders_are_refused():
    """Each of them is traced on its own, and the rows of the last one would be taken for those of the batch."""
    loaders = {"a": DataLoader(Rows(), batch_size=2), "b": DataLoader(Rows(), batch_size=2)}

    class Both(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], batch_idx)

    with pytest.raises(ConfigurationError, match=r'`ids="auto"` cannot know.*is a dict'):
        fit(Both, [Follow()], loaders)


BATCH = {"x": torch.zeros(3, 2), "row": torch.tensor([0, 1, 2])}


def test_a_missing_key_is_refused():
    with pytest.raises(ConfigurationError, match=r"`ids='index'` is not a key of the batch.*\['row', 'x'\]"):
        ExampleIds("index").of_batch(BATCH, None)
    with pytest.raises(ConfigurationError, match=r"`ids='index'`.*list"):
        ExampleIds("index").of_batch([BATCH], None)


@pytest.mark.parametrize("found", [torch.zeros(3), torch.zeros(3, 1, dtype=torch.int64), torch.tensor([True] * 3)])
def test_ids_that_are_no_integers_are_refused(found):
    with pytest.raises(ConfigurationError, match=r"`ids` must give \(B,\) integers"):
        ExampleIds(lambda batch: found).of_batch(BATCH, None)


def test_another_number_of_ids_is_refused():
    with pytest.raises(ConfigurationError, match=r"`ids` gave 2 examples but the batch holds 3"):
        ExampleIds(lambda batch: [0, 1]).of_batch(BATCH, None)


def test_ids_of_another_kind_are_refused():
    with pytest.raises(ConfigurationError, match=r"`ids` must be 'auto', a key of the batch or a callable"):
        ExampleIds(3)


def test_batch_size_is_what_all_tensors_share():
    assert batch_size((torch.zeros(3, 2), {"y": [torch.zeros(3), torch.tensor(1.0)]})) == 3
    assert batch_size((torch.zeros(3), torch.zeros(4))) is None
    assert batch_size("text") is None
