"""How far an unlearned model is from the one retrained without the forgotten examples.

All arithmetic is float64, whatever the dtype of the inputs.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_sketch.errors import ConfigurationError, check_choice
from lightning_sketch.metrics.membership import Role, check_logits
from lightning_sketch.metrics.plotted import PlottedMetric


class _MeanOfPairs(PlottedMetric):
    """A mean over examples of something of the logits of two models."""

    higher_is_better = False
    plot_lower_bound = 0.0

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, reference_logits: Tensor) -> None:
        """Add examples, both ``(N, C)``."""
        _check_pair(logits, reference_logits)
        self.total = self.total + self._of_each(logits, reference_logits).double().sum()
        self.count = self.count + len(logits)

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count

    def _of_each(self, logits: Tensor, reference_logits: Tensor) -> Tensor:
        """Return what is averaged, ``(N,)``."""
        raise NotImplementedError


class PredictionKL(_MeanOfPairs):
    """Mean Kullback-Leibler divergence ``KL(p_reference || p)`` of class probabilities, in nats.

    0 is the reference itself. NaN before the first update.

    Shape:
        - logits: ``(N, C)``, of the unlearned model.
        - reference_logits: ``(N, C)``, of the retrained model on the same examples.
        - result: scalar, float64.

    Args:
        kwargs: those of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, other shapes, or logits that are not finite.

    Example:
        >>> kl = PredictionKL()
        >>> kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[50.0, 0.0]]))  # log 2
        tensor(0.6931, dtype=torch.float64)
    """

    is_differentiable = True

    def _of_each(self, logits: Tensor, reference_logits: Tensor) -> Tensor:
        log_p, log_r = logits.double().log_softmax(1), reference_logits.double().log_softmax(1)
        return (log_r.exp() * (log_r - log_p)).sum(1)


class PredictionDisagreement(_MeanOfPairs):
    """Share of examples for which two models predict different classes. NaN before the first update.

    Shape:
        - logits: ``(N, C)``, of the unlearned model.
        - reference_logits: ``(N, C)``, of the retrained model on the same examples.
        - result: scalar, float64.

    Args:
        kwargs: those of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, other shapes, or logits that are not finite.

    Example:
        >>> disagreement = PredictionDisagreement()
        >>> disagreement(torch.eye(2), torch.ones(2, 1) * torch.tensor([0.0, 1.0]))
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    plot_upper_bound = 1.0

    def _of_each(self, logits: Tensor, reference_logits: Tensor) -> Tensor:
        return logits.argmax(1) != reference_logits.argmax(1)


