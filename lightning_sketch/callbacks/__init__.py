"""Lightning callbacks: carry a sketch along training, or change the training itself."""

from lightning_sketch.callbacks.gradient_features import GradientFeatures
from lightning_sketch.callbacks.gradient_restriction import GradientRestriction
from lightning_sketch.callbacks.reweight import Reweight
from lightning_sketch.callbacks.sketch import SketchCallback
from lightning_sketch.callbacks.stability import StabilityMonitor

__all__ = ["GradientFeatures", "GradientRestriction", "Reweight", "SketchCallback", "StabilityMonitor"]
