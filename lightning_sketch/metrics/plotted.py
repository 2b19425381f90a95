"""What the metrics of this package share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class PlottedMetric(Metric):
    """A metric with ``plot``."""

    full_state_update = False

    def plot(
        self, val: Tensor | dict[str, Tensor] | Sequence[Any] | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure, Axes]":
        """Draw values of the metric; returns figure and axes.

        Args:
            val: what ``compute`` or ``forward`` returned, or a list of such values in the order of time; ``None``
                computes the metric.
            ax: axes to draw on; ``None`` makes a figure.
        """
        return self._plot(val, ax)  # type: ignore[return-value]
