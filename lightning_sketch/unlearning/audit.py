"""``audit``: has a model forgotten as much as the one retrained without the examples, neither less nor more?"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.metrics import (
    ForgetEfficacy,
    MembershipAUROC,
    MembershipTPR,
    PredictionDisagreement,
    PredictionKL,
    RelativeParameterDistance,
)
from lightning_sketch.metrics.membership import Attack, Role, check_logits
from lightning_sketch.prediction import DeletionPredictor
from lightning_sketch.prediction.outputs import logits, targets_of
from lightning_sketch.shadow.example_ids import tensors_of
from lightning_sketch.shadow.places import Places
from lightning_sketch.shadow.quiet import quiet
from lightning_sketch.unlearning.protocol import Batches, check_number, loader_of, norm
from lightning_sketch.unlearning.steps import check_units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

Verdict = Literal["passed", "too little", "too much", "undecided"]

_Z = 1.96  # half width of a 95 % interval in standard deviations
_DRAWS = 100  # of the predicted logits, from which the standard errors of what is computed of them are taken


class Measure(NamedTuple):
    """A number with its 95 % interval, which is the number itself where it is exact."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high == self.value:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, eq=False, repr=False)
class AuditReport:
    """What an audit found.

    Args:
        verdict: ``"passed"``, ``"too little"``, ``"too much"`` or ``"undecided"``, by the rule of :func:`audit`.
        reason: the numbers that decided.
        reference: ``"retrained"`` if compared with a really retrained model, ``"predicted"`` if with the counterfactual
            that a sketch predicts.
        control_verdict: what the same rule says of the random perturbation.
        tolerance: that of the rule.
        sizes: examples in ``"forget"``, ``"retain"`` and ``"test"``.
        values: numbers of each model, ``"original"``, ``"unlearned"``, ``"reference"`` and ``"random"``, by name:

            - ``forget_loss``, ``retain_loss``, ``test_loss``: mean cross-entropy, in nats;
            - ``forget_accuracy``, ``retain_accuracy``, ``test_accuracy``: shares;
            - ``forget_kl``, ``test_kl``: :class:`~lightning_sketch.metrics.PredictionKL` from the reference, in nats;
            - ``forget_disagreement``, ``test_disagreement``: with the reference, shares;
            - ``auroc_loss``, ``auroc_confidence``, ``auroc_entropy``, ``auroc_modified_entropy`` and the same with
              ``tpr``: membership attacks that tell the examples to forget from test examples of the same classes, see
              :class:`~lightning_sketch.metrics.MembershipAUROC` and, at a false positive rate of 1 %,
              :class:`~lightning_sketch.metrics.MembershipTPR`; left out if no test example is of these classes;
            - ``forget_efficacy``: :class:`~lightning_sketch.metrics.ForgetEfficacy`; left out without scikit-learn;
            - ``relative_change``: norm of the change of the parameters by that of the original's; left out for a
              predicted reference, as the next;
            - ``parameter_distance``: :class:`~lightning_sketch.metrics.RelativeParameterDistance`.

            Intervals of the attacks are bootstrap intervals over examples; the others hold the error of a predicted
            reference, and are points where nothing was predicted.
    """

    verdict: Verdict
    reason: str
    reference: Literal["retrained", "predicted"]
    control_verdict: Verdict
    tolerance: float
    sizes: Mapping[str, int]
    values: Mapping[str, Mapping[str, Measure]]

    @property
    def passed(self) -> bool:
        """Whether the verdict is ``"passed"``."""
        return self.verdict == "passed"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries, strings and numbers; None stands for numbers that are not finite."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "reference": self.reference,
            "control_verdict": self.control_verdict,
            "tolerance": self.tolerance,
            "sizes": dict(self.sizes),
            "values": {
                model: {name: {key: number(v) for key, v in m._asdict().items()} for name, m in values.items()}
                for model, values in self.values.items()
            },
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def table(self) -> Table:
        """Return a table for rich's ``print``: a row for each number, a column for each model.

        Raises:
            ConfigurationError: rich is not installed.
        """
        try:
            from rich.table import Table
        except ImportError as error:
            raise ConfigurationError(
                "`table` needs rich, which is not installed: run `pip install 'lightning_sketch[examples]'`."
            ) from error
        found = Table(title=f"Audit against the {self.reference} model: {self.verdict}", caption=self.reason)
        found.add_column("")
        for name in ("original", "unlearned", self.reference, f"random perturbation ({self.control_verdict})"):
            found.add_column(name, justify="right")
        for name in self.values["original"]:
            cells = (str(values[name]) if name in values else "" for values in self.values.values())
            found.add_row(name.replace("_", " "), *cells)
        return found

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the losses of all models on the three sets with their intervals; returns figure and axes."""
        from lightning_sketch.plotting import plot_audit  # drawing is optional, so its room loads on demand

        return plot_audit(self, ax)

    def __repr__(self) -> str:
        return f"AuditReport({self.verdict}, against the {self.reference} model: {self.reason})"


def audit(
    original: nn.Module,
    unlearned: nn.Module,
    *,
    forget: Any,
    retain: Any,
    test: Any,
    reference: nn.Module | None = None,
    predictor: DeletionPredictor | None = None,
    delete: Sequence[int] | None = None,
    tolerance: float = 0.5,
    seed: int = 0,
) -> AuditReport:
    """Compare an unlearned classifier with the one retrained without the examples, or with its prediction.

    The rule. Let ``L(S)`` be the mean cross-entropy on a set ``S``, and ``E`` what forgetting does to the reference,
    ``E = L_reference(forget) - L_original(forget)``. On both ``S = forget`` and ``S = test`` the gap
    ``L_unlearned(S) - L_reference(S)`` must lie within ``tolerance * E + error(S)`` of zero, where ``error(S)`` is 1.96
    standard errors of ``L_reference(S)``. A gap below fails as ``"too little"`` and one above as ``"too much"``; if
    both sets fail, ``forget`` decides. With ``tolerance=0.5``, from half to one and a half of what retraining forgets
    passes, and as large a change of the loss elsewhere. The verdict is ``"undecided"``, which is no pass, if ``E <=
    tolerance * E + error(forget)``, so that the original model would pass, too; or if the prediction says of itself
    that it is not reliable: retrain then.

    The rule is of mean losses, which other predictions may have as well: ``forget_kl`` and ``test_kl`` of the report
    say how near the predictions themselves are, beside those of the original.

    A really retrained ``reference`` is taken to be exact: train it from the original's seed, on the same batches and
    with the same normalisation (:class:`~lightning_sketch.Reweight`). The standard errors of a predicted one are taken
    from 100 draws of its logits, Gaussian with the predictions' standard error and truncation, whose deviations are
    independent between classes and the same for all examples, which is the cautious choice for a mean.

    As a control the original is moved in a random direction as far as unlearning has moved it: what passes should do
    better than that. All modules run in evaluation mode and are left as they were.

    Args:
        original: the trained classifier. ``forward`` gives logits ``(B, C)``, or single ones ``(B,)`` or ``(B, 1)``,
            for batches as :func:`~lightning_sketch.prediction.outputs.logits` reads them.
        unlearned: the same after unlearning.
        forget: the examples to forget, a batch or a DataLoader of batches with classes, in any order; read once.
        retain: the rest of the training data, or a part, likewise.
        test: examples that the original was not trained on, likewise.
        reference: the original retrained without ``forget``.
        predictor: of the output ``"logits"``, from a sketch of the original's training; used without ``reference``.
        delete: units of ``forget``, for the predictor.
        tolerance: see above; between 0 and 1.
        seed: of the random perturbation and of the draws.

    Raises:
        ConfigurationError: an empty set, or one with NaN; outputs that are not finite; neither ``reference`` nor
            ``predictor``; any other argument that can not be right.
    """
    check_number("tolerance", tolerance, lambda v: 0 < v < 1, "a number between 0 and 1")
    models = {"original": original, "unlearned": unlearned}
    if reference is not None:
        models["reference"] = reference
    for name, module in models.items():
        if not isinstance(module, nn.Module):
            raise ConfigurationError(f"`{name}` is a {type(module).__name__}: give a torch.nn.Module.")
    if reference is None and predictor is None:
        raise ConfigurationError("`reference` and `predictor` are both None: give the retrained model, or a predictor.")
    generator = torch.Generator().manual_seed(seed)
    models["random"] = _perturbed(original, unlearned, generator)
    sets = {
        name: _read(data, original, name) for name, data in (("forget", forget), ("retain", retain), ("test", test))
    }
    targets: dict[str, Tensor] = {}
    outputs: dict[str, dict[str, Tensor]] = {}
    for model, module in models.items():
        outputs[model] = {}
        for name, batches in sets.items():
            outputs[model][name], targets[name] = _run(module, batches, model, name)
    draws: list[dict[str, Tensor]] = []
    reliable = True
    if reference is None:
        assert predictor is not None
        outputs["reference"], deviations, reliable = _predict(predictor, delete, sets, outputs["original"])
        draws = list(_drawn(outputs["reference"], deviations, generator))
    values = {
        model: {
            **_compared(outputs[model], targets, outputs["reference"], draws, model == "reference"),
            **_attacked(outputs[model], targets),
            **_moved(models.get(model), original, reference),
        }
        for model in ("original", "unlearned", "reference", "random")
    }
    verdict, reason = _judge(values, "unlearned", tolerance, reliable)
    return AuditReport(
        verdict=verdict,
        reason=reason,
        reference="predicted" if reference is None else "retrained",
        control_verdict=_judge(values, "random", tolerance, reliable)[0],
        tolerance=tolerance,
        sizes={name: len(t) for name, t in targets.items()},
        values=values,
    )


def _judge(
    values: Mapping[str, Mapping[str, Measure]], model: str, tolerance: float, reliable: bool
) -> tuple[Verdict, str]:
    """Return the verdict on one of the models, and what decided it."""
    expected = values["reference"]["forget_loss"]
    effect = expected.value - values["original"]["forget_loss"].value
    error = expected.high - expected.value
    if not reliable:
        return "undecided", "the prediction is not reliable for so large a deletion: retrain to compare"
    if effect <= tolerance * effect + error:
        return "undecided", (
            f"the reference raises the forget loss by {effect:.3g} +- {error:.2g} nats, too little to tell it from the "
            "original"
        )
    reasons: dict[Verdict, list[str]] = {"too little": [], "too much": []}
    within = []
    first: Verdict = "passed"
    for name in ("forget_loss", "test_loss"):
        wanted = values["reference"][name]
        gap = values[model][name].value - wanted.value
        allowed = tolerance * effect + wanted.high - wanted.value
        words = f"{name.replace('_', ' ')} {gap:+.3g} nats from the reference's, {allowed:.3g} allowed"
        if abs(gap) <= allowed:
            within.append(words)
            continue
        failed: Verdict = "too little" if gap < 0 else "too much"
        first = failed if first == "passed" else first
        reasons[failed].append(words)
    if first == "passed":
        return first, "; ".join(within)
    return first, "; ".join(reasons["too little"] + reasons["too much"])


def _compared(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    draws: Sequence[Mapping[str, Tensor]],
    is_reference: bool,
) -> dict[str, Measure]:
    """Return losses, accuracies and distances from the reference."""

    def numbers(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
        found = {f"{name}_loss": float(F.cross_entropy(own[name], targets[name])) for name in own}
        found |= {f"{name}_accuracy": float((own[name].argmax(1) == targets[name]).double().mean()) for name in own}
        found |= {f"{name}_kl": float(PredictionKL()(own[name], other[name])) for name in ("forget", "test")}
        return found | {
            f"{name}_disagreement": float(PredictionDisagreement()(own[name], other[name]))
            for name in ("forget", "test")
        }

    value = numbers(outputs, reference)
    # The reference is no distance from itself, whatever it is.
    drawn = [numbers(draw, draw) if is_reference else numbers(outputs, draw) for draw in draws]
    found = {}
    for name, center in value.items():
        squares = [(other[name] - center) ** 2 for other in drawn]
        half = _Z * (sum(squares) / len(squares)) ** 0.5 if squares else 0.0
        found[name] = Measure(center, center - half, center + half)
    return found


def _attacked(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Measure]:
    """Return what membership attacks find, with bootstrap intervals."""
    found: dict[str, Measure] = {}
    alike = torch.isin(targets["test"], targets["forget"])
    if bool(alike.any()):
        both = torch.cat([outputs["forget"], outputs["test"][alike]])
        classes = torch.cat([targets["forget"], targets["test"][alike]])
        member = torch.arange(len(both)) < len(targets["forget"])
        for prefix, make in (("auroc", MembershipAUROC), ("tpr", MembershipTPR)):
            for attack in get_args(Attack):
                metric = make(attack)
                value = metric(both, classes, member)
                found[f"{prefix}_{attack}"] = Measure(float(value), *map(float, metric.interval()))
    if importlib.util.find_spec("sklearn") is not None:
        efficacy = ForgetEfficacy()
        for role in get_args(Role):
            efficacy.update(outputs[role], targets[role], role)
        found["forget_efficacy"] = _exact(efficacy.compute())
    return found


def _moved(module: nn.Module | None, original: nn.Module, reference: nn.Module | None) -> dict[str, Measure]:
    """Return how far the parameters are from the original's, and from the retrained ones."""
    if module is None:
        return {}
    before, after = list(original.parameters()), list(module.parameters())
    change = norm(p.detach() - q.detach() for p, q in zip(after, before, strict=True))
    size = norm(q.detach() for q in before)
    found = {"relative_change": _exact(change / size if size else 0.0)}
    if reference is not None:
        found["parameter_distance"] = _exact(RelativeParameterDistance()(module, original, reference))
    return found


