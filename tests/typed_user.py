"""A script as a user of strict typing writes it; it is checked, not run."""

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_sketch import (
    DeletionPredictor,
    GradientFeatures,
    Reweight,
    Sketch,
    SketchCallback,
    SketchError,
    StabilityMonitor,
    StableAdamW,
    plan,
)
from lightning_sketch.metrics import LinearDatamodelingScore
from lightning_sketch.unlearning import AuditReport, CounterfactualDistillation, SketchStep, UnlearningReport, audit


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return StableAdamW(self.parameters(), lr=1e-2)


def main() -> None:
    dataset = TensorDataset(torch.randn(12, 4), torch.arange(12) % 3)
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(dataset, batch_size=4)
    callbacks: list[pl.Callback] = [
        SketchCallback("sketch/", design="basis+common", degree=2, units=np.arange(12) // 3),
        StabilityMonitor(units=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        GradientFeatures("features/"),
        Reweight(units=None, delete=[1]),
    ]
    pl.Trainer(max_epochs=1, callbacks=callbacks)
    model = Classifier()
    try:
        sketch = Sketch.load("sketch/")
    except SketchError as error:
        print(error)
        return
    predictor = DeletionPredictor(sketch, model, output="loss")
    effect = predictor.prepare(loader)
    p = effect.delete(units=np.array([1, 2]))
    change: Tensor = p.change
    low, high = p.interval(0.95)
    reliable: Tensor = p.reliable
    print(change, low - high, reliable, effect.rank(2), plan(10, error=0.1))
    metrics = MetricCollection({"accuracy": MulticlassAccuracy(3)})
    print(DeletionPredictor(sketch, model, output="logits").evaluate(loader, metrics, delete=[1]))
    report: UnlearningReport = SketchStep(sketch, delete=[1]).unlearn(model, loader)
    report = CounterfactualDistillation(sketch, [1]).unlearn(model, loader)
    verdict: AuditReport = audit(model, report.module, forget=loader, retain=loader, test=loader, reference=model)
    score = LinearDatamodelingScore()
    figure, _ = verdict.plot()
    figure.savefig("audit.png")
    print(verdict.verdict, score.compute().item())


if __name__ == "__main__":
    main()
