"""Predict deletions from a sketch: estimators of a deletion's Taylor terms, and what they say of an output."""

from lightning_sketch.prediction.effect import Effect, Prediction
from lightning_sketch.prediction.evaluation import Evaluation
from lightning_sketch.prediction.planning import Plan, plan
from lightning_sketch.prediction.predictor import DeletionPredictor
from lightning_sketch.prediction.queries import InfluentialSet, Interaction, RankedUnits, Ranking

__all__ = [
    "DeletionPredictor",
    "Effect",
    "Evaluation",
    "InfluentialSet",
    "Interaction",
    "Plan",
    "Prediction",
    "RankedUnits",
    "Ranking",
    "plan",
]
