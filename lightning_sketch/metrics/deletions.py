"""Metrics of predicted deletions against really retrained models.

All arithmetic is float64, whatever the dtype of the inputs. Each metric has ``plot``, for one value or a list of them.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.metrics.plotted import PlottedMetric


class LinearDatamodelingScore(PlottedMetric):
    """Linear datamodeling score (LDS): rank correlation over deletions of predicted and true outputs.

    For each output, Spearman's ``rho`` over the ``m`` deletions; ties have their average rank (Park et al., *TRAK:
    Attributing Model Behavior at Scale*, arXiv 2303.14186, section 2). Outputs and changes of outputs give the same
    score. It needs two deletions, and says something from about ten. All deletions are kept and gathered from the
    processes, each of which must have updated, with no deletions, ``(0, *out)``, if it has none.

    An output that is the same after every deletion can not be ranked: its ``rho`` is NaN, as in
    ``scipy.stats.spearmanr``. The average leaves out outputs whose truth is constant, and counts as 0 those whose
    prediction alone is, so that nothing is gained by predicting no change. (torchmetrics' ``SpearmanCorrCoef`` gives 0
    to both.)

    Shape:
        - predicted: ``(m,)`` or ``(m, *out)``, outputs or their changes after ``m`` deletions.
        - true: the same.
        - result: scalar; for ``raw_values`` ``(*out)``, and a scalar for a single output. Float64.

    Args:
        multioutput: ``"uniform_average"`` over outputs, or ``"raw_values"``, one for each output.
        kwargs: those of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: an unknown ``multioutput``; in ``update``, shapes that differ, or NaN.

    Example:
        >>> lds = LinearDatamodelingScore()
        >>> lds.update(torch.tensor([0.1, 0.4, 0.2, 0.9]), torch.tensor([1.0, 3.0, 2.0, 2.5]))
        >>> round(lds.compute().item(), 3)
        0.8
    """

    is_differentiable = False
    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    predicted: list[Tensor]
    true: list[Tensor]

    def __init__(
        self, multioutput: Literal["uniform_average", "raw_values"] = "uniform_average", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if multioutput not in ("uniform_average", "raw_values"):
            raise ConfigurationError(f"`multioutput` is {multioutput!r}: give 'uniform_average' or 'raw_values'.")
        self.multioutput = multioutput
        self.add_state("predicted", [], dist_reduce_fx="cat")
        self.add_state("true", [], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """Add ``m`` more deletions, both ``(m, *out)``."""
        _check(predicted=predicted, true=true)
        if predicted.ndim == 0:
            raise ConfigurationError("`predicted` is a scalar: give (m,) or (m, *out), the deletions first.")
        if self.predicted and self.predicted[0].shape[1:] != predicted.shape[1:]:
            raise ConfigurationError(
                f"`predicted` has outputs of shape {tuple(predicted.shape[1:])}, and had "
                f"{tuple(self.predicted[0].shape[1:])} before: use one metric for each kind of output."
            )
        self.predicted.append(predicted.double())
        self.true.append(true.double())

    def compute(self) -> Tensor:
        """Return the score."""
        predicted, true = dim_zero_cat(self.predicted), dim_zero_cat(self.true)
        p, t = (_centred_ranks(values.reshape(len(values), -1)) for values in (predicted, true))
        rho = ((p * t).sum(0) / (p.square().sum(0) * t.square().sum(0)).sqrt()).clamp(-1, 1)
        if self.multioutput == "raw_values":
            return rho.reshape(true.shape[1:])
        return rho.nan_to_num(0)[t.any(0)].mean()


class RelativeChangeError(PlottedMetric):
    """Relative error of predicted changes: ``||predicted - true|| / ||true||``, L2 over all deletions and outputs.

    0 is exact; 1 is what predicting no change at all gives. NaN before the first update, infinite if nothing changed
    that was predicted to.

    Shape:
        - predicted_change, true_change: any, equal.
        - result: scalar, float64.

    Args:
        kwargs: those of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, shapes that differ, or NaN.

    Example:
        >>> error = RelativeChangeError()
        >>> error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])).item() == (1 / 34) ** 0.5
        True
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0

    squared_error: Tensor
    squared_change: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("squared_error", "squared_change"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predicted_change: Tensor, true_change: Tensor) -> None:
        """Add changes of outputs, of any shape."""
        _check(predicted_change=predicted_change, true_change=true_change)
        true = true_change.double()
        self.squared_error = self.squared_error + (predicted_change.double() - true).square().sum()
        self.squared_change = self.squared_change + true.square().sum()

    def compute(self) -> Tensor:
        """Return the error."""
        return (self.squared_error / self.squared_change).sqrt()


class IntervalCoverage(PlottedMetric):
    """Prediction interval coverage: the share of true values with ``lower <= true <= upper``.

    Honest intervals of level 0.9 cover 0.9 of the truths: below it they are too narrow, above it too wide. NaN before
    the first update.

    Shape:
        - interval: two tensors of any shape, lower and upper bounds, as :meth:`Prediction.interval` returns them.
        - true: the same shape.
        - result: scalar, float64.

    Args:
        kwargs: those of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, shapes that differ, NaN, or a lower bound above its upper one.

    Example:
        >>> coverage = IntervalCoverage()
        >>> coverage((torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])), torch.tensor([0.5, 3.0])).item()
        0.5
    """

    is_differentiable = False
    higher_is_better = None  # as near as possible to the level
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    covered: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("covered", "total"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, interval: tuple[Tensor, Tensor], true: Tensor) -> None:
        """Add intervals ``(lower, upper)`` and the true values, of any shape."""
        if not isinstance(interval, tuple | list) or len(interval) != 2:
            raise ConfigurationError("`interval` must be (lower, upper): give what `Prediction.interval` returns.")
        lower, upper = interval
        _check(lower=lower, upper=upper, true=true)
        if bool((lower > upper).any()):
            raise ConfigurationError("`interval` has a lower bound above its upper one: give (lower, upper).")
        self.covered = self.covered + ((lower <= true) & (true <= upper)).sum()
        self.total = self.total + true.numel()

    def compute(self) -> Tensor:
        """Return the share."""
        return self.covered.double() / self.total


def _check(**tensors: Tensor) -> None:
    (first, reference), *_ = tensors.items()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ConfigurationError(f"`{name}` is {type(value).__name__}: give a tensor.")
        if value.shape != reference.shape:
            raise ConfigurationError(
                f"`{name}` has shape {tuple(value.shape)} and `{first}` {tuple(reference.shape)}: give equal shapes."
            )
        if bool(value.isnan().any()):
            raise ConfigurationError(f"`{name}` holds NaN: leave out the models that diverged.")


def _centred_ranks(values: Tensor) -> Tensor:
    """Return average ranks over the rows of ``(m, O)``, times 2 and minus their mean: exact, and 0 if constant."""
    columns = values.T.contiguous()
    ordered = columns.sort().values
    below = torch.searchsorted(ordered, columns)
    not_above = torch.searchsorted(ordered, columns, right=True)
    return (below + not_above - len(values)).T.double()
