"""``StabilityMonitor``: say in the logger, while training runs, how large a deletion can be predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sketch.callbacks._carrying import CarriesJets
from lightning_sketch.callbacks._figures import log_figure
from lightning_sketch.callbacks.sketch import SketchCallback
from lightning_sketch.directions import Directions, plain_steps, random_signs
from lightning_sketch.errors import ConfigurationError, check_count
from lightning_sketch.optim import StableAdamW
from lightning_sketch.prediction.stability import TOLERANCE, StabilityProfile, profile_of_sizes, stability_profile
from lightning_sketch.shadow.carried import AttributeWatch
from lightning_sketch.shadow.record import StepRecord, TrackedTensors
from lightning_sketch.shadow.update import OptimizerSnapshot
from lightning_sketch.shadow.weighting import Normalization, PerExampleLoss, training_loss
from lightning_sketch.shadow.wrapping import arguments_of, own_training_step, piecewise_linear

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIRST = 10  # optimizer steps after which whole runs are measured for the first time
SHOWN = 3  # parameters that a warning names
# Below these `eps` is taken for a cause: outside the root it is compared with a gradient, inside with its square
SMALL_OUTSIDE, SMALL_INSIDE = 1e-2, 1e-4


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a :class:`StabilityMonitor` found at one point of training.

    Args:
        step: optimizer steps done.
        profile: of the monitored output.
        parameter_sensitivity: norm of the change of all parameters, to the first order, over their norm, for a deletion
            of length one; the root mean square over the directions.
        growing: the parameters whose coefficients grow fastest with the order, with ``log2`` of the growth per order.
    """

    step: int
    profile: StabilityProfile
    parameter_sensitivity: float
    growing: list[tuple[str, float]]


