"""Steps to predicted parameters: of a sketch, and of kernel influence functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.influence import KernelInfluence
from lightning_sketch.influence.fit import Mode
from lightning_sketch.prediction import DeletionPredictor
from lightning_sketch.prediction.outputs import PARAMETER
from lightning_sketch.sketch import Sketch
from lightning_sketch.unlearning.protocol import Outcome, Run, Unlearner, norm, tensors_of


class SketchStep(Unlearner):
    """Set parameters and running statistics to those that a sketch predicts for the retrained model.

    Every tensor that training changed is predicted by :class:`~lightning_sketch.prediction.DeletionPredictor` with the
    output ``"parameter:NAME"``; so are BatchNorm's running statistics, which belong to the retrained model. Outputs are
    predicted better than through parameters by predicting them directly, since outputs are not linear in parameters:
    see :class:`CounterfactualDistillation`. The report's ``details`` hold ``stderr_norm`` and ``truncation_norm``, of
    the predictions of all tensors together, scalars in the units of ``change_norm``.

    Args:
        sketch: of the run that trained the module.
        delete: units to forget, those of the examples ``forget``, whose loss the report gives.
        degree: highest order used; None is the sketch's.

    Raises:
        ConfigurationError: if no unit is given, or one that does not exist.
    """

    def __init__(self, sketch: Sketch, delete: Sequence[int], *, degree: int | None = None) -> None:
        self.sketch = sketch
        self.delete = check_units(delete)
        self.degree = degree

    def _change(self, run: Run) -> Outcome:
        primal = check_sketched(self.sketch, run)
        own = dict(tensors_of(run.module))
        buffers = {name for name, _ in run.module.named_buffers()}
        varying = [name for name in self.sketch.metadata["coefficients"]["names"] if name in own]
        errors: dict[str, list[Tensor]] = {"stderr_norm": [], "truncation_norm": []}
        predicted: dict[str, Tensor] = {}
        for name in run.follow(varying, "SketchStep"):
            effect = DeletionPredictor(self.sketch, run.module, PARAMETER + name).prepare()
            p = effect.delete(self.delete, degree=self.degree)
            predicted[name] = p.value
            errors["stderr_norm"].append(p.stderr)
            errors["truncation_norm"].append(p.truncation)
        with torch.no_grad():
            for name, value in predicted.items():
                own[name].copy_(value.to(primal[name].dtype))
        run.changed_buffers = buffers & predicted.keys()
        details = {key: torch.tensor(norm(parts), dtype=torch.float64) for key, parts in errors.items()}
        return Outcome(1, "done", details=details)


class KernelStep(Unlearner):
    """Add the change of parameters that kernel influence functions predict, ``J' da`` (arXiv 2605.11239).

    Args:
        influence: of the module and its training data, from
            :meth:`~lightning_sketch.influence.KernelInfluence.from_module`.
        delete: rows of those data to forget, which are the examples ``forget``, whose loss the report gives.
        mode: as in :meth:`~lightning_sketch.influence.KernelInfluence.delete`.

    Raises:
        ConfigurationError: if no example is given.
    """

    def __init__(self, influence: KernelInfluence, delete: Sequence[int], *, mode: Mode = "newton") -> None:
        self.influence = influence
        self.delete = check_units(delete)
        self.mode = mode

    def _change(self, run: Run) -> Outcome:
        change = self.influence.parameter_change(self.influence.delete(self.delete, mode=self.mode))
        fitting = {name: tuple(p.shape) for name, p in run.parameters.items() if name in change}
        if fitting != {name: tuple(d.shape) for name, d in change.items()}:
            raise ConfigurationError("`module` does not have the parameters of `influence`: give the module it is of.")
        with torch.no_grad():
            for name, d in change.items():
                run.parameters[name].add_(d.to(run.parameters[name]))
        return Outcome(1, "done")


def check_units(delete: Sequence[int]) -> list[int]:
    """Return what to delete as a list.

    Raises:
        ConfigurationError: if it is none, or empty.
    """
    if not hasattr(delete, "__len__") or not len(delete):
        raise ConfigurationError(f"`delete` is {delete!r}: give a list of at least one.")
    return list(delete)


def check_sketched(sketch: Sketch, run: Run) -> dict[str, Tensor]:
    """Return the parameters and buffers of the sketched run.

    Raises:
        ConfigurationError: if they are not those of the module.
        SketchError: if the sketch is of another class of models.
    """
    sketch.check_fits(run.module)
    primal = sketch.primal
    for name, p in run.module.named_parameters():
        found = primal.get(name)
        if found is None or not torch.allclose(found.to(p), p.detach(), rtol=1e-5, atol=1e-7):
            raise ConfigurationError(
                f"`module` is not the one that the sketched run trained (`{name}` differs): load the parameters at its "
                "end, `module.load_state_dict(sketch.primal, strict=False)`."
            )
    return primal
