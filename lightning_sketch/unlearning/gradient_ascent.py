"""Gradient ascent on the loss of the examples to forget, and what weighted ascent shares with it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_sketch.errors import ConfigurationError, check_choice, check_count
from lightning_sketch.unlearning.head import find_head
from lightning_sketch.unlearning.protocol import (
    Outcome,
    Run,
    Unlearner,
    check_number,
    check_positive,
)

Trainable = Literal["all", "head"]


class UniformWeights:
    """Every example counts one; ``details`` are those of the report."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.details: dict[str, Tensor] = {}

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch."""

    def of_batch(self, index: int) -> Tensor:
        """Return the weights of a batch to forget, ``(B,)``."""
        like = next(iter(self._run.parameters.values()))
        return like.new_ones(self._run.sizes["forget"][index])


class GradientAscent(Unlearner):
    """Ascend the mean loss of the examples to forget, all alike, by SGD.

    Ascent is not bounded by itself: give ``held_out`` examples to :meth:`unlearn`, and it stops after the first epoch
    in which the loss of the examples to forget reaches what the module had on those before, or takes no step where it
    is as large already; or ``max_change``. The report's ``stopped`` is ``"held_out"``, ``"max_change"`` or
    ``"epochs"``. Batches are those of the dataloader, in an order drawn anew for every epoch.

    Args:
        lr: learning rate.
        epochs: at most so many passes over the examples to forget.
        momentum: of SGD.
        weight_decay: of SGD.
        trainable: ``"all"`` parameters, or only those of the ``"head"``.
        head: name of the last linear layer; ``"auto"`` takes the ``nn.Linear`` that is called last.
        max_change: of all parameters together, relative to their norm: a step that leads further is shortened, and is
            the last. None is no bound.

    Raises:
        ConfigurationError: any argument that can not be right.
    """

    def __init__(
        self,
        *,
        lr: float = 0.01,
        epochs: int = 10,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trainable: Trainable = "all",
        head: str = "auto",
        max_change: float | None = None,
    ) -> None:
        check_positive(lr=lr)
        check_count("epochs", epochs)
        check_number("momentum", momentum, lambda v: 0 <= v < 1, "a number from 0 to below 1")
        check_number("weight_decay", weight_decay, lambda v: 0 <= v < float("inf"), "a number of at least 0")
        check_choice("trainable", trainable, ("all", "head"))
        if max_change is not None:
            check_positive(max_change=max_change)
        self.lr = lr
        self.epochs = epochs
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.trainable = trainable
        self.head = head
        self.max_change = max_change

    def _weights(self, run: Run, head: str | None) -> UniformWeights:
        return UniformWeights(run)

    def _penalty(self, head: nn.Module | None) -> Tensor | float:
        return 0.0

    def _head(self, run: Run) -> str | None:
        return find_head(run, self.head) if self.trainable == "head" else None

    def _change(self, run: Run) -> Outcome:
        head = self._head(run)
        layer = None if head is None else run.module.get_submodule(head)
        weights = self._weights(run, head)
        trained = list(run.parameters.values())
        if self.trainable == "head":
            assert layer is not None
            of_head = {id(p) for p in layer.parameters()}
            trained = [p for p in trained if id(p) in of_head]
            if not trained:
                raise ConfigurationError(
                    f"`trainable='head'`: no parameter of `{head}` requires a gradient: free it, or use 'all'."
                )
        chosen = {id(p) for p in trained}
        for p in run.module.parameters():
            p.requires_grad_(id(p) in chosen)  # no graph of what does not move
        optimizer = torch.optim.SGD(trained, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        enough = run.before.get("held_out")
        stopped = "epochs"
        history: list[float] = []
        steps = 0
        for epoch in run.follow(range(self.epochs), type(self).__name__):
            if enough is not None and (history or [run.before["forget"]])[-1] >= enough:
                stopped = "held_out"
                break
            weights.begin_epoch(epoch)
            for index in torch.randperm(len(run.forget), generator=run.generator).tolist():
                w = weights.of_batch(index)
                if not bool(w.any()):
                    continue
                losses = run.losses(run.forget[index])
                objective = -(w * losses).sum() / w.sum() + self._penalty(layer)
                for p, gradient in zip(
                    trained, torch.autograd.grad(objective, trained, allow_unused=True), strict=True
                ):
                    p.grad = gradient
                optimizer.step()
                steps += 1
                if self._exceeds(run):
                    stopped = "max_change"
                    break
            history.append(run.mean_loss(run.forget, "forget"))
            if stopped == "max_change":
                break
        else:
            if enough is not None and history[-1] >= enough:
                stopped = "held_out"
        return Outcome(steps, stopped, tuple(history), weights.details)

    def _exceeds(self, run: Run) -> bool:
        """Shorten the change to ``max_change`` if it is longer."""
        if self.max_change is None:
            return False
        change, size = run.change()
        if change <= self.max_change * size:
            return False
        run.scale_change(self.max_change * size / change)
        return True