def _exact(value: Tensor | float) -> Measure:
    return Measure(float(value), float(value), float(value))


def _perturbed(original: nn.Module, unlearned: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return the original, moved in a random direction as far as it is from the unlearned one."""
    before, after = dict(original.named_parameters()), dict(unlearned.named_parameters())
    if {n: p.shape for n, p in before.items()} != {n: p.shape for n, p in after.items()}:
        raise ConfigurationError("`unlearned` has other parameters than `original`: give the same model, unlearned.")
    moved = copy.deepcopy(original)
    distance = norm(p.detach() - after[name].detach() for name, p in before.items())
    noise = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in before.items()}
    scale = distance / norm(noise.values())
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.add_((scale * noise[name]).to(p))
    return moved


def _read(data: Any, original: nn.Module, name: str) -> list[Any]:
    """Return the batches of a set.

    Raises:
        ConfigurationError: if there are none, or one has NaN.
    """
    if data is None:
        raise ConfigurationError(f"`{name}` is None: give a batch or a DataLoader.")
    batches = list(Batches(data, original, name))
    if any(bool(t.isnan().any()) for t in tensors_of(batches) if t.is_floating_point()):
        raise ConfigurationError(f"`{name}` holds NaN: leave these examples out.")
    return batches


def _run(module: nn.Module, batches: list[Any], model: str, name: str) -> tuple[Tensor, Tensor]:
    """Return logits ``(N, C)`` float64 and classes ``(N,)`` of all batches, on the CPU.

    Raises:
        ConfigurationError: if they are no logits with classes, or not finite.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with quiet(Places(module), device), torch.no_grad():
        module.eval()
        parts = [logits(module, batch) for batch in Batches(loader_of(batches), module, name)]
    found = _two_classes(torch.cat([part.cpu().double() for part in parts]))
    given = torch.cat([targets_of(batch).cpu() for batch in batches])
    classes = given.long()
    if not torch.equal(classes.to(given.dtype), given):
        raise ConfigurationError(f"`{name}` has targets that are not classes: an audit is of classifiers.")
    if not bool(found.isfinite().all()):
        raise ConfigurationError(f"`{model}` gives outputs on `{name}` that are not finite: it has diverged.")
    classes = classes.reshape(-1) if classes.shape == (len(found), 1) else classes
    check_logits(found, classes)
    return found, classes


def _two_classes(values: Tensor) -> Tensor:
    """Return logits of two classes for single ones."""
    single = values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)
    return F.pad(values.reshape(-1, 1), (1, 0)) if single else values


