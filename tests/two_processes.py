"""What each of two processes of a DDP run does for callbacks/test_processes.py, which starts them on this file.

    LOCAL_RANK=0 WORLD_SIZE=2 ... python two_processes.py DIRECTORY

Every case leaves its files in a folder of its own, by rank where both have something to tell.
"""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FEATURES, Classifier, data, fit, network, overflowing, scaled
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sketch import GradientRestriction, Reweight, SketchCallback, StabilityMonitor, StableAdamW
from lightning_sketch.callbacks.stability import Measurement
from lightning_sketch.errors import LightningSketchError

RANK = int(os.environ.get("LOCAL_RANK", 0))
EXAMPLES = 24
STEP = 1e-5  # of the finite differences
DDP: dict[str, Any] = {"devices": 2, "strategy": "ddp"}


def directions(count: int = 5, units: int = EXAMPLES) -> np.ndarray:
    """Complex directions, every second one real."""
    generator = np.random.default_rng(0)
    drawn = generator.normal(size=(count, units)) + 1j * generator.normal(size=(count, units))
    drawn[::2] = drawn[::2].real
    return drawn


class Momentum(Classifier):
    """Its global batches give the same numbers on any number of processes."""

    def __init__(self) -> None:
        super().__init__(network())
        self.double()


class Difficult(Classifier):
    """Other random numbers and other batch statistics on every process, schedules, and a part that is not trained."""

    def __init__(self) -> None:
        net = nn.Sequential(
            nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 6), nn.Linear(6, 3)
        )
        super().__init__(net)
        net[4].requires_grad_(False)
        self.double()

    def on_train_start(self) -> None:
        torch.manual_seed(100 + RANK)
        np.random.seed(200 + RANK)
        random.seed(300 + RANK)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch["x"].transpose(0, 1), batch["y"]  # not in the order of its memory
        x = x + 0.1 * np.random.normal() + 0.1 * random.random() + 0.1 * torch.rand_like(x)
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, sync_dist=True)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self.net(batch["x"].transpose(0, 1)), batch["y"]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = StableAdamW(self.parameters(), lr=0.02, eps=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Overflows(Difficult):
    """In one batch of each epoch scaled gradients of the second process overflow, so that both skip the step."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch["x"].transpose(0, 1), batch["y"]
        logits = self.net(x + 0.1 * torch.rand_like(x))
        return {"loss": F.cross_entropy(overflowing(logits) if batch["rank"] and batch_idx == 1 else logits, y)}


class Uneven:
    """Batch sampler of one process: the last of its batches is smaller on the second."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng(self.epoch).permutation(EXAMPLES).tolist()
        self.epoch += 1
        yield from (order[:4], order[4:8], order[8:13]) if RANK == 0 else (order[13:17], order[17:21], order[21:])

    def __len__(self) -> int:
        return 3


def transposed(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    x, y = (torch.stack(part) for part in zip(*examples, strict=True))
    return {"x": x.t().contiguous(), "y": y, "names": ["of examples"] * len(y), "rank": RANK}


def uneven() -> DataLoader:
    return DataLoader(data(EXAMPLES), batch_sampler=Uneven(), collate_fn=transposed)


def difficult(callbacks: list[pl.Callback], kind: type[Difficult] = Difficult, **options: Any) -> pl.LightningModule:
    given = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "val_check_interval": 2, **DDP, **options}
    val = DataLoader(data(8, seed=5), 4, collate_fn=transposed)
    return fit(kind, callbacks, uneven(), val=val, epochs=3, use_distributed_sampler=False, **given)[0]


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items() if t.dtype.is_floating_point}


def loader(batch_size: int = 3) -> DataLoader:
    return DataLoader(data(EXAMPLES), batch_size=batch_size)


def same_global_batches(folder: Path) -> None:
    fit(Momentum, [SketchCallback(folder / "sketch", directions(), 3)], loader(), **DDP)


def again(folder: Path) -> None:
    """The case before, on other directions, by a callback that has seen another run."""
    callback = SketchCallback(folder / "sketch", 2, 1)
    fit(Momentum, [callback], loader(), epochs=1, **DDP)
    fit(Momentum, [callback], loader(), **DDP)


def against_retraining(folder: Path) -> None:
    psi = directions(3)[::2].real
    module = difficult([SketchCallback(folder / "sketch", psi, 2)])
    torch.save(tensors(module), folder / f"final-{RANK}.pt")
    for k, direction in enumerate(psi):
        runs = [difficult([Reweight(weights=list(x * STEP * direction))]) for x in (1, -1)]
        plus, minus = map(tensors, runs)
        torch.save({n: (t - minus[n]) / (2 * STEP) for n, t in plus.items()}, folder / f"difference-{RANK}-{k}.pt")


def skipped_steps(folder: Path) -> None:
    psi = directions(1).real
    options: dict[str, Any] = {"kind": Overflows, "accumulate_grad_batches": 1}
    difficult([SketchCallback(folder / "sketch", psi, 2)], **options, **scaled())
    runs = [difficult([Reweight(weights=list(x * STEP * psi[0]))], **options, **scaled()) for x in (1, -1)]
    plus, minus = map(tensors, runs)
    torch.save({n: (t - minus[n]) / (2 * STEP) for n, t in plus.items()}, folder / f"difference-{RANK}-0.pt")


