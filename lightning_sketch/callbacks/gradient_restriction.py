"""``GradientRestriction``: train so that no batch has a large gradient, and later deletions move the model little."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_sketch.callbacks.sketch import SketchCallback
from lightning_sketch.callbacks.stability import StabilityMonitor
from lightning_sketch.errors import ConfigurationError
from lightning_sketch.shadow.record import differentiable_kernels
from lightning_sketch.shadow.wrapping import check_optimizers, check_trainer

_SMALLEST = 1e-12  # under the root, whose derivative is infinite at 0


class GradientRestriction(pl.Callback):
    """Add ``alpha * ||g||`` to the training loss, where ``g`` is the gradient of the batch (Liu et al., *IAU*).

    The term of gradient restriction of arXiv 2507.23257, for which :class:`~lightning_sketch.unlearning.IAU` is meant.
    The loss that a step descends is ``l + alpha * sum_k sqrt(||dl/dp_k||^2 + 1e-12)``, summed over the parameter
    tensors ``p_k`` (the authors' code), or ``l + alpha * sqrt(sum_k ||dl/dp_k||^2 + 1e-12)`` for the global norm (their
    text). Its gradient is that of the loss and a Hessian times a unit vector, by a second backward pass, so a step
    costs two to three plain ones. It is added to ``.grad`` before the backward pass of the loss itself: what
    ``training_step`` returns and logs is unchanged, gradients are clipped with the term in them.

    With ``accumulate_grad_batches`` the loss of each batch, divided by their number, brings a term of its own, divided
    alike: it restricts the gradients of the batches that ``training_step`` sees, not that of their mean. So it does
    with several processes. With :class:`Reweight` in the same Trainer, training goes without some units under the same
    loss.

    Args:
        alpha: weight of the norm, at least 0; 0.005 in the authors' code.
        norm: ``"per_tensor"``, the sum of the norms of tensors, or ``"global"``, the norm of all together.

    Raises:
        ConfigurationError: at once, for an argument that can not be right; in ``setup``, for a Trainer that this can
            not be right for; or on a batch, if an operator has no second derivative.
    """

    def __init__(self, alpha: float = 0.005, norm: Literal["per_tensor", "global"] = "per_tensor") -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < float("inf"):
            raise ConfigurationError(f"`alpha` must be a number of at least 0 but is {alpha!r}.")
        if norm not in ("per_tensor", "global"):
            raise ConfigurationError(f"`norm` must be 'per_tensor' or 'global' but is {norm!r}.")
        self.alpha = alpha
        self.norm = norm
        self._kernels = ExitStack()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before training: refuses Trainers that this can not be right for."""
        if stage != "fit":
            return
        check_trainer(trainer, pl_module, "GradientRestriction")
        followers = [c for c in trainer.callbacks if isinstance(c, (SketchCallback, StabilityMonitor))]  # type: ignore[attr-defined]
        if followers:
            raise ConfigurationError(
                f"`callbacks` holds GradientRestriction and {type(followers[0]).__name__}, which follows the loss of "
                "`training_step` alone: give each a Trainer of its own, or add the term in `training_step`."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the first batch: looks at the optimizer, and asks for kernels with second derivatives."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        check_optimizers(trainer.optimizers, pl_module, "GradientRestriction", scaler)
        self._kernels.enter_context(differentiable_kernels(pl_module.modules()))

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Called with the loss of a batch, divided by the number of accumulated ones: adds the gradient of the term."""
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        # `loss` is the user's times this
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = (1.0 if scaler is None else scaler.get_scale()) / trainer.accumulate_grad_batches
        found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        squares = [(g / factor).square().sum() for g in found if g is not None]
        if self.norm == "global":
            squares = [torch.stack(squares).sum()]
        term = factor * self.alpha * torch.stack([(s + _SMALLEST).sqrt() for s in squares]).sum()
        if not term.requires_grad:  # a loss linear in the parameters has a constant gradient
            return
        _refuse_errors(term)
        try:
            extra = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if not any(words in str(error) for words in ("derivative", "differentiable", "double backward")):
                raise
            raise _no_second_derivative(str(error)) from error
        with torch.no_grad():
            for p, e in zip(parameters, extra, strict=True):
                if e is not None:
                    p.grad = e if p.grad is None else p.grad.add_(e)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called at the end: puts the choice of kernels back."""
        self._kernels.close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called where training fails, when Lightning calls no ``teardown``."""
        self._kernels.close()


def _refuse_errors(term: Tensor) -> None:
    """Refuse gradients of functions marked ``once_differentiable``, which autograd would take for constants.

    The node that raises has no way on to the parameters, so ``torch.autograd.grad`` does not come to it.
    """
    waiting, seen = [term.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise _no_second_derivative("a torch.autograd.Function is marked `once_differentiable`")
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)


def _no_second_derivative(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"GradientRestriction needs second derivatives, which an operator of the model lacks ({reason}): replace it, "
        "or leave the callback out."
    )
