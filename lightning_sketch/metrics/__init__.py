"""How good predicted deletions and unlearned models are beside real retraining, as ``torchmetrics``."""

from lightning_sketch.metrics.calibration import Calibration, calibrate
from lightning_sketch.metrics.deletions import IntervalCoverage, LinearDatamodelingScore, RelativeChangeError
from lightning_sketch.metrics.forgetting import (
    PredictionDisagreement,
    PredictionKL,
    RelativeParameterDistance,
    RelearningTime,
    UnlearningGap,
)
from lightning_sketch.metrics.membership import ForgetEfficacy, MembershipAUROC, MembershipTPR, membership_scores

__all__ = [
    "Calibration",
    "ForgetEfficacy",
    "IntervalCoverage",
    "LinearDatamodelingScore",
    "MembershipAUROC",
    "MembershipTPR",
    "PredictionDisagreement",
    "PredictionKL",
    "RelativeChangeError",
    "RelativeParameterDistance",
    "RelearningTime",
    "UnlearningGap",
    "calibrate",
    "membership_scores",
]