def _predict(
    predictor: DeletionPredictor,
    delete: Sequence[int] | None,
    sets: Mapping[str, list[Any]],
    original: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """Return the predicted logits, their standard deviations, and whether they are reliable."""
    if delete is None:
        raise ConfigurationError("`delete` is None: give the units of `forget`, whose deletion is to be predicted.")
    units = check_units(delete)
    if predictor.output != "logits":
        raise ConfigurationError(
            f"`predictor` is of the output {predictor.output!r}: give DeletionPredictor(..., output='logits')."
        )
    values, deviations, reliable = {}, {}, True
    for name, batches in sets.items():
        p = predictor.prepare(loader_of(batches)).delete(units)
        baseline = _two_classes(p.baseline.double())
        tolerance = torch.finfo(p.baseline.dtype).eps ** 0.5
        if not torch.allclose(baseline, original[name], rtol=tolerance, atol=tolerance):
            raise ConfigurationError(
                "`original` is not the model that the sketched run trained: load the parameters at its end, "
                "`module.load_state_dict(sketch.primal, strict=False)`."
            )
        values[name] = _two_classes(p.value.double())
        deviations[name] = _two_classes(torch.hypot(p.stderr, p.truncation).double())
        if name != "retain":  # which decides nothing
            reliable = reliable and bool(p.reliable)
    return values, deviations, reliable


def _drawn(
    values: Mapping[str, Tensor], deviations: Mapping[str, Tensor], generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Yield draws of the logits; see :func:`audit`."""
    classes = values["forget"].shape[1]
    for _ in range(_DRAWS):
        z = torch.randn(classes, generator=generator, dtype=torch.float64)
        yield {name: value + z * deviations[name] for name, value in values.items()}
