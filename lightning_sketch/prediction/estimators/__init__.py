"""Estimators of the Taylor terms ``<F_r, x^(x r)>`` of a deletion ``x`` from coefficients along sketched directions.

``c_jr = <F_r, psi_j^(x r)>`` is the order-``r`` coefficient of an output along direction ``psi_j`` in ``C^n``;
``F_r`` is a real symmetric tensor. An estimator is made once from the directions and the coefficients, and called with
any number of deletions; it returns every term and the standard error of their sum. All arithmetic is float64.
"""

import numpy as np

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.prediction.estimators.base import Estimator
from lightning_sketch.prediction.estimators.kernel import KernelEstimator
from lightning_sketch.prediction.estimators.margins import Margins, best_of_losses
from lightning_sketch.prediction.estimators.mean import (
    FAILURE_PROBABILITY,
    MeanEstimator,
    MedianOfMeansEstimator,
    on_complex_sphere,
)
from lightning_sketch.prediction.influence import Influence

ESTIMATORS = ("auto", "kernel", "mean", "median_of_means")
# The kernel's factors cost O(m^3) operations once and O(m^2) bytes per order; `auto` takes it up to this m.
MAX_KERNEL_MEASUREMENTS = 4096


def make_estimator(
    name: str,
    directions: np.ndarray,
    coefficients: np.ndarray,
    failure_probability: float = FAILURE_PROBABILITY,
    features: np.ndarray | None = None,
    influence: Influence | None = None,
    margins: Margins | None = None,
) -> Estimator:
    """Return the estimator of that name.

    Args:
        name: one of :data:`ESTIMATORS`; ``auto`` is the kernel estimator up to :data:`MAX_KERNEL_MEASUREMENTS` real
            measurements (2 per complex direction, 1 per real one) and the mean beyond.
        directions: ``(K, n)`` complex128.
        coefficients: ``(R, K, O)`` complex128.
        failure_probability: ``delta`` of the median of means.
        features: ``(n, q)`` float64, features of the units for the prior of the kernel; or None.
        influence: of the units on the outputs, for its prior mean; or None.
        margins: of the outputs where they are losses, which the kernel may take for functions of margins; or None.

    Raises:
        ConfigurationError: unknown name, or directions that the estimator can not use.
    """
    if name not in ESTIMATORS:
        raise ConfigurationError(f"`estimator` is {name!r}: choose one of {', '.join(ESTIMATORS)}.")
    if name == "auto":
        measurements = len(directions) + int(directions.imag.any(axis=1).sum())
        if measurements <= MAX_KERNEL_MEASUREMENTS:
            name = "kernel"
        elif on_complex_sphere(directions).all():
            name = "mean"
        else:
            raise ConfigurationError(
                f"`estimator='auto'` has {measurements} measurements, above {MAX_KERNEL_MEASUREMENTS}, of directions "
                "that the mean can not use: pass `estimator='kernel'`, slow at first, or sketch fewer directions."
            )
    if name == "kernel":
        kernel = KernelEstimator(directions, coefficients, features, influence)
        return kernel if margins is None else best_of_losses(kernel, coefficients, margins)
    if name == "mean":
        return MeanEstimator(directions, coefficients)
    return MedianOfMeansEstimator(directions, coefficients, failure_probability)
