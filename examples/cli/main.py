"""A training script of LightningCLI, sketched from YAML or from the command line.

    cd examples/cli && python main.py fit --config sketch.yaml

Of the sketch it knows an import, and one line that takes the units of deletion from the datamodule.
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# LightningCLI knows callbacks by their short names once they are imported.
from lightning_sketch import Reweight, SketchCallback, StabilityMonitor, StableAdamW  # noqa: F401

TRAIN = 1437  # the other 360 images are the test set


class DigitClassifier(pl.LightningModule):
    """A network of one hidden layer.

    Args:
        hidden: its width.
        lr: learning rate.
    """

    def __init__(self, hidden: int = 32, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("test_loss", F.cross_entropy(self(images), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return StableAdamW(self.parameters(), lr=self.hparams.lr, eps=1e-3)


class Digits(pl.LightningDataModule):
    """The handwritten digits of scikit-learn, every image from one of some sources.

    Args:
        batch_size: images per batch.
        sources: number of sources.

    Attributes:
        units: the source of every training image.
    """

    def __init__(self, batch_size: int = 48, sources: int = 20) -> None:
        super().__init__()
        self.save_hyperparameters()
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        self.images = torch.as_tensor(digits.data / 16, dtype=torch.float32)[order]
        self.labels = torch.as_tensor(digits.target)[order]
        self.units: list[int] = [image % sources for image in range(TRAIN)]

    def train_dataloader(self) -> DataLoader:
        dataset = TensorDataset(self.images[:TRAIN], self.labels[:TRAIN])
        return DataLoader(dataset, self.hparams.batch_size, shuffle=True, drop_last=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.images[TRAIN:], self.labels[TRAIN:]), self.hparams.batch_size)


class CLI(LightningCLI):
    """Gives the units of the datamodule to every callback that takes ``units``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.units", "trainer.callbacks.init_args.units", apply_on="instantiate")


if __name__ == "__main__":
    CLI(DigitClassifier, Digits, seed_everything_default=0, save_config_kwargs={"overwrite": True})
