"""Per-example weights into the user's loss.

Example ``i`` enters with weight ``w_i``, normalised over the whole batch (``"batch"``: ``(1/B) sum_i w_i l_i``) or over
what is left of it (``"remaining"``: ``sum_i w_i l_i / sum_i w_i``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_sketch.errors import ConfigurationError

Normalization = Literal["batch", "remaining"]
PerExampleLoss = Callable[[Any, Any], Tensor]

# Losses whose mean is a plain or a class-weighted mean of their elements, with the examples along dimension 0
_WEIGHTABLE = frozenset(
    {
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.cosine_embedding_loss,
        F.cross_entropy,
        F.gaussian_nll_loss,
        F.hinge_embedding_loss,
        F.huber_loss,
        F.kl_div,
        F.l1_loss,
        F.margin_ranking_loss,
        F.mse_loss,
        F.multi_margin_loss,
        F.multilabel_margin_loss,
        F.multilabel_soft_margin_loss,
        F.nll_loss,
        F.poisson_nll_loss,
        F.smooth_l1_loss,
        F.soft_margin_loss,
        F.triplet_margin_loss,
    }
)
# Those whose mean divides by the sum of `weight`. (huber_loss divides by the number of elements, like
# binary_cross_entropy; l1_loss hides `weight` from every TorchFunctionMode, so the check of the first batch refuses
# it.)
_ELEMENT_WEIGHTED = frozenset({F.mse_loss, F.l1_loss})
REMEDY = "give `loss=callable(module, batch) -> (B,) per-example losses whose mean is the training loss`"


def check_normalization(normalization: str) -> Normalization:
    """Return ``normalization`` if it is known.

    Raises:
        ConfigurationError: if it is not.
    """
    if normalization not in ("batch", "remaining"):
        raise ConfigurationError(f"`normalization` must be 'batch' or 'remaining' but is {normalization!r}.")
    return normalization  # type: ignore[return-value]


class WeightedReductions(TorchFunctionMode):
    """While active, the reductions of ``torch.nn.functional`` losses weight their examples.

    Args:
        weights: shape ``(B,)``; may require grad, and may be a JetTensor.
        normalization: what the mean of a weighted batch divides by.
    """

    def __init__(self, weights: Tensor, normalization: Normalization) -> None:
        super().__init__()
        self.weights = weights
        self.normalization = normalization
        self.terms: list[Tensor] = []  # unweighted elements of every loss that was intercepted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Weight the loss functions; pass everything else on."""
        kwargs = kwargs or {}
        if func not in _WEIGHTABLE:
            return func(*args, **kwargs)
        return self._weighted(func, args, kwargs)

    def _weighted(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if given.get("size_average") is not None or given.get("reduce") is not None:
            raise ConfigurationError(
                f"`{func.__name__}` is called with `size_average` or `reduce`, which torch has deprecated: use "
                "`reduction`."
            )
        reduction, given["reduction"] = given["reduction"], "none"
        elements: Tensor = func(*bound.args, **bound.kwargs)
        weights = self._like(elements)
        if weights is None:  # not one entry per example: a term that belongs to no example
            given["reduction"] = reduction
            return func(*bound.args, **bound.kwargs)
        self.terms.append(elements.detach())
        weighted = elements * weights
        if reduction == "mean":
            return weighted.sum() / self._denominator(func, given, elements, weights)
        if self.normalization == "remaining":
            raise ConfigurationError(
                f"`normalization='remaining'` needs a loss that averages, but `{func.__name__}` is called with "
                f"reduction={reduction!r}: {REMEDY}, or use normalization='batch'."
            )
        if reduction == "none":
            return weighted
        total = weighted.sum()
        return total / given["input"].shape[0] if reduction == "batchmean" else total

    def _like(self, elements: Tensor) -> Tensor | None:
        """Return the weights in the shape of ``elements``, ``None`` if their first dimension is not of examples."""
        batch = self.weights.shape[0]
        if elements.ndim == 0:
            return self.weights.squeeze(0) if batch == 1 else None
        if elements.shape[0] == 0 or elements.shape[0] % batch:
            return None
        each = elements.shape[0] // batch  # > 1 where the user flattened (B, T) to (B T,)
        weights = self.weights.unsqueeze(1).expand(batch, each).reshape(-1)
        return weights.reshape(-1, *[1] * (elements.ndim - 1)).to(elements.dtype)

    def _denominator(self, func: Any, given: dict[str, Any], elements: Tensor, weights: Tensor) -> Any:
        share = _shares(func, given, elements)
        if self.normalization == "batch":
            return elements.numel() if share is None else share.sum()
        return (weights.expand(elements.shape) if share is None else weights * share).sum()


def _shares(func: Any, given: dict[str, Any], elements: Tensor) -> Tensor | None:
    """What every element counts in the mean of ``func``, or ``None`` where each counts one."""
    if func in _ELEMENT_WEIGHTED:
        weight = given.get("weight")
        return None if weight is None else weight.expand(elements.shape)
    if func not in (F.cross_entropy, F.nll_loss):
        return None
    target = given["target"]
    if target.dtype.is_floating_point:  # class probabilities: a plain mean
        return None
    kept = target != given["ignore_index"]
    if given["weight"] is None:
        return kept.to(elements.dtype)
    return given["weight"][torch.where(kept, target, 0)] * kept


def refuse_unweighted(mode: WeightedReductions, outputs: Any) -> None:
    """Refuse a training step that made no loss in which ``mode`` found the examples.

    Raises:
        ConfigurationError: naming the remedy.
    """
    if not mode.terms and training_loss(outputs) is not None:
        raise ConfigurationError(
            "`loss='auto'` found no torch.nn.functional loss with one entry per example inside `training_step`: "
            f"{REMEDY}, or define `per_example_loss(batch)` on the module."
        )


def training_loss(outputs: Any) -> Tensor | None:
    """Return the loss in what a ``training_step`` returned: a tensor, a mapping with ``"loss"``, or ``None``."""
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs


class LossWeighting:
    """How example weights enter the training loss of a module.

    Args:
        loss: ``"auto"`` (the module's ``per_example_loss(batch)`` method if it has one, else the reductions of
            ``torch.nn.functional`` losses inside ``training_step``), or ``callable(module, batch) -> (B,)`` losses
            whose mean is the training loss.
        normalization: ``"batch"`` or ``"remaining"``.

    Raises:
        ConfigurationError: if an argument is neither.
    """

    def __init__(self, loss: Literal["auto"] | PerExampleLoss, normalization: str) -> None:
        if loss != "auto" and not callable(loss):
            raise ConfigurationError(f"`loss` must be 'auto' or a callable(module, batch) -> (B,) but is {loss!r}.")
        self.loss = loss
        self.normalization = check_normalization(normalization)

    def __call__(self, module: Any, training_step: Callable[..., Any], args: tuple[Any, ...], weights: Tensor) -> Any:
        """Return what ``training_step`` returns, with the loss weighted.

        Args:
            module: the LightningModule, or one with its tensors replaced.
            training_step: its unwrapped training step.
            args: what the training step is called with; the batch first.
            weights: shape ``(B,)``.

        Raises:
            ConfigurationError: if the loss cannot be weighted.
        """
        function = self.per_example(module)
        if function is not None:
            losses = function(module, args[0])
            if losses.shape != weights.shape:
                raise ConfigurationError(
                    f"`loss` must return one loss per example, shape {tuple(weights.shape)}, but returned "
                    f"{tuple(losses.shape)}."
                )
            weighted = losses * weights
            return weighted.mean() if self.normalization == "batch" else weighted.sum() / weights.sum()
        with WeightedReductions(weights, self.normalization) as mode:
            outputs = training_step(*args)
        refuse_unweighted(mode, outputs)
        return outputs

    def per_example(self, module: Any) -> PerExampleLoss | None:
        """Return the per-example loss function, or ``None`` where reductions are intercepted."""
        if self.loss != "auto":
            return self.loss
        return getattr(type(module), "per_example_loss", None)

    @property
    def name(self) -> str:
        """What a sketch records of it."""
        return "auto" if self.loss == "auto" else getattr(self.loss, "__qualname__", repr(self.loss))
