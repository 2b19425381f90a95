"""Runs of which single examples are deleted and which are really retrained: digits, and names."""

import copy
import random
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from models import QUIET
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import StableAdamW

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from microgpt import BOS, IGNORED, MicroGPT, NamesDataset

Examples = tuple[Tensor, Tensor]  # inputs and targets


def example_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every example, ``(B,)``: the mean over its positions where it has several."""
    losses = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none", ignore_index=IGNORED)
    return losses if losses.ndim == 1 else losses.sum(1) / (targets != IGNORED).sum(1)


class DigitsNet(pl.LightningModule):
    """Two layers, 64-32-10."""

    def __init__(self, optimizer: str, steps: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.optimizer, self.steps = optimizer, steps

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            return {"optimizer": torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)}
        optimizer = StableAdamW(self.parameters(), lr=0.01, betas=(0.85, 0.99), eps=1e-3, weight_decay=0)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


class NamesNet(MicroGPT):
    """The transformer of the paper, 4,192 parameters, on batches ``(inputs, targets, index)`` of one name."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=IGNORED)


def make_module(name: str, optimizer: str, steps: int) -> pl.LightningModule:
    """Return the module of the study ``"digits"`` or ``"names"``, as yet untrained."""
    return DigitsNet(optimizer, steps) if name == "digits" else NamesNet(steps)


class Record(pl.Callback):
    """The rows of every batch, and parameters and learning rate before it."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(batch[2].clone())
        self.states.append({name: p.detach().clone() for name, p in module.named_parameters()})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class Study:
    """The data, the run, the deletions of every size and their truths.

    Args:
        name: ``"digits"`` or ``"names"``.
        train: what is trained on, every example a unit.
        test: the examples whose losses are the outputs.
        batch: examples in a batch.
        epochs: of the run.
        sizes: of the deleted sets.
        num_sets: of each size.
        optimizer: ``"adam"`` or ``"sgd"``; names are trained by the former.
    """

    def __init__(
        self,
        name: str,
        train: Examples,
        test: Examples,
        batch: int,
        epochs: int,
        sizes: tuple[int, ...],
        num_sets: int,
        optimizer: str = "adam",
    ) -> None:
        units = len(train[0])
        self.name, self.batch, self.epochs, self.optimizer = name, batch, epochs, optimizer
        self.train, self.test = TensorDataset(*train, torch.arange(units)), test
        self.steps = epochs * units // batch
        self.record = Record()
        module = self.fit(self.record)
        rng = np.random.default_rng(1)
        self.sets = {size: np.zeros((num_sets, units)) for size in sizes}
        for size, deleted in self.sets.items():
            for row in deleted:
                row[rng.choice(units, size, replace=False)] = 1
        self.trained = {n: p.detach().clone() for n, p in module.named_parameters()}
        self.num_sets = len(sizes) * num_sets
        losses = self.retrain(np.concatenate([np.zeros((1, units)), *self.sets.values()]))
        self.baseline = losses[0]
        with torch.no_grad():
            torch.testing.assert_close(self.baseline, example_losses(module(test[0]), test[1]))
        self.truth = dict(zip(sizes, (losses[1:] - losses[0]).reshape(len(sizes), num_sets, -1), strict=True))

    def fit(self, *callbacks: pl.Callback) -> pl.LightningModule:
        """The run, always the same."""
        pl.seed_everything(0, verbose=False)
        module = make_module(self.name, self.optimizer, self.steps)
        trainer = pl.Trainer(
            max_epochs=self.epochs, accelerator="cpu", precision="64-true", callbacks=list(callbacks), **QUIET
        )
        trainer.fit(module, DataLoader(self.train, batch_size=self.batch, shuffle=True))
        return module

    def retrain(self, deleted: np.ndarray) -> Tensor:
        """Train once for each row of deletion weights, all together; return the test losses, ``(D, outputs)``."""
        module = make_module(self.name, self.optimizer, self.steps).double()
        params = {n: p.expand(len(deleted), *p.shape).clone() for n, p in self.record.states[0].items()}
        flat = [nn.Parameter(p) for p in params.values()]
        twin = copy.copy(module)
        twin.parameters = lambda *_, **__: iter(flat)  # type: ignore[method-assign]
        made = twin.configure_optimizers()
        weights = torch.from_numpy(1 - deleted)

        def losses(p: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return example_losses(functional_call(module, p, (inputs,)), targets)

        def loss(p: dict[str, Tensor], weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
            return (losses(p, inputs, targets) * weights).mean()

        def named() -> dict[str, Tensor]:
            return {n: p.detach() for n, p in zip(params, flat, strict=True)}

        for rows in self.record.rows:
            inputs, targets, _ = self.train[rows]
            gradients = vmap(grad(loss), in_dims=(0, 0, None, None))(named(), weights[:, rows], inputs, targets)
            for p, g in zip(flat, gradients.values(), strict=True):
                p.grad = g
            made["optimizer"].step()
            if "lr_scheduler" in made:
                made["lr_scheduler"]["scheduler"].step()
        return vmap(losses, in_dims=(0, None, None))(named(), *self.test)


def digits(optimizer: str, epochs: int, num_sets: int) -> Study:
    """1,000 digits in batches of 50; the outputs are the losses of 200 others."""
    inputs, targets = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(inputs))[:1200]
    x, y = torch.tensor(inputs[order] / 16), torch.tensor(targets[order])
    train, test = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    return Study("digits", train, test, 50, epochs, (1, 5, 20, 100), num_sets, optimizer)


def names(path: Path, count: int, num_sets: int) -> Study:
    """``count`` names, one a step, each once; the outputs are the losses of 50 others."""
    chosen = random.Random(42).sample(path.read_text(encoding="utf-8").split(), count + 50)
    tokens = pad_sequence(list(NamesDataset(chosen)), batch_first=True, padding_value=IGNORED)
    inputs, targets = tokens[:, :-1].masked_fill(tokens[:, :-1] == IGNORED, BOS), tokens[:, 1:]
    train, test = (inputs[:count], targets[:count]), (inputs[count:], targets[count:])
    return Study("names", train, test, 1, 1, (1, 5, 20), num_sets)
