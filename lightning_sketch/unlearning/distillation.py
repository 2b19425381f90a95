"""``CounterfactualDistillation``: teach a model the outputs that a sketch predicts for the retrained one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sketch.errors import ConfigurationError, check_count
from lightning_sketch.prediction import DeletionPredictor
from lightning_sketch.prediction.outputs import Output, logits
from lightning_sketch.sketch import Sketch
from lightning_sketch.unlearning.protocol import Batches, Outcome, Run, Unlearner, check_positive, loader_of
from lightning_sketch.unlearning.steps import check_sketched, check_units


class CounterfactualDistillation(Unlearner):
    """Fit a model to the logits that a sketch predicts for the model retrained without some units.

    The teacher is the prediction: no retrained model is needed, and the sketch predicts outputs without going through
    predicted parameters. Adam minimises the mean squared difference from the predicted logits on the examples to forget
    and on whatever else there is: ``retain``, and ``inputs`` that need no labels. All are read once and kept. Fitting
    ends when the distance to the predicted logits is ``tolerance`` of what it was, over all examples; the report's
    ``stopped`` is then ``"reached"``, else ``"epochs"``. Its ``details`` hold ``distance``, ``(epochs + 1,)``: the root
    mean square difference from the predicted logits before and after every epoch; the parameters kept are those of the
    least.

    Args:
        sketch: of the run that trained the module.
        delete: units to forget, those of the examples ``forget``.
        inputs: a batch or a DataLoader of further inputs, labelled or not.
        output: ``"logits"``, what ``forward`` returns; or ``callable(module, batch) -> (B, *out)``.
        lr: of Adam.
        epochs: at most so many.
        tolerance: see above.
        degree: highest order used; None is the sketch's.

    Raises:
        ConfigurationError: any argument that can not be right.
    """

    def __init__(
        self,
        sketch: Sketch,
        delete: Sequence[int],
        *,
        inputs: object = None,
        output: str | Output = "logits",
        lr: float = 1e-3,
        epochs: int = 100,
        tolerance: float = 0.1,
        degree: int | None = None,
    ) -> None:
        check_positive(lr=lr, tolerance=tolerance)
        check_count("epochs", epochs)
        if output != "logits" and not callable(output):
            raise ConfigurationError(f"`output` is {output!r}: give 'logits' or a callable(module, batch) -> tensor.")
        self.sketch = sketch
        self.delete = check_units(delete)
        self.inputs = inputs
        self.output = output
        self.lr = lr
        self.epochs = epochs
        self.tolerance = tolerance
        self.degree = degree

    def _change(self, run: Run) -> Outcome:
        check_sketched(self.sketch, run)
        function: Output = logits if isinstance(self.output, str) else self.output
        batches = list(run.forget)
        if run.retain is not None:
            batches += list(run.retain)
        if self.inputs is not None:
            batches += list(Batches(self.inputs, run.module, "inputs"))
        predictor = DeletionPredictor(self.sketch, run.module, self.output)
        effect = predictor.prepare(loader_of(batches))
        wanted = effect.delete(self.delete, degree=self.degree).value
        with torch.no_grad():
            sizes = [len(function(run.module, batch)) for batch in batches]
        like = next(iter(run.parameters.values()))
        targets = [t.to(like) for t in wanted.split(sizes)]

        def distance() -> float:
            total = 0.0
            with torch.no_grad():
                for batch, target in zip(batches, targets, strict=True):
                    total += float((function(run.module, batch) - target).double().square().sum())
            return (total / wanted.numel()) ** 0.5

        trained = list(run.parameters.values())
        optimizer = torch.optim.Adam(trained, self.lr)
        distances = [distance()]
        best, steps, history = distances[0], 0, []
        kept = [p.detach().clone() for p in trained]
        for _ in run.follow(range(self.epochs), "CounterfactualDistillation"):
            if best <= self.tolerance * distances[0]:
                break
            for index in torch.randperm(len(batches), generator=run.generator).tolist():
                difference = function(run.module, batches[index]) - targets[index]
                gradients = torch.autograd.grad(difference.square().mean(), trained, allow_unused=True)
                for p, gradient in zip(trained, gradients, strict=True):
                    p.grad = gradient
                optimizer.step()
                steps += 1
            distances.append(distance())
            history.append(run.mean_loss(run.forget, "forget"))
            if distances[-1] < best:
                best = distances[-1]
                kept = [p.detach().clone() for p in trained]
        with torch.no_grad():
            for p, value in zip(trained, kept, strict=True):
                p.copy_(value)
        stopped = "reached" if best <= self.tolerance * distances[0] else "epochs"
        details: dict[str, Tensor] = {"distance": torch.tensor(distances, dtype=torch.float64)}
        return Outcome(steps, stopped, tuple(history), details)
