"""A sketch's predictions beside a few real retrainings."""

from dataclasses import dataclass

from torch import Tensor

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.metrics.deletions import IntervalCoverage, LinearDatamodelingScore, RelativeChangeError
from lightning_sketch.prediction.effect import Prediction

_LEAST_RANKED = 3  # two deletions rank alike or opposite, which says nothing


@dataclass(frozen=True, repr=False)
class Calibration:
    """How predictions compare with really retrained models.

    Args:
        num_sets: deletions compared.
        level: that of the intervals.
        coverage: share of true outputs inside their interval; ``level`` is right, less is overconfident.
        bias: mean signed error of the change, ``mean(predicted - true) / mean(|true|)``.
        relative_error: ``||predicted - true|| / ||true||`` of the change, as :class:`RelativeChangeError`.
        lds: :class:`LinearDatamodelingScore`; ``None`` with fewer than three deletions.
    """

    num_sets: int
    level: float
    coverage: float
    bias: float
    relative_error: float
    lds: float | None

    def __repr__(self) -> str:
        lds = "" if self.lds is None else f", LDS {self.lds:.3f}"
        return (
            f"Calibration(of {self.num_sets} deletions: {self.coverage:.1%} of outputs within their {self.level:.0%} "
            f"intervals, relative error {self.relative_error:.2%}, bias {self.bias:+.2%}{lds})"
        )


def calibrate(prediction: Prediction, true: Tensor, level: float = 0.9) -> Calibration:
    """Compare predicted deletions with the outputs of really retrained models.

    Args:
        prediction: of ``m`` deletions, from :meth:`Effect.delete_many`.
        true: ``(m, *out)``, outputs after retraining without each set.
        level: of the intervals whose coverage is asked for.

    Raises:
        ConfigurationError: shapes that differ, or a ``level`` that is no probability.

    Example:
        >>> import torch
        >>> change, width = torch.tensor([1.0, 2.0, -1.0]), torch.full((3,), 0.1)
        >>> value, reliable = 5 + change, torch.ones(3, dtype=torch.bool)
        >>> prediction = Prediction(torch.tensor(5.0), value, change, width, value[None], width, reliable, value)
        >>> calibrate(prediction, torch.tensor([6.0, 7.1, 3.5]))
        Calibration(of 3 deletions: 66.7% of outputs within their 90% intervals, relative error 18.42%, bias +8.70%,
        LDS 1.000)
    """
    if true.shape != prediction.value.shape or not len(prediction.value.shape):
        raise ConfigurationError(
            f"`true` has shape {tuple(true.shape)} and the prediction {tuple(prediction.value.shape)}: give (m, *out) "
            "for both."
        )
    predicted_change, true_change = prediction.change.double(), true.double() - prediction.baseline.double()
    coverage = IntervalCoverage()(prediction.interval(level), true)
    ranked = len(true) >= _LEAST_RANKED
    return Calibration(
        num_sets=len(true),
        level=level,
        coverage=float(coverage),
        bias=float((predicted_change - true_change).mean() / true_change.abs().mean()),
        relative_error=float(RelativeChangeError()(predicted_change, true_change)),
        lds=float(LinearDatamodelingScore()(predicted_change, true_change)) if ranked else None,
    )
