"""Figures in loggers: what the logger keeps, read back."""

import io

import lightning.pytorch as pl
import numpy as np
import pytest
from helpers import QUIET
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_sketch.callbacks._figures import log_figure


@pytest.fixture
def figure():
    pytest.importorskip("matplotlib").use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn, ax = pyplot.subplots(figsize=(2, 1))
    ax.plot([0, 1], [1, 3])
    yield drawn
    pyplot.close(drawn)


def pixels(png):
    return pytest.importorskip("matplotlib.image").imread(png, format="png")[..., :3]


def drawn(figure):
    """The pixels of a figure, three channels."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return pixels(file)


class Client:
    """Stands for what a logger sends figures to; keeps the arguments of every call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, *args))


def stand_in(kind, **attributes):
    """A logger whose package need not be installed."""
    logger = kind.__new__(kind)
    logger.__dict__.update(attributes)
    return logger


def test_every_logger_of_a_trainer_is_given_the_figure_in_its_own_way(figure, tmp_path, monkeypatch):
    """Oracle: the clients' interfaces, ``add_figure``, ``log_image`` and ``log_figure``; CSV takes no figures."""
    board, mlflow, wandb = Client(), Client(), Client()
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, step: wandb.log_image(key, images, step))
    loggers = [
        stand_in(TensorBoardLogger, _experiment=board),
        CSVLogger(tmp_path),
        stand_in(WandbLogger),
        stand_in(MLFlowLogger, _mlflow_client=mlflow, _initialized=True, _run_id="abc"),
    ]
    trainer = pl.Trainer(**QUIET)
    trainer.loggers = loggers
    log_figure(trainer, "sketch/stability", figure, 12)
    assert board.calls == [("add_figure", "sketch/stability", figure, 12)]
    assert wandb.calls == [("log_image", "sketch/stability", [figure], 12)]
    assert mlflow.calls == [("log_figure", "abc", figure, "sketch/stability/000012.png")]
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_logs(figure, monkeypatch):
    """Oracle: no call."""
    wandb = Client()
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, *args: wandb.log_image(*args))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log_figure(stand_in(WandbLogger), "profile", figure, 0)
    assert not wandb.calls


def test_a_trainer_without_a_logger_is_left_alone(figure):
    """Oracle: nothing raised, nothing returned."""
    assert log_figure(pl.Trainer(**QUIET), "profile", figure, 0) is None


def test_tensorboard_keeps_the_figure(figure, tmp_path):
    """Oracle: the event file, read by TensorBoard itself."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    log_figure(logger, "sketch/stability", figure, 12)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    (image,) = events.Images("sketch/stability")
    assert image.step == 12
    np.testing.assert_allclose(pixels(io.BytesIO(image.encoded_image_string)), drawn(figure), atol=0.01)
    assert figure.number in pytest.importorskip("matplotlib.pyplot").get_fignums()  # still open


def test_mlflow_keeps_the_figure(figure, tmp_path, monkeypatch):
    """Oracle: the artifact in the file store."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(save_dir=str(tmp_path))
    log_figure(logger, "sketch/stability", figure, 12)
    (path,) = tmp_path.rglob("*.png")
    assert path.parts[-3:] == ("sketch", "stability", "000012.png")
    np.testing.assert_allclose(pixels(path), drawn(figure), atol=0.01)


@pytest.mark.slow
def test_wandb_keeps_the_figure(figure, tmp_path, monkeypatch):
    """Oracle: the image file of an offline run."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    log_figure(logger, "sketch/stability", figure, 12)
    logger.experiment.finish()
    (path,) = tmp_path.rglob("*.png")
    np.testing.assert_allclose(pixels(path), drawn(figure), atol=0.01)
