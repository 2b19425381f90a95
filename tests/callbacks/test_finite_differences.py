"""Orders 1..3 of whole runs against retraining: ``Reweight`` runs along a direction, fitted by a polynomial."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import Reweight, Sketch, SketchCallback
from lightning_sketch.optim import StableAdamW

DEGREE = 3


class Classifier(pl.LightningModule):
    """Cross-entropy on two classes; the network and the optimizer vary."""

    def __init__(self, net: Callable[[], nn.Module], optimizer: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.net = net()
        self.make_optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = F.cross_entropy(self.net(inputs), targets)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> object:
        return self.make_optimizer(self.net)


class Tokens(nn.Module):
    """A transformer encoder over a short sequence of vectors, averaged and classified."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def sgd_momentum(net: nn.Module) -> object:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


def adamw_two_groups(net: nn.Module) -> object:
    first, *others = net.parameters()
    groups = [{"params": [first], "lr": 3e-3, "weight_decay": 0.1}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=12)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def stable_adamw(net: nn.Module) -> object:
    return StableAdamW(net.parameters(), lr=1e-2, betas=(0.8, 0.9), eps=1e-3)


RUNS = {
    "mlp, SGD momentum": (mlp, sgd_momentum, (4,), {}, 0.2),
    "mlp, AdamW": (mlp, adamw_two_groups, (4,), {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, 0.01),
    "cnn with BatchNorm and dropout, StableAdamW, accumulation, clipping": (
        cnn,
        stable_adamw,
        (1, 6, 6),
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        0.03,
    ),
    "transformer encoder with dropout, StableAdamW": (Tokens, stable_adamw, (3, 8), {}, 0.03),
}


def train(name: str, shape: tuple[int, ...], options: dict, callbacks: list[pl.Callback]) -> dict[str, np.ndarray]:
    """Train from the same seed; return final parameters and floating-point buffers."""
    net, optimizer, *_ = RUNS[name]
    pl.seed_everything(3, verbose=False)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, *shape, generator=generator, dtype=torch.float64)
    targets = (inputs.flatten(1)[:, 0] > 0).long()
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=5, shuffle=True)
    model = Classifier(net, optimizer).double()
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=callbacks,
        precision="64-true",
        **QUIET,
        **options,
    )
    trainer.fit(model, loader)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t.detach().numpy() for n, t in tensors.items() if t.dtype.is_floating_point}


def along(name: str, shape: tuple[int, ...], options: dict, units: np.ndarray, direction: np.ndarray, radius: float):
    """Taylor coefficients of final tensors along ``x = z direction``, from retraining at Chebyshev points."""
    points = np.cos(np.pi * (np.arange(13) + 0.5) / 13)
    runs = [train(name, shape, options, [Reweight(units=units, weights=radius * z * direction)]) for z in points]
    fitted = {}
    for tensor in runs[0]:
        values = np.stack([r[tensor].ravel() for r in runs])
        fitted[tensor] = np.polynomial.polynomial.polyfit(points, values, 11)[1 : DEGREE + 1]
        fitted[tensor] /= radius ** np.arange(1, DEGREE + 1)[:, None]
    return fitted


@pytest.mark.parametrize("name", RUNS)
def test_orders_equal_finite_differences_of_retraining(name, tmp_path):
    """Oracle: polynomial fit of 13 retrainings along each of two random directions."""
    *_, shape, options, radius = RUNS[name]
    generator = np.random.default_rng(0)
    units = generator.integers(-1, 6, 30)
    directions = generator.normal(size=(2, 6))
    plain = train(name, shape, options, [])
    callback = SketchCallback(tmp_path, directions, DEGREE, units=units, directions_per_pass=1)
    tracked = train(name, shape, options, [callback])
    for tensor, value in plain.items():
        assert np.array_equal(tracked[tensor], value), f"{tensor} differs with the callback"
    sketch = Sketch.load(tmp_path)
    for shard in sketch.shards():
        for position, row in enumerate(shard.indices):
            expected = along(name, shape, options, units, directions[row], radius)
            for order in range(DEGREE):
                pairs = [
                    (shard.coefficients[t][order, 0, position].numpy().ravel(), expected[t][order])
                    for t in expected
                    if t in shard.coefficients
                ]
                assert expected.keys() == set(shard.coefficients), "every parameter and statistic varies"
                got, want = (np.concatenate(side) for side in zip(*pairs, strict=True))
                error = np.linalg.norm(got - want) / np.linalg.norm(want)
                print(f"{name}, direction {row}, order {order + 1}: relative error {error:.1e}")
                assert error < (1e-9, 1e-7, 1e-5)[order]


class Mixed(pl.LightningModule):
    """Matrix products in bfloat16 under autocast, normalisation and loss in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        hidden = self.net[0](batch[0])
        assert hidden.dtype == (torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32)
        return F.cross_entropy(self.net[1:](hidden), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return StableAdamW(self.parameters(), lr=1e-2, eps=1e-3)


def train_mixed(precision: str, *callbacks: pl.Callback) -> torch.Tensor:
    """Train from the same seed; return the final parameters."""
    pl.seed_everything(3, verbose=False)
    inputs = torch.randn(30, 6)
    loader = DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=5)
    trainer = pl.Trainer(
        max_epochs=4,
        callbacks=list(callbacks),
        precision=precision,
        **QUIET,
    )
    model = Mixed()
    trainer.fit(model, loader)
    return torch.cat([p.detach().double().flatten() for _, p in sorted(model.named_parameters())])


def orders_of(dirpath: Path) -> torch.Tensor:
    (shard,) = Sketch.load(dirpath).shards()
    return torch.cat([shard.coefficients[name][:, 0, 0].flatten(1) for name in sorted(shard.coefficients)], 1)


def test_orders_under_autocast(tmp_path):
    """Oracles: retraining under autocast, whose rounding leaves 4 % of order 1; the same sketch in float32."""
    units = np.arange(30) % 6
    psi = np.random.default_rng(0).normal(size=6)
    plain = train_mixed("bf16-mixed")
    tracked = train_mixed("bf16-mixed", SketchCallback(tmp_path / "mixed", psi[None], 2, units=units))
    assert torch.equal(plain, tracked)
    ours = orders_of(tmp_path / "mixed")
    radii = 0.6 * np.cos(np.pi * (np.arange(16) + 0.5) / 16)
    runs = [train_mixed("bf16-mixed", Reweight(units=units, weights=r * psi)) for r in radii]
    powers = torch.as_tensor(radii[:, None] ** np.arange(1, 7))
    fitted = torch.linalg.lstsq(powers, torch.stack(runs) - plain).solution[0]
    assert (ours[0] - fitted).norm() < 0.06 * fitted.norm()
    train_mixed("32-true", SketchCallback(tmp_path / "single", psi[None], 2, units=units))
    single = orders_of(tmp_path / "single")
    errors = (ours - single).norm(dim=1) / single.norm(dim=1)
    print("bfloat16 against float32, orders 1 and 2:", errors)
    assert errors.max() < 0.05
