"""``IAU``: a step against the examples to forget, corrected by the retained ones (Liu et al., arXiv 2507.23257)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sketch.errors import ConfigurationError, check_choice, check_count
from lightning_sketch.shadow.weighting import PerExampleLoss
from lightning_sketch.unlearning.protocol import (
    Outcome,
    Run,
    Unlearner,
    check_number,
    check_positive,
    norm,
)


@dataclass(frozen=True, eq=False, repr=False)
class TotalGradient:
    """Gradient of the sum of all training losses of a model, from :func:`total_gradient`.

    Args:
        gradients: by the name of each parameter that requires a gradient, in its shape.
        num_examples: ``n``, how many losses were summed.
        parameters: SHA-256 of the parameters at which it was taken.
    """

    gradients: Mapping[str, Tensor]
    num_examples: int
    parameters: str

    def __repr__(self) -> str:
        return f"TotalGradient({self.num_examples} examples, norm={norm(self.gradients.values()):.4g})"


def total_gradient(
    module: nn.Module,
    data: Any,
    *,
    loss: Literal["auto"] | PerExampleLoss = "auto",
    progress: bool | None = None,
) -> TotalGradient:
    """Return the gradient of the sum of the losses of ``data``, batch by batch, in evaluation mode.

    With that of the whole training set, :class:`IAU` answers the first request to forget without the retained data.

    Args:
        module: the trained module; it is left as it was.
        data: a batch or a DataLoader of the training set, every example once.
        loss: as in :meth:`Unlearner.unlearn`.
        progress: likewise.

    Raises:
        ConfigurationError: if ``data`` is empty.
        InstabilityError: if the loss is not finite.
    """
    pass_over = _Pass()
    pass_over.unlearn(module, data, loss=loss, progress=progress)
    assert pass_over.found is not None
    return pass_over.found


class _Pass(Unlearner):
    """Changes nothing."""

    found: TotalGradient | None = None

    def _change(self, run: Run) -> Outcome:
        gradients, count = run.summed_gradient(run.forget, "total gradient")
        self.found = TotalGradient(gradients, count, _digest(run.module))
        return Outcome(0, "done")


class IAU(Unlearner):
    """Influence approximation unlearning (Liu et al., arXiv 2507.23257): a few steps of first order.

    Each step descends ``G = correction * g_r - g_f``, with the gradients of the loss of the retained examples and of
    those to forget, each a ``"mean"`` (the authors' code) or a ``"sum"``: to forget an example is to learn one of the
    opposite gradient, and the correction keeps the others learnt. The update is

    - ``"adam_sign"``: ``-lr * sign(G)``, the first step of a new Adam, which moves every parameter by ``lr``, whatever
      the number of examples;
    - ``"sgd"``: ``-lr * G``. With ``"sum"``, ``lr`` near ``1 / (n * curvature)`` is the scale of influence.

    The report's ``details`` hold, from the last step, ``forget_gradient_norm``, ``retain_gradient_norm`` and ``cosine``
    (between the two gradients), scalars.

    Args:
        lr: see above.
        update: ``"adam_sign"`` or ``"sgd"``.
        normalise: ``"mean"`` or ``"sum"``.
        correction: weight of the retained examples' gradient; 0 needs none of them.
        steps: how many; gradients are taken anew before each.
        max_norm: of the change of all parameters, which is shortened to it; None is no bound.
        total_gradient: that of the whole training set at the parameters of the module, from :func:`total_gradient`:
            what ``forget`` leaves of it takes the place of ``retain``. For one step.

    Raises:
        ConfigurationError: any argument that can not be right.
    """

    def __init__(
        self,
        *,
        lr: float = 1e-3,
        update: Literal["adam_sign", "sgd"] = "adam_sign",
        normalise: Literal["mean", "sum"] = "mean",
        correction: float = 1.0,
        steps: int = 1,
        max_norm: float | None = None,
        total_gradient: TotalGradient | None = None,
    ) -> None:
        check_positive(lr=lr)
        check_choice("update", update, ("adam_sign", "sgd"))
        check_choice("normalise", normalise, ("mean", "sum"))
        check_number("correction", correction, lambda v: 0 <= v < float("inf"), "a number of at least 0")
        check_count("steps", steps)
        if max_norm is not None:
            check_positive(max_norm=max_norm)
        if total_gradient is not None and steps > 1:
            raise ConfigurationError(
                "`total_gradient` is that of the parameters before the first step: use `steps=1`, or give `retain`."
            )
        self.lr = lr
        self.update = update
        self.normalise = normalise
        self.correction = correction
        self.steps = steps
        self.max_norm = max_norm
        self.total_gradient = total_gradient

    def _change(self, run: Run) -> Outcome:
        if self.correction and self.total_gradient is None and run.retain is None:
            raise ConfigurationError(
                "`retain` is None: IAU needs the retained examples, or `total_gradient` of the training set, or "
                "`correction=0`."
            )
        details: dict[str, Tensor] = {}
        for _ in run.follow(range(self.steps), "IAU"):
            forget, num_forget = run.summed_gradient(run.forget, "forget")
            retain, num_retain = self._retained(run, forget, num_forget)
            if self.normalise == "mean":
                forget = {name: g / num_forget for name, g in forget.items()}
                retain = {name: g / num_retain for name, g in retain.items()}
            with torch.no_grad():
                for name, p in run.parameters.items():
                    step = self.correction * retain[name] - forget[name]
                    p.sub_(self.lr * (step.sign() if self.update == "adam_sign" else step))
            details = _compare(forget, retain)
            change, _ = run.change()
            if self.max_norm is not None and change > self.max_norm:
                run.scale_change(self.max_norm / change)
        return Outcome(self.steps, "steps", details=details)

    def _retained(self, run: Run, forget: Mapping[str, Tensor], num_forget: int) -> tuple[dict[str, Tensor], int]:
        """Return the summed gradient of the retained examples and their number."""
        if not self.correction:
            return {name: torch.zeros_like(g) for name, g in forget.items()}, 1
        total = self.total_gradient
        if total is None:
            assert run.retain is not None
            return run.summed_gradient(run.retain, "retain")
        if total.parameters != _digest(run.module) or total.gradients.keys() != forget.keys():
            raise ConfigurationError(
                "`total_gradient` was taken at other parameters than those of `module`: take it anew, or give `retain`."
            )
        left = total.num_examples - num_forget
        if left <= 0:
            raise ConfigurationError(
                f"`forget` has {num_forget} examples, and `total_gradient` is of {total.num_examples}: it must be of "
                "the whole training set, and some of it must be left."
            )
        return {name: total.gradients[name].to(g) - g for name, g in forget.items()}, left


def _compare(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    product = sum(float((g.double() * retain[name].double()).sum()) for name, g in forget.items())
    sizes = norm(forget.values()), norm(retain.values())
    cosine = product / (sizes[0] * sizes[1]) if sizes[0] * sizes[1] else 0.0
    values = {"forget_gradient_norm": sizes[0], "retain_gradient_norm": sizes[1], "cosine": cosine}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def _digest(module: nn.Module) -> str:
    """SHA-256 over all parameters, by name."""
    total = hashlib.sha256()
    for name, p in module.named_parameters():
        total.update(name.encode())
        total.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