class StabilityMonitor(CarriesJets):
    """Log how sensitive a run is to the deletion of its examples, order by order.

    Beside a :class:`SketchCallback` it reads that one's coefficients. Alone it carries a few of its own: ``probes``
    random sign patterns over the units and the common mode, all real, along which deletions lie. By default it does so
    through a short window of steps, so that what is measured is the sensitivity to what was deleted within the window.

    Logged by ``pl_module.log``, so that every logger, the progress bar, ``EarlyStopping`` and ``ModelCheckpoint`` see
    it:

    - ``stability/log2_norm_order_{r}``: ``log2 ||F_r||`` (:class:`StabilityProfile`);
    - ``stability/growth``: its slope, bits per order; above 0 the series of some deletions diverge;
    - ``stability/trusted_units``: the largest number of random units whose deletion is predicted to ``tolerance``;
    - ``stability/parameter_sensitivity``: relative change of the parameters, to the first order, on the deletion of one
      unit;
    - ``stability/spread``: standard deviation of the log2 terms over the probes.

    Windows begin with the first step and at multiples of ``every_n_steps``, and are measured where they end; whole runs
    are measured after at most 10 steps, at multiples of ``every_n_steps`` and after the last step. Between, loggers are
    given the last values. The run itself is left alone: parameters, optimizer state and random numbers are
    bit-identical.

    Args:
        every_n_steps: optimizer steps between two measurements.
        window: how many optimizer steps the probes are carried through; ``None`` = the whole run.
        probes: number of random sign patterns.
        degree: highest order, at least 2 for a growth.
        output: whose sensitivity: ``"train_loss"`` of the last batch; ``"val_loss"`` of the first validation batch,
            which is what ``validation_step`` returns, or logs as ``val_loss``; or ``callable(module, batch) -> tensor``
            of the last training batch.
        tolerance: relative error for ``trusted_units``.
        units: as in :class:`SketchCallback`.
        loss: as in :class:`SketchCallback`.
        ids: as in :class:`SketchCallback`.
        normalization: as in :class:`SketchCallback`.
        seed: of the sign patterns.

    At the end of training the profile and its course are logged as figures, where a logger takes them.

    Beside a :class:`SketchCallback` the degree, the units and the directions are that one's, and ``window``,
    ``probes``, ``degree``, ``units``, ``loss``, ``ids``, ``normalization`` and ``seed`` are not used.

    Attributes:
        history: the measurements of the last fit.

    Raises:
        ConfigurationError: in the constructor, in ``setup`` or on the first batch, naming what is not supported.
        FidelityError: during training, if the tracked run is not the user's run.
        UnsupportedOperatorError: on the first batch, if an operator has no Taylor rule.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        window: int | None = 10,
        probes: int = 2,
        degree: int = 3,
        output: Literal["train_loss", "val_loss"] | Callable[[Any, Any], Tensor] = "train_loss",
        *,
        tolerance: float = TOLERANCE,
        units: Sequence[int] | np.ndarray | None = None,
        loss: Literal["auto"] | PerExampleLoss = "auto",
        ids: Callable[[Any], Any] | str = "auto",
        normalization: Normalization = "batch",
        seed: int = 0,
    ) -> None:
        super().__init__(units, ids, degree=degree, loss=loss, normalization=normalization)
        check_count("every_n_steps", every_n_steps)
        check_count("probes", probes)
        if window is not None:
            check_count("window", window)
            if window > every_n_steps:
                raise ConfigurationError(
                    f"`window` is {window} steps and `every_n_steps` {every_n_steps}: windows would overlap; give a "
                    "shorter one, or `window=None` for the whole run."
                )
        if output not in ("train_loss", "val_loss") and not callable(output):
            raise ConfigurationError(
                f"`output` must be 'train_loss', 'val_loss' or a callable(module, batch) -> tensor but is {output!r}."
            )
        if not 0 < tolerance < 1:
            raise ConfigurationError(f"`tolerance` is {tolerance}: give a relative error between 0 and 1.")
        self.every_n_steps = every_n_steps
        self.window = window
        self.probes = probes
        self.output = output
        self.tolerance = tolerance
        self.seed = seed
        self.history: list[Measurement] = []

    @override
    def _forget(self) -> None:
        super()._forget()
        self._beside: SketchCallback | None = None
        self._seen: list[Tensor] = []  # the units of every batch in the window
        self._until = 0  # the optimizer step after which is measured next
        self._end = math.inf  # optimizer steps of the run
        self._validation_batch: Any = None
        self._values: dict[str, float] = {}
        self._changed_values = False
        self._warned = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before dataloaders are built: looks for a sketch beside which there is nothing to be carried."""
        if stage != "fit":
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._beside = next((c for c in callbacks if isinstance(c, SketchCallback)), None)
        if self._beside is None:
            super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when optimizer and data exist: says the cost, and begins to follow the run, or waits for a window."""
        self.history = []
        if self.output == "val_loss" and not trainer.enable_validation:
            raise ConfigurationError("`output='val_loss'` needs validation data: give a `val_dataloader`.")
        if math.isfinite(trainer.estimated_stepping_batches):
            self._end = int(trainer.estimated_stepping_batches)
        if self._beside is not None:
            rank_zero_info(
                f"{self._name}: reads the coefficients of the SketchCallback every {self.every_n_steps} steps, which "
                "costs less than a step."
            )
        elif self.window is None:
            super().on_train_start(trainer, pl_module)
        else:
            self._join(trainer, pl_module)
        self._until = self._next(trainer.global_step)

    def _next(self, step: int) -> int:
        """Return the first optimizer step after ``step`` of them after which is measured."""
        if self._beside is None and self.window is not None:
            return math.ceil(step / self.every_n_steps) * self.every_n_steps + int(min(self.window, self._end))
        regular = (step // self.every_n_steps + 1) * self.every_n_steps
        first = min(FIRST, self.every_n_steps)
        return int(min(n for n in (first, regular, self._end) if n > step))

    @override
    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> Directions:
        return random_signs(self.probes, self._units.num_units, self.seed)

    @override
    def _announce(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert self._drawn is not None
        count = self._drawn.num_directions
        cost = count * plain_steps(self.degree, real=True)
        carried = f"{count} real directions of degree {self.degree}"
        if self.window is None:
            rank_zero_info(f"{self._name}: {carried} through the whole run; a step costs up to {cost:.0f} plain steps.")
            return
        share = self.window / self.every_n_steps
        rank_zero_info(
            f"{self._name}: {carried} through {self.window} of every {self.every_n_steps} steps, each of which costs "
            f"up to {cost:.0f} plain steps more; the run as a whole up to {share * cost:.0%} more."
        )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called for every batch: begins a window where one is due."""
        if self._beside is not None:
            return
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.window is None or self._following or self._given_up:
            return
        if trainer.global_step == self._until - min(self.window, self._end):
            self._open(trainer, pl_module)

    def _open(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin to carry jets that vanish so far: what came before the window is taken as it is."""
        self._attributes = AttributeWatch()
        self._first_step = self._steps = trainer.global_step
        self._blocks = [] if self._size is None else list(self._make_blocks(self._size, module))
        self._following = True

    def _close(self) -> None:
        self._tracked, self._gradients = TrackedTensors(), TrackedTensors()
        self._blocks, self._seen, self._last = [], [], None
        self._following = False

    @override
    def _carry(
        self, trainer: pl.Trainer, module: pl.LightningModule, snapshot: OptimizerSnapshot, records: list[StepRecord]
    ) -> None:
        super()._carry(trainer, module, snapshot, records)
        if self.window is not None:
            self._seen += [record.units for record in records]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Called where a checkpoint is saved: the coefficients of a whole run. A window that is interrupted is lost."""
        return super().state_dict() if self.window is None else {}

    @override
    def _lost(self) -> str:
        self._values.update({"stability/growth": math.inf, "stability/trusted_units": 0.0})
        self._changed_values = True
        return "its stability is not monitored any more"

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called for every validation batch: keeps the first."""
        if self.output == "val_loss" and batch_idx == 0 and dataloader_idx == 0:
            self._validation_batch = batch

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called when a batch is done: measures where it is due, and logs."""
        if self._beside is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step >= self._until:
            self._measure(trainer, pl_module)
            if self.window is not None:
                self._close()
            self._until = self._next(trainer.global_step)
        if self._values and (self._changed_values or batch_idx == 0):  # Lightning keeps them until the epoch ends
            shown = ("stability/growth", "stability/trusted_units")
            for name, value in self._values.items():
                pl_module.log(name, value, prog_bar=name in shown, batch_size=1)
            self._changed_values = False

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        carrier: CarriesJets = self if self._beside is None else self._beside
        batch = carrier._ranks.share(self._validation_batch)[0]
        if carrier._given_up or carrier._last is None or (self.output == "val_loss" and batch is None):
            return
        coefficients, directions, norms = carrier.measure(module, self._output(batch))
        if self._seen:
            seen = torch.cat(self._seen).unique().cpu().numpy()
            directions = directions[:, seen[seen >= 0]]
        params = dict(module.named_parameters())
        length = math.sqrt(sum(float(params[name].detach().double().square().sum()) for name in norms))
        found = Measurement(
            step=trainer.global_step,
            profile=stability_profile(coefficients, directions),
            parameter_sensitivity=relative_size(norms, directions, length),
            growing=fastest(norms, directions),
        )
        self.history.append(found)
        profile = found.profile
        self._values = {
            **{f"stability/log2_norm_order_{r}": float(norm) for r, norm in enumerate(profile.log2_norms, 1)},
            "stability/parameter_sensitivity": found.parameter_sensitivity,
            "stability/spread": profile.spread,
        }
        if profile.degree > 1:
            self._values["stability/growth"] = profile.growth
            trusted = 0 if piecewise_linear(module) else profile.trusted_units(self.tolerance)
            self._values["stability/trusted_units"] = float(trusted)
            if not self._warned and (profile.growth > 0 or not trusted):
                self._warned = True
                self._explain(trainer, module, found, trusted)
        self._changed_values = True

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called at the regular end of training: gives figures to the loggers that take them."""
        if not self.history or not trainer.loggers or find_spec("matplotlib") is None:
            return
        from matplotlib.figure import Figure  # not those of pyplot, which a user may be showing

        for key, draw in (("stability/profile", self.history[-1].profile.plot), ("stability/sensitivity", self.plot)):
            figure = Figure(layout="constrained")
            draw(figure.subplots())
            log_figure(trainer, key, figure, trainer.global_step)

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw ``log2 ||F_r||`` of every order over training; returns figure and axes.

        Raises:
            ConfigurationError: nothing has been measured yet.
        """
        from lightning_sketch.plotting import plot_sensitivity

        if not self.history:
            raise ConfigurationError("`plot` has nothing to draw: fit a Trainer with this callback first.")
        return plot_sensitivity([m.step for m in self.history], [m.profile for m in self.history], ax)

    def _output(self, validation_batch: Any) -> Callable[[Any, tuple[Any, ...]], Tensor]:
        if self.output == "val_loss":
            return lambda module, args: _validation_loss(module, validation_batch)
        if self.output == "train_loss":
            return _train_loss
        output: Any = self.output
        return lambda module, args: output(module, args[0])

    def _explain(self, trainer: pl.Trainer, module: pl.LightningModule, found: Measurement, trusted: int) -> None:
        """Say of a run whose series does not fall fast enough which parameters are at fault, why, and what helps."""
        growth = found.profile.growth
        what = f"the Taylor terms grow by {growth:.1f} bits per order" if growth > 0 else "the Taylor series falls"
        parameters = ", ".join(f"`{name}` ({bits:+.1f})" for name, bits in found.growing[:SHOWN])
        where = f" The coefficients of {parameters} grow fastest, in bits per order." if growth > 0 else ""
        many = "many" if trusted else "one"
        causes = [
            *_singular_updates(trainer.optimizers[0]),
            *[
                f"{kink} is piecewise linear, and a deletion crosses kinks that no derivative sees: use GELU, SiLU or "
                "Tanh, and average pooling"
                for kink in piecewise_linear(module)[:1]
            ],
            "the learning rate is too high for so little warm-up or clipping: lower it",
            f"units are too large (the largest holds {self._largest_share():.1%} of the examples): use finer `units`",
        ]
        rank_zero_warn(
            f"{self._name}: at optimizer step {found.step} {what}, and the deletion of {many} of "
            f"{found.profile.num_units} units cannot be predicted to {self.tolerance:.0%}.{where} Usual causes and "
            f"cures, the likeliest first: {'; '.join(f'({i}) {cause}' for i, cause in enumerate(causes, 1))}."
        )

    def _largest_share(self) -> float:
        carrier: CarriesJets = self if self._beside is None else self._beside
        of_example = carrier._units.of_example
        counts = np.bincount(of_example[of_example >= 0])
        return float(counts.max() / len(of_example))


def _singular_updates(optimizer: Optimizer) -> list[str]:
    """Say why an adaptive optimizer's update is singular close to gradients of zero."""
    smallest = min((group["eps"] for group in optimizer.param_groups if "eps" in group), default=math.inf)
    name = type(optimizer).__name__
    if isinstance(optimizer, StableAdamW):
        return [f"{name} with eps={smallest:g} inside the root: give 1e-3"] if smallest < SMALL_INSIDE else []
    if smallest < SMALL_OUTSIDE:
        return [
            f"{name} with eps={smallest:g} outside the root is singular where gradients are small: use StableAdamW, "
            "whose eps=1e-3 stands inside the root"
        ]
    return []


def _train_loss(module: Any, args: tuple[Any, ...]) -> Tensor:
    loss = training_loss(own_training_step(module)(*args))
    assert loss is not None, "a step whose training_step returned None is not recorded"
    return loss


def _validation_loss(module: Any, batch: Any) -> Tensor:
    """What ``validation_step`` returns as its loss, or logs as ``val_loss``. Call it under ``quiet``."""
    logged: dict[str, Any] = {}
    module.__dict__.update(
        log=lambda name, value, *_, **__: logged.update({name: value}),
        log_dict=lambda values, *_, **__: logged.update(values),
    )
    module.eval()
    loss = training_loss(module.validation_step(*arguments_of(module.validation_step, batch, 0)))
    loss = logged.get("val_loss") if loss is None else loss
    if not isinstance(loss, Tensor):
        raise ConfigurationError(
            "`output='val_loss'`: `validation_step` returns no loss and logs no tensor as 'val_loss': return the loss, "
            "or give `output=callable(module, batch) -> tensor`."
        )
    return loss


def relative_size(norms: dict[str, np.ndarray], directions: np.ndarray, length: float) -> float:
    """Return the typical norm of the first order of all parameters for a deletion of length one, over ``length``."""
    if not norms or not length:
        return 0.0
    squares = 2 * np.stack([n[:1] for n in norms.values()])
    together = np.logaddexp2.reduce(squares, axis=0) / 2
    return float(np.exp2(profile_of_sizes(together, directions).log2_terms[0])) / length


def fastest(norms: dict[str, np.ndarray], directions: np.ndarray) -> list[tuple[str, float]]:
    """Return the parameters and the growth of their terms, in bits per order, the fastest first."""
    growths = []
    for name, sizes in norms.items():
        terms = profile_of_sizes(sizes, directions).log2_terms
        if len(terms) > 1 and np.isfinite(terms[[0, -1]]).all():
            growths.append((name, float(terms[-1] - terms[0]) / (len(terms) - 1)))
    return sorted(growths, key=lambda found: -found[1])
