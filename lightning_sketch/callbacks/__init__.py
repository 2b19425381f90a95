"""Callbacks for the user's own Trainer."""

from lightning_sketch.callbacks.reweight import Reweight
from lightning_sketch.callbacks.sketch import SketchCallback

__all__ = ["Reweight", "SketchCallback"]
