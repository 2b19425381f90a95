"""Taylor arithmetic on tensors: knows torch, and nothing of training.

Normalised coefficients everywhere: order ``r`` is ``(1/r!) f^(r)(0)[psi, ..., psi]``.
"""

from lightning_sketch.jets import rules  # noqa: F401  (importing the rules registers them)
from lightning_sketch.jets.registry import jet_rule, registered_operators
from lightning_sketch.jets.tensor import JetTensor

__all__ = ["JetTensor", "jet_rule", "registered_operators"]