class RelativeParameterDistance(PlottedMetric):
    """Distance of the parameters to the retrained model's, relative to the original's distance to it.

    ``||theta_unlearned - theta_retrained|| / ||theta_original - theta_retrained||``: 0 is the retrained model, 1 no
    progress, above 1 the wrong way. Meaningful if the retraining started from the same seed. Infinite or NaN if the
    original is the retrained one. All updates count together, as if their parameters were one model's.

    Args:
        kwargs: those of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, models whose parameters have other names or shapes, or that are not finite.

    Example:
        >>> models = [torch.nn.Linear(1, 1, bias=False) for _ in range(3)]
        >>> for model, value in zip(models, (2.0, 5.0, 1.0)):
        ...     _ = torch.nn.init.constant_(model.weight, value)
        >>> RelativeParameterDistance()(*models)
        tensor(0.2500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    plot_lower_bound = 0.0

    squared_distance: Tensor
    squared_original: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("squared_distance", "squared_original"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, unlearned: nn.Module, original: nn.Module, retrained: nn.Module) -> None:
        """Add the parameters of three models of the same class."""
        u, o, r = (dict(module.named_parameters()) for module in (unlearned, original, retrained))
        for argument, given in (("unlearned", u), ("original", o), ("retrained", r)):
            if {n: p.shape for n, p in given.items()} != {n: p.shape for n, p in r.items()}:
                raise ConfigurationError(
                    f"`{argument}` has other parameters than `retrained`: give models of one class."
                )
            if not all(bool(p.isfinite().all()) for p in given.values()):
                raise ConfigurationError(f"`{argument}` holds NaN or infinity: leave out models that diverged.")
        device = self.squared_distance.device
        for name, value in r.items():
            target = value.detach().double().to(device)
            for key, other in (("squared_distance", u[name]), ("squared_original", o[name])):
                setattr(self, key, getattr(self, key) + (other.detach().double().to(device) - target).square().sum())

    def compute(self) -> Tensor:
        """Return the ratio."""
        return (self.squared_distance / self.squared_original).sqrt()


class UnlearningGap(PlottedMetric):
    """Gaps between an unlearned and a retrained model on the forget, retain and test sets.

    The mean over the examples of a set of the unlearned model's quantity minus the retrained one's; ``"average"`` is
    the mean of their sizes (the "average gap" of Fan et al., *SalUn*, arXiv 2310.12508). Sets without examples are left
    out.

    Shape:
        - logits: ``(N, C)``, of the unlearned model.
        - reference_logits: ``(N, C)``, of the retrained model on the same examples.
        - targets: ``(N,)`` integers.
        - result: scalars, float64, under ``"forget"``, ``"retain"``, ``"test"`` and ``"average"``.

    Args:
        quantity: ``"accuracy"`` or ``"loss"``, the cross-entropy in nats.
        kwargs: those of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: an unknown quantity; in ``update``, what can not be right; in ``compute``, no examples.

    Example:
        >>> gap = UnlearningGap()
        >>> gap.update(torch.eye(2), torch.eye(2).flip(0), torch.tensor([0, 1]), "forget")
        >>> gap.update(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), "test")
        >>> {name: value.item() for name, value in gap.compute().items()}
        {'forget': 1.0, 'test': 0.0, 'average': 0.5}
    """

    is_differentiable = False
    higher_is_better = None  # zero is best
    plot_lower_bound: float | None = None

    def __init__(self, quantity: Literal["accuracy", "loss"] = "accuracy", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if quantity not in ("accuracy", "loss"):
            raise ConfigurationError(f"`quantity` is {quantity!r}: give 'accuracy' or 'loss'.")
        self.quantity = quantity
        for role in get_args(Role):
            self.add_state(f"{role}_gap", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{role}_count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, reference_logits: Tensor, targets: Tensor, role: Role) -> None:
        """Add examples of one set, ``role``."""
        check_choice("role", role, get_args(Role))
        check_logits(logits, targets)
        _check_pair(logits, reference_logits)
        gap = self._of(logits, targets) - self._of(reference_logits, targets)
        setattr(self, f"{role}_gap", getattr(self, f"{role}_gap") + gap)
        setattr(self, f"{role}_count", getattr(self, f"{role}_count") + len(logits))

    def compute(self) -> dict[str, Tensor]:
        """Return the gaps."""
        gaps = {
            role: getattr(self, f"{role}_gap") / getattr(self, f"{role}_count")
            for role in get_args(Role)
            if getattr(self, f"{role}_count")
        }
        if not gaps:
            raise ConfigurationError("the metric has no examples yet: call `update` first.")
        return {**gaps, "average": torch.stack(list(gaps.values())).abs().mean()}

    def _of(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.quantity == "accuracy":
            return (logits.argmax(1) == targets).double().sum()
        return nn.functional.cross_entropy(logits.double(), targets, reduction="sum")


class RelearningTime(PlottedMetric):
    """Steps of training on the forgotten examples until their loss is down to ``target`` again.

    Train a copy of the unlearned model on the examples to forget, and update once before the first step and once after
    every step. A model that only hides what it knows relearns faster than the retrained one does from the same
    optimizer, to the same target: the original model's loss, say (Golatkar et al., arXiv 1911.04933). 0 if
    there was nothing to relearn; infinite while the target has not been reached. All processes must be given the same
    losses.

    Shape:
        - loss: scalar.
        - result: scalar, float64.

    Args:
        target: loss at which the examples count as known.
        kwargs: those of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: a ``target`` that is not finite; in ``update``, a loss that is no scalar, or NaN.

    Example:
        >>> time = RelearningTime(target=0.1)
        >>> for loss in (0.9, 0.4, 0.08, 0.2):
        ...     time.update(torch.tensor(loss))
        >>> time.compute()
        tensor(2., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    plot_lower_bound = 0.0

    updates: Tensor
    reached: Tensor

    def __init__(self, target: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not math.isfinite(target):
            raise ConfigurationError(f"`target` is {target}: give a finite loss.")
        self.target = target
        self.add_state("updates", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("reached", torch.tensor(math.inf, dtype=torch.float64), dist_reduce_fx="min")

    def update(self, loss: Tensor) -> None:
        """Add the mean loss of the examples to forget: before training first, then after every step."""
        if not isinstance(loss, Tensor) or loss.ndim or bool(loss.isnan()):
            raise ConfigurationError(f"`loss` is {loss!r}: give a scalar tensor that is not NaN.")
        if math.isinf(self.reached) and float(loss) <= self.target:
            self.reached = self.updates.double()
        self.updates = self.updates + 1

    def compute(self) -> Tensor:
        """Return the number of steps."""
        return self.reached


def _check_pair(logits: Tensor, reference_logits: Tensor) -> None:
    check_logits(logits)
    check_logits(reference_logits, name="reference_logits")
    if logits.shape != reference_logits.shape:
        raise ConfigurationError(
            f"`reference_logits` has shape {tuple(reference_logits.shape)} and `logits` {tuple(logits.shape)}: give "
            "those of the same examples."
        )
