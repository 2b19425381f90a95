"""Runs of two DDP processes: the sketch is that of one process on the same global batches, and of retraining."""

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import two_processes as script
from helpers import Classifier, data, fit, network
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    XLAStrategy,
)
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_sketch import ConfigurationError, GradientRestriction, Sketch, SketchCallback
from lightning_sketch.shadow.ranks import Ranks
from lightning_sketch.shadow.wrapping import check_optimizers, check_trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes left, a folder for every case."""
    dirpath = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    outputs = [(dirpath / f"output-{rank}.txt").open("w+") for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, script.__file__, dirpath],
            env={**shared, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)},
            stdout=outputs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            code = process.wait(timeout=300)
            assert code == 0, "\n".join(Path(o.name).read_text()[-3000:] for o in outputs)
    finally:
        for process, output in zip(processes, outputs, strict=True):
            process.kill()
            output.close()
    return dirpath


def coefficients(dirpath: Path) -> dict[tuple[str, int], Tensor]:
    """By name and direction, ``(R, P, *S)``."""
    return {
        (name, int(row)): block[:, :, k]
        for shard in Sketch.load(dirpath).shards()
        for name, block in shard.coefficients.items()
        for k, row in enumerate(shard.indices)
    }


def assert_equal(ours: dict[Any, Tensor], theirs: dict[Any, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert float((ours[key] - value).abs().max()) <= tolerance * float(value.abs().max()), key


class Together:
    """The batches of two processes as one: what ``DistributedSampler`` gives each, of every epoch."""

    def __init__(self, batch_size: int) -> None:
        dataset = data(script.EXAMPLES)
        self.samplers = [DistributedSampler(dataset, 2, rank, shuffle=True, seed=1) for rank in range(2)]
        self.batch_size = batch_size
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        for sampler in self.samplers:
            sampler.set_epoch(self.epoch)
        self.epoch += 1
        mine = [list(sampler) for sampler in self.samplers]
        for start in range(0, len(mine[0]), self.batch_size):
            yield [i for rows in mine for i in rows[start : start + self.batch_size]]

    def __len__(self) -> int:
        return len(self.samplers[0]) // self.batch_size


def test_two_processes_give_the_sketch_of_one(runs: Path, tmp_path: Path) -> None:
    loader = DataLoader(data(script.EXAMPLES), batch_sampler=Together(3))
    fit(script.Momentum, [SketchCallback(tmp_path / "sketch", script.directions(), 3)], loader)
    one, two = Sketch.load(tmp_path / "sketch"), Sketch.load(runs / "same_global_batches" / "sketch")
    assert one.steps == two.steps == 8
    assert_equal(two.primal, one.primal, 1e-13)
    assert_equal(coefficients(two.dirpath), coefficients(one.dirpath), 1e-10)


def chained(batches: Sequence[list[int]], digest: str = "") -> str:
    for rows in batches:
        digest = hashlib.sha256(digest.encode() + np.array(rows, dtype="<i8").tobytes()).hexdigest()
    return digest


def of_both(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def test_the_order_of_the_data_is_that_of_all_processes(runs: Path) -> None:
    """Oracle: the batches of either process, chained by hand."""
    together = Together(3)
    batches = [rows for _ in range(2) for rows in together]
    expected = of_both([chained([rows[:3] for rows in batches]), chained([rows[3:] for rows in batches])])
    for case in ("same_global_batches", "again"):
        assert Sketch.load(runs / case / "sketch").metadata["data_order"] == expected, case


def test_every_process_carries_its_share(runs: Path) -> None:
    """Real directions 0, 2, 4 and complex ones 1, 3, spread evenly; one set of files."""
    dirpath = runs / "same_global_batches" / "sketch"
    sketch = Sketch.load(dirpath)
    sketch.verify()
    assert [shard.indices.tolist() for shard in sketch.shards()] == [[0, 4], [1], [2], [3]]
    assert len(list(dirpath.glob("*.safetensors"))) == 4 + 2


@pytest.mark.parametrize(
    ("case", "direction"), [("against_retraining", 0), ("against_retraining", 1), ("skipped_steps", 0)]
)
def test_coefficients_are_the_derivative_of_retraining(runs: Path, case: str, direction: int) -> None:
    """Oracle: finite differences of reweighted runs of two processes.

    With uneven batches, other random numbers on each process, BatchNorm (each process's own statistics between
    synchronisations, also one in the middle of an epoch by validation), dropout, accumulation and clipping; or a loss
    scaler that finds overflow on one process.
    """
    folder = runs / case
    ours = coefficients(folder / "sketch")
    for name, difference in torch.load(folder / f"difference-0-{direction}.pt").items():
        found = ours.get((name, direction))
        first = torch.zeros_like(difference) if found is None else found[0, 0]
        assert float((first - difference).abs().max()) < 1e-7 * max(float(difference.abs().max()), 1e-3), name


def test_steps_are_really_skipped_in_that_test(runs: Path) -> None:
    """Of three steps in each of three epochs."""
    assert Sketch.load(runs / "skipped_steps" / "sketch").steps == 6


def test_processes_really_differ_in_that_test(runs: Path) -> None:
    """Its statistics of the second process are not those of the first, which the sketch is of."""
    final = [torch.load(runs / "against_retraining" / f"final-{rank}.pt") for rank in range(2)]
    assert not torch.equal(final[0]["net.1.running_var"], final[1]["net.1.running_var"])
    assert torch.equal(final[0]["net.0.weight"], final[1]["net.0.weight"])


@pytest.mark.parametrize("rank", range(2))
def test_the_run_is_unchanged(runs: Path, rank: int) -> None:
    folder = runs / "unchanged_run"
    ours, theirs = (torch.load(folder / f"{name}-{rank}.pt") for name in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (folder / "with" / "metrics.csv").read_text() == (folder / "without" / "metrics.csv").read_text()


def test_gradients_are_restricted_on_each_process(runs: Path) -> None:
    """Oracle: one process that accumulates the batches of both."""
    together = Together(3)
    batches = [part for _ in range(2) for rows in together for part in (rows[:3], rows[3:])]
    loader = DataLoader(data(script.EXAMPLES), batch_sampler=batches)
    one, _ = fit(script.Momentum, [GradientRestriction(0.3)], loader, epochs=1, accumulate_grad_batches=4)
    plain, _ = fit(script.Momentum, [], loader, epochs=1, accumulate_grad_batches=4)
    expected, without = script.tensors(one), script.tensors(plain)
    for rank in range(2):
        found = torch.load(runs / "restricted" / f"final-{rank}.pt")
        assert_equal(found, expected, 1e-13)
        assert all(not torch.allclose(found[name], without[name], rtol=1e-3) for name in found)


def test_resumed_by_two_processes(runs: Path) -> None:
    folder = runs / "resumed"
    assert_equal(coefficients(folder / "rest"), coefficients(folder / "whole"), 0)
    rest, whole = (Sketch.load(folder / name).metadata["data_order"] for name in ("rest", "whole"))
    assert rest == whole


def test_a_checkpoint_of_two_processes_is_resumed_by_one(runs: Path, tmp_path: Path) -> None:
    """Oracle: one process all the way, on the same global batches."""

    def train(name: str, epochs: int, **options: Any) -> None:
        callback = SketchCallback(tmp_path / name, script.directions(), 2, directions_per_pass=2)
        batches = Together(3)
        batches.epoch = options.pop("start", 0)
        loader = DataLoader(data(script.EXAMPLES), batch_sampler=batches)
        fit(script.Momentum, [callback], loader, epochs=epochs, **options)

    train("rest", 3, start=1, checkpoint=runs / "resumed" / "first.ckpt")
    train("whole", 3)
    assert Sketch.load(tmp_path / "rest").steps == 12
    together = Together(3)
    first, *others = ([*together] for _ in range(3))
    begun = of_both([chained([rows[:3] for rows in first]), chained([rows[3:] for rows in first])])
    expected = of_both([chained([rows for epoch in others for rows in epoch], begun)])
    assert Sketch.load(tmp_path / "rest").metadata["data_order"] == expected
    assert_equal(coefficients(tmp_path / "rest"), coefficients(tmp_path / "whole"), 1e-10)


@pytest.mark.parametrize("case", ["fewer_directions_than_processes", "unused_parameters"])
def test_sketches_are_whole(runs: Path, case: str) -> None:
    sketch = Sketch.load(runs / case / "sketch")
    sketch.verify()
    assert all(bool(block.any()) for block in coefficients(sketch.dirpath).values())


def test_instability_of_one_process_ends_the_sketch_of_all(runs: Path) -> None:
    folder = runs / "instability_of_one"
    for rank in range(2):
        assert (folder / f"warn-{rank}.txt").read_text() == "no error"
        assert (folder / f"stop-{rank}.txt").read_text().startswith("InstabilityError: The Taylor coefficients")
    final = [torch.load(folder / f"warn-{rank}.pt") for rank in range(2)]
    whole = Sketch.load(runs / "same_global_batches" / "sketch").primal  # the same run, to its end
    assert all(torch.equal(value, whole[name]) for f in final for name, value in f.items())
    assert not list(folder.glob("*/sketch.json"))


@pytest.mark.parametrize(
    ("case", "name", "message"),
    [
        ("unwritable", "setup", "SketchError: .*file/sketch` can not be written"),
        ("unwritable", "end", "SketchError: .*sketch` can not be written"),
        ("communicating", "told", "ConfigurationError: `training_step` exchanges data between processes"),
        ("synchronized_batch_norm", "told", "ConfigurationError: .*SyncBatchNorm"),
    ],
)
@pytest.mark.parametrize("rank", range(2))
def test_all_processes_raise_what_one_meets(runs: Path, case: str, name: str, message: str, rank: int) -> None:
    told = (runs / case / f"{name}-{rank}.txt").read_text()
    assert told.startswith(message.partition(":")[0])
    assert message.rpartition(".*")[2] in told


@pytest.mark.parametrize("window", [2, None])
def test_a_monitor_of_two_processes(runs: Path, window: int | None) -> None:
    """Oracle: one process on the same global batches; both log the same."""
    callback = script.monitor(window)
    fit(script.Momentum, [callback], DataLoader(data(script.EXAMPLES), batch_sampler=Together(3)))
    for rank in range(2):
        found, logged = torch.load(runs / "monitored" / f"{window}-{rank}.pt")
        assert torch.allclose(found, script.numbers(callback.history), rtol=1e-9)
        assert float(logged) == pytest.approx(float(found[-1, -1]), rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy, "FSDPStrategy, which spreads parameters or optimizer state over processes"),
        (ModelParallelStrategy, "ModelParallelStrategy, which spreads"),
        (DeepSpeedStrategy, "DeepSpeedStrategy, which spreads"),
        (XLAStrategy, "strategy XLAStrategy"),
    ],
)
def test_other_strategies_are_refused(strategy: type, message: str) -> None:
    trainer = SimpleNamespace(strategy=object.__new__(strategy), precision="32-true", world_size=1)
    with pytest.raises(ConfigurationError, match=message):
        check_trainer(trainer, Classifier(), "SketchCallback")


def test_communication_hooks_are_refused() -> None:
    trainer = SimpleNamespace(strategy=DDPStrategy(ddp_comm_hook=print), precision="32-true", world_size=1)
    with pytest.raises(ConfigurationError, match="communication hook"):
        check_trainer(trainer, Classifier(), "SketchCallback")


def test_distributed_optimizers_are_refused() -> None:
    optimizer = object.__new__(ZeroRedundancyOptimizer)
    with pytest.raises(ConfigurationError, match="ZeroRedundancyOptimizer, which spreads its state"):
        check_optimizers([optimizer], network(), "SketchCallback")


def test_a_single_process_talks_to_nobody() -> None:
    ranks, value = Ranks(), object()
    assert ranks.share(value) == [value]
    assert list(ranks.collect([1, 2])) == [1, 2]
    ranks.agree(None)
    with pytest.raises(KeyError):
        ranks.agree(KeyError("mine"))