def unchanged_run(folder: Path) -> None:
    for name in ("with", "without"):
        callbacks = [SketchCallback(folder / "sketch", directions(2), 1)] if name == "with" else []
        logger = CSVLogger(folder, name="", version=name)
        module = difficult(callbacks, logger=logger, log_every_n_steps=1)
        state = {**tensors(module), "random": torch.rand(3)}
        torch.save(state, folder / f"{name}-{RANK}.pt")


def resumed(folder: Path) -> None:
    for name, epochs, checkpoint in (("whole", 3, None), ("first", 1, None), ("rest", 3, folder / "first.ckpt")):
        saving = ModelCheckpoint(folder, filename=name)
        callbacks = [SketchCallback(folder / name, directions(5), 2, directions_per_pass=2), saving]
        options = {"epochs": epochs, "checkpoint": checkpoint, "enable_checkpointing": True, **DDP}
        fit(Momentum, callbacks, loader(), **options)


def fewer_directions_than_processes(folder: Path) -> None:
    fit(Momentum, [SketchCallback(folder / "sketch", directions(1), 1)], loader(), **DDP)


def unused_parameters(folder: Path) -> None:
    class Unused(Momentum):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3).double()
            self.never = nn.Linear(3, 3).double()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.net(batch[0])
            return F.cross_entropy(self.head(logits) if batch_idx % 2 else logits, batch[1])

    fit(
        Unused,
        [SketchCallback(folder / "sketch", directions(2), 1)],
        loader(),
        devices=2,
        strategy="ddp_find_unused_parameters_true",
    )


def instability_of_one(folder: Path) -> None:
    class Explosion(pl.Callback):
        """What a direction of one process does before the third step."""

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            (callback,) = (c for c in trainer.callbacks if isinstance(c, SketchCallback))
            if RANK == 1 and trainer.global_step == 2:
                for block in callback._blocks[0].params.values():
                    block.fill_(float("inf"))

    for policy in ("warn", "stop"):
        callbacks = [SketchCallback(folder / policy, directions(2), 1, on_instability=policy), Explosion()]
        with told(folder / f"{policy}-{RANK}.txt"):
            module = fit(Momentum, callbacks, loader(), **DDP)[0]
            torch.save(tensors(module), folder / f"{policy}-{RANK}.pt")


def unwritable(folder: Path) -> None:
    (folder / "file").write_text("")
    with told(folder / f"setup-{RANK}.txt"):
        fit(Momentum, [SketchCallback(folder / "file" / "sketch", directions(2), 1)], loader(), **DDP)

    class Occupied(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if RANK == 0:
                (folder / "sketch").rmdir()
                (folder / "sketch").write_text("")

    with told(folder / f"end-{RANK}.txt"):
        callback = SketchCallback(folder / "sketch", directions(4), 1, directions_per_pass=1)
        fit(Momentum, [Occupied(), callback], loader(), **DDP)


def communicating(folder: Path) -> None:
    class Gathering(Momentum):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            others = self.all_gather(self.net(x), sync_grads=True)
            return F.cross_entropy(self.net(x) + others.mean((0, 1)), y)

    with told(folder / f"told-{RANK}.txt"):
        fit(Gathering, [SketchCallback(folder / "sketch", directions(2), 1)], loader(), **DDP)


def synchronized_batch_norm(folder: Path) -> None:
    with told(folder / f"told-{RANK}.txt"):
        callback = SketchCallback(folder / "sketch", directions(2), 1)
        fit(Momentum, [callback], loader(), sync_batchnorm=True, **DDP)


def fixed_losses(module: Any, batch: Any) -> Tensor:
    x, y = data(8, seed=5)[:]
    return F.cross_entropy(module.net(x), y, reduction="none")


def monitor(window: int | None) -> StabilityMonitor:
    return StabilityMonitor(3, window, degree=2, output=fixed_losses)


def numbers(history: list[Measurement]) -> Tensor:
    return torch.tensor([[m.step, m.parameter_sensitivity, m.profile.spread, *m.profile.log2_norms] for m in history])


def monitored(folder: Path) -> None:
    for window in (2, None):
        callback = monitor(window)
        trainer = fit(Momentum, [callback], loader(), **DDP)[1]
        logged = trainer.callback_metrics["stability/log2_norm_order_2"]
        torch.save((numbers(callback.history), logged), folder / f"{window}-{RANK}.pt")


def restricted(folder: Path) -> None:
    module = fit(Momentum, [GradientRestriction(0.3)], loader(), accumulate_grad_batches=2, **DDP)[0]
    torch.save(tensors(module), folder / f"final-{RANK}.pt")


class told:
    """Writes down the error that its block raises."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        if error is None:
            self.path.write_text("no error")
            return False
        self.path.write_text(f"{kind.__name__}: {error}")
        return isinstance(error, LightningSketchError)


CASES = [
    same_global_batches,
    again,
    against_retraining,
    skipped_steps,
    unchanged_run,
    resumed,
    fewer_directions_than_processes,
    unused_parameters,
    instability_of_one,
    unwritable,
    communicating,
    synchronized_batch_norm,
    monitored,
    restricted,
]

if __name__ == "__main__":
    for case in CASES:
        if len(sys.argv) > 2 and case.__name__ not in sys.argv[2:]:
            continue
        folder = Path(sys.argv[1]) / case.__name__
        folder.mkdir(parents=True, exist_ok=True)
        print(case.__name__, flush=True)
        case(folder)
    dist.destroy_process_group()  # what is left of it may abort a process that ends
