"""What every estimator of Taylor terms does."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Expansion:
    """Taylor terms of deletions.

    Args:
        terms: ``(degree, m, O)``, of orders 1 to ``degree``.
        stderr: ``(degree, m, O)``, the standard error of their sum up to each degree.
        beyond: ``(m, O)``, what the orders left out hold as far as lower orders determine them; or None.
    """

    terms: np.ndarray
    stderr: np.ndarray
    beyond: np.ndarray | None = None


class Estimator(ABC):
    """Maps deletions to Taylor terms and the standard errors of their sums."""

    @abstractmethod
    def expand(self, x: np.ndarray, degree: int) -> Expansion:
        """Return the terms of orders ``1..degree``.

        Args:
            x: ``(m, n)`` float64, one deletion per row.
            degree: highest order used.
        """

    def measured(self, x: np.ndarray) -> np.ndarray:
        """Return how far standard errors of the second order rest on measurements and not on a prior, in 0 to 1.

        Args:
            x: ``(m, n)`` float64, one deletion per row.

        Returns:
            ``(m,)``; 1 for estimators without a prior.
        """
        return np.ones(len(x))

    def __call__(self, x: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the terms, ``(degree, m, O)``, and the standard error of their whole sum, ``(m, O)``."""
        expansion = self.expand(x, degree)
        return expansion.terms, expansion.stderr[-1]
