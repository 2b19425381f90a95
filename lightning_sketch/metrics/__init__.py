"""How good predicted deletions are beside real retraining, as ``torchmetrics``."""

from lightning_sketch.metrics.calibration import Calibration, calibrate
from lightning_sketch.metrics.deletions import IntervalCoverage, LinearDatamodelingScore, RelativeChangeError

__all__ = ["Calibration", "IntervalCoverage", "LinearDatamodelingScore", "RelativeChangeError", "calibrate"]
