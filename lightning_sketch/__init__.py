"""Predict, from one training run, what a model would do without any of its training examples.

Callbacks carry higher-order Taylor coefficients along an unchanged ``Trainer.fit`` and leave a sketch; from the sketch
any deletion is predicted in milliseconds. Method: Gunn, *How to sketch a learning algorithm* (arXiv 2604.07328).
"""

from lightning_sketch.callbacks import (
    GradientFeatures,
    GradientRestriction,
    Reweight,
    SketchCallback,
    StabilityMonitor,
)
from lightning_sketch.errors import (
    ConfigurationError,
    FidelityError,
    InstabilityError,
    LightningSketchError,
    MemoryShortageError,
    SketchError,
    UnsupportedOperatorError,
)
from lightning_sketch.optim import StableAdamW
from lightning_sketch.prediction import DeletionPredictor, plan
from lightning_sketch.sketch import Sketch

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "DeletionPredictor",
    "FidelityError",
    "GradientFeatures",
    "GradientRestriction",
    "InstabilityError",
    "LightningSketchError",
    "MemoryShortageError",
    "Reweight",
    "Sketch",
    "SketchCallback",
    "SketchError",
    "StabilityMonitor",
    "StableAdamW",
    "UnsupportedOperatorError",
    "plan",
]
