"""A sketch knows the order of the data, so that parts of another run are not merged even where all else is equal."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Classifier, data, fit
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import Sketch, SketchCallback, SketchError
from lightning_sketch.callbacks._examples import BatchUnits

SIZE = 6
IN_ORDER = list(range(2 * SIZE))
TWINS = IN_ORDER[SIZE:] + IN_ORDER[:SIZE]  # every row's twin in its place


def sketched(dirpath: Path, order: list[int], seed: int, batch_size: int = 4, **options: Any) -> Sketch:
    """Of a run on examples that are all there twice, as different units."""
    x, y = data(SIZE).tensors
    dataset = TensorDataset(torch.cat([x, x]), torch.cat([y, y]))
    train = DataLoader(dataset, batch_size, sampler=order)
    fit(Classifier, [SketchCallback(dirpath, 2, 1, seed=seed, **options)], train)
    return Sketch.load(dirpath)


def test_runs_that_differ_in_the_order_of_the_data_only_are_not_merged(tmp_path: Path) -> None:
    """Oracle: every bit of the final parameters, which are equal."""
    first, same = (sketched(tmp_path / str(seed), IN_ORDER, seed) for seed in (0, 1))
    other = sketched(tmp_path / "2", TWINS, 2)
    for name, value in first.primal.items():
        assert torch.equal(other.primal[name], value)
    with pytest.raises(SketchError, match=r"\(order of the data differ\).*`seed_everything`"):
        Sketch.merge([first, other], tmp_path / "out")
    Sketch.merge([first, same], tmp_path / "out").verify()


def test_the_order_is_of_the_rows_of_every_batch(tmp_path: Path) -> None:
    """Oracle: rows and batches of two epochs, chained by hand, whatever their units."""
    digest = ""
    for start in (0, 5, 10) * 2:
        rows = b"".join(row.to_bytes(8, "little") for row in TWINS[start : start + 5])
        digest = hashlib.sha256(digest.encode() + rows).hexdigest()
    units = [i % 4 for i in IN_ORDER]
    sketch = sketched(tmp_path, TWINS, 0, 5, units=units)
    assert sketch.metadata["data_order"] == hashlib.sha256(digest.encode()).hexdigest()


@pytest.mark.parametrize("asked", [{250}, {0, 1, 99, 100, 101, 250}])
def test_the_order_of_many_batches(asked: set[int]) -> None:
    """Oracle: rows of all batches, chained by hand, whenever it is asked for."""
    units = BatchUnits(None, "rows")
    units.of_example = np.arange(1000)
    digest = ""
    for batch in range(251):
        if batch in asked:
            assert units.order == digest
        rows = torch.tensor([4 * batch % 1000, batch])
        units.of_batch({"rows": rows})
        digest = hashlib.sha256(digest.encode() + rows.numpy().tobytes()).hexdigest()
    assert units.order == digest
