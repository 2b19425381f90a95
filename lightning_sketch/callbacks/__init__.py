"""Lightning callbacks: carry a sketch along training, record gradient features, or really train without some units."""

from lightning_sketch.callbacks.gradient_features import GradientFeatures
from lightning_sketch.callbacks.reweight import Reweight
from lightning_sketch.callbacks.sketch import SketchCallback
from lightning_sketch.callbacks.stability import StabilityMonitor

__all__ = ["GradientFeatures", "Reweight", "SketchCallback", "StabilityMonitor"]
