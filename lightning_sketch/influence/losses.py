"""Losses of one example as functions of its outputs: gradient, Hessian and a square root of the Hessian.

The table is that of dual influence functions (arXiv 2605.11239); every loss is convex in the outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.nn.functional import cross_entropy, one_hot, softplus

from lightning_sketch.errors import ConfigurationError

Derivative = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Loss:
    """A convex loss ``l(f, y)`` with its derivatives in the outputs ``f``, for ``n`` examples of ``C`` outputs.

    All functions take outputs ``(n, C)``, float64, and what ``targets`` returned.

    Args:
        value: ``l``, ``(n,)``.
        gradient: ``dl/df``, ``(n, C)``.
        hessian: ``d2l/df2``, ``(n, C, C)``, positive semidefinite.
        root: ``(n, C, C)``, a matrix ``S`` with ``S S' = H``.
        targets: brings targets into the form that the other functions take; called with the targets and the outputs.
        quadratic: whether the Hessian is the identity.
    """

    value: Derivative
    gradient: Derivative
    hessian: Derivative
    root: Derivative
    targets: Callable[[Tensor, Tensor], Tensor]
    quadratic: bool = False


def _of_each_output(value: Derivative, first: Derivative, second: Derivative, **rest: Any) -> Loss:
    """Return the loss that sums a function of one output over the outputs, from its two derivatives."""
    return Loss(
        value=lambda f, y: value(f, y).sum(dim=1),
        gradient=first,
        hessian=lambda f, y: torch.diag_embed(second(f, y)),
        root=lambda f, y: torch.diag_embed(second(f, y).sqrt()),
        **rest,
    )


def _numbers(targets: Tensor, outputs: Tensor) -> Tensor:
    if targets.numel() != outputs.numel():
        raise ConfigurationError(
            f"`targets` has shape {tuple(targets.shape)}: give one for each of the outputs {tuple(outputs.shape)}."
        )
    return targets.to(outputs).reshape(outputs.shape)


def _zeros_and_ones(targets: Tensor, outputs: Tensor) -> Tensor:
    y = _numbers(targets, outputs)
    if not ((y == 0) | (y == 1)).all():
        raise ConfigurationError("`targets` of the loss 'logistic' must be 0 or 1: map the two classes to them.")
    return y


def _counts(targets: Tensor, outputs: Tensor) -> Tensor:
    y = _numbers(targets, outputs)
    if not (y >= 0).all():
        raise ConfigurationError("`targets` of the loss 'poisson' must be counts: give numbers of at least 0.")
    return y


def _classes(targets: Tensor, outputs: Tensor) -> Tensor:
    classes = outputs.shape[1]
    y = targets.to(outputs.device).long()
    if y.shape != outputs.shape[:1] or not ((y == targets.to(y.device)) & (y >= 0) & (y < classes)).all():
        raise ConfigurationError(
            f"`targets` of the loss 'softmax' must be {len(outputs)} classes from 0 to {classes - 1} but are "
            f"{targets.dtype} of shape {tuple(targets.shape)}: give class indices."
        )
    return y


def _softmax_root(f: Tensor, y: Tensor) -> Tensor:
    """``S = diag(sqrt p) - p sqrt(p)'``: ``S S' = diag p - 2 p p' + p (1'p) p' = diag p - p p'``."""
    p = f.softmax(dim=1)
    return torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]


def _softmax_hessian(f: Tensor, y: Tensor) -> Tensor:
    p = f.softmax(dim=1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


LOSSES: dict[str, Loss] = {
    "squared": _of_each_output(
        lambda f, y: (f - y).square() / 2,
        lambda f, y: f - y,
        lambda f, y: torch.ones_like(f),
        targets=_numbers,
        quadratic=True,
    ),
    "softmax": Loss(
        value=lambda f, y: cross_entropy(f, y, reduction="none"),
        gradient=lambda f, y: f.softmax(dim=1) - one_hot(y, f.shape[1]),
        hessian=_softmax_hessian,
        root=_softmax_root,
        targets=_classes,
    ),
    "logistic": _of_each_output(
        lambda f, y: softplus(f) - y * f,
        lambda f, y: f.sigmoid() - y,
        lambda f, y: f.sigmoid() * (-f).sigmoid(),
        targets=_zeros_and_ones,
    ),
    "poisson": _of_each_output(  # up to log y!, which no output moves
        lambda f, y: f.exp() - y * f, lambda f, y: f.exp() - y, lambda f, y: f.exp(), targets=_counts
    ),
}


def autograd_loss(function: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """Return a convex loss whose derivatives are taken by automatic differentiation.

    Args:
        function: of the outputs of one example, ``(C,)`` float64, and of its target; returns a scalar. It must be
            convex in the outputs: its Hessian is refused where it is not positive semidefinite.
    """

    def targets(y: Tensor, f: Tensor) -> Tensor:
        if y.ndim == 0 or len(y) != len(f):
            raise ConfigurationError(f"`targets` has shape {tuple(y.shape)}: give {len(f)} rows, one per example.")
        return y.to(f if y.is_floating_point() else f.device)

    def checked_hessian(f: Tensor, y: Tensor) -> Tensor:
        found = vmap(jacrev(jacrev(function)))(f, y)
        lowest = torch.linalg.eigvalsh(found)[:, 0]
        if not (lowest >= -1e-8 * (1 + found.abs().amax(dim=(1, 2)))).all():
            raise ConfigurationError(
                f"`loss` is not convex in the outputs of example {int(lowest.argmin())}: its Hessian has the "
                f"eigenvalue {float(lowest.min()):.3g}; give a loss that is."
            )
        return found

    def root(f: Tensor, y: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(checked_hessian(f, y))
        return vectors * values.clamp(min=0).sqrt()[:, None, :]

    return Loss(
        value=lambda f, y: vmap(function)(f, y),
        gradient=lambda f, y: vmap(grad(function))(f, y),
        hessian=checked_hessian,
        root=root,
        targets=targets,
    )


def resolve_loss(loss: str | Callable[[Tensor, Tensor], Tensor] | Loss) -> Loss:
    """Return the loss of that name, the given one, or that of a function (:func:`autograd_loss`).

    Raises:
        ConfigurationError: an unknown name.
    """
    if isinstance(loss, Loss):
        return loss
    if callable(loss):
        return autograd_loss(loss)
    if loss not in LOSSES:
        names = ", ".join(repr(name) for name in LOSSES)
        raise ConfigurationError(f"`loss` is {loss!r}: give {names}, or callable(outputs, target) -> scalar.")
    return LOSSES[loss]
