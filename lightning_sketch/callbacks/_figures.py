"""Figures to the loggers of a run."""

from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@rank_zero_only
def log_figure(to: pl.Trainer | Logger, key: str, figure: "Figure", step: int) -> None:
    """Log a figure where the logger can take one: TensorBoard, Weights & Biases and MLflow; others are passed over.

    The first process logs, the others do nothing. The figure stays open.

    Args:
        to: a logger, or a Trainer with any number of them.
        key: name of the figure, such as ``"sketch/stability"``; in MLflow the artifact ``<key>/<step>.png``.
        figure: is not changed.
        step: optimizer steps done.
    """
    for logger in to.loggers if isinstance(to, pl.Trainer) else [to]:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(key, figure, step, close=False)
        elif isinstance(logger, WandbLogger):
            logger.log_image(key, [figure], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, f"{key}/{step:06d}.png")
