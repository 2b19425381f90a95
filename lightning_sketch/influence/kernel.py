"""``KernelInfluence``: a trained model without some of its examples, at a cost of outputs instead of parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.influence.deletions import many_deletions, one_deletion
from lightning_sketch.influence.diagnostics import Diagnostics, Stationarity, of_kernel, of_network, step_gap
from lightning_sketch.influence.effect import KernelEffect
from lightning_sketch.influence.fit import Answer, Convention, Fit, Mode, Solver
from lightning_sketch.influence.given import KernelPoints, given_points
from lightning_sketch.influence.jacobian import Network, NetworkPoints, Points
from lightning_sketch.influence.losses import Loss, resolve_loss
from lightning_sketch.influence.response import FactoredResponse


class Options(TypedDict, total=False):
    """Arguments that any :class:`KernelInfluence` takes beside the loss and the ridge; see there."""

    convention: Convention
    sample_weight: Tensor | None
    solver: Solver


@dataclass(frozen=True, eq=False, repr=False)
class Removal:
    """What a deletion changes in the model itself, float64; of ``m`` deletions both tensors have them first.

    Args:
        coefficients: ``da``, ``(n, *out)``, change of the dual coefficients ``a``. Those of an example that is wholly
            deleted change by ``-a``, except to first order.
        unpenalized: ``db``, change of unpenalised parameters, ``(q,)``, or of the coefficients of the basis,
            ``(q, *out)``.
    """

    coefficients: Tensor
    unpenalized: Tensor

    def __repr__(self) -> str:
        return f"Removal(coefficients={tuple(self.coefficients.shape)}, unpenalized={tuple(self.unpenalized.shape)})"


class KernelInfluence:
    """Kernel (dual) influence functions of a model trained with a ridge (Sun and Valaee, arXiv 2605.11239).

    The model minimises ``F = sum_i w_i l(f_i, y_i) + (Lam / 2) ||theta - centre||^2``, so ``theta = centre + J' a``
    with dual coefficients ``a_i = -w_i dl/df_i / Lam``. A deletion with weights ``x`` (1 deletes an example, 0 keeps
    it) changes them by ``da``, the parameters by ``J' da``, and the outputs at any point by ``K da`` with the kernel
    ``K = J J'`` (eq. 8). With the Hessian ``D`` of the weighted losses in the outputs,

    - ``"first_order"``: ``(Lam I + D K) da = (Lam - Lam') a - Lam x a``, the derivative in the weights;
    - ``"newton"``: the same with ``(1 - x) D`` and ``Lam'`` on the left, one Newton step on the loss of what remains
      (eq. 13, divided by a factor ``K`` that all its terms share, which would square its condition number);
    - ``"exact"``: Newton's step for the squared loss, where it is exact if the model is linear in its parameters.

    ``Lam'`` is the ridge that remains: ``Lam`` in the convention ``"fixed"``, and ``Lam (1 - sum(x) / n)`` in
    ``"per_example"``, the paper's, where every example brings its share. All arithmetic and all results are float64.

    A network is taken to be linear in its parameters over the change, so that its Hessian is that of Gauss and Newton.
    For small tanh networks of 51 parameters that left 30 to 80 % of error in the change of outputs with a ridge of 1 or
    2 for 18 and 60 examples, and up to all of it with 0.1, and Newton was no nearer than first order. Compare with some
    retrainings. For models linear in their parameters Newton is nearer than first order where examples have leverage.

    Args:
        points: the training points.
        targets: ``(n,)`` or ``(n, C)``, as the loss takes them.
        loss: ``"squared"`` (half the sum over outputs), ``"softmax"`` (cross-entropy with class indices),
            ``"logistic"`` (targets 0 and 1), ``"poisson"`` (log link); or a convex ``callable(outputs (C,), target)``
            that returns a scalar, whose derivatives are taken by autograd.
        ridge: positive. In the convention ``"fixed"`` it is ``Lam``: ``alpha`` of scikit-learn's ``Ridge``, ``1 / C``
            of its ``LogisticRegression``. In ``"per_example"`` it is ``Lam / n``: ``weight_decay`` of SGD on the mean
            loss.
        convention: ``"fixed"`` or ``"per_example"``.
        sample_weight: ``w``, ``(n,)``, at least 0; None is 1. A loss averaged over ``C`` outputs has ``1 / C``.
        solver: ``"dual"`` factorises a matrix of ``nC`` rows, ``"primal"`` one of ``P`` rows, the parameters;
            ``"matrix_free"`` none, and runs conjugate gradients for each deletion. ``"auto"`` takes the smaller matrix,
            or none where that has more than 20,000 rows.

    Raises:
        ConfigurationError: any argument that can not be right.
    """

    def __init__(
        self,
        points: Points,
        targets: Tensor,
        *,
        loss: str | Callable[[Tensor, Tensor], Tensor] | Loss,
        ridge: float,
        convention: Convention = "fixed",
        sample_weight: Tensor | None = None,
        solver: Solver = "auto",
    ) -> None:
        self._fit = Fit(points, targets, resolve_loss(loss), ridge, convention, sample_weight, solver)
        self._stationarity: Stationarity | None = None
        self._linearity_gap: float | None = None

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        data: tuple[Tensor, Tensor] | Iterable[Any],
        *,
        loss: str | Callable[[Tensor, Tensor], Tensor] | Loss,
        ridge: float,
        centre: Mapping[str, Tensor] | None = None,
        unpenalized: Sequence[str] = (),
        jacobian_at: Mapping[str, Tensor] | None = None,
        tile_size: int | None = None,
        **options: Unpack[Options],
    ) -> KernelInfluence:
        """Return the influence functions of a trained module.

        They are those of a copy of the module, in evaluation mode and float64, so the module is not changed, and may
        be. Parameters that do not require a gradient are constants.

        Args:
            module: called with inputs ``(B, ...)``, it returns outputs ``(B,)`` or ``(B, C)``.
            data: the training data, ``(inputs, targets)`` or a ``DataLoader`` of such batches in a fixed order, in
                which queries number the examples.
            loss: see :class:`KernelInfluence`.
            ridge: see :class:`KernelInfluence`.
            centre: parameters to which the ridge pulls, by name; None is zero, plain weight decay. Diagnostics alone
                depend on it.
            unpenalized: names of parameters without a ridge, such as intercepts.
            jacobian_at: parameters at which the Jacobian is taken, by name; None is the trained ones, for which
                ``theta = centre + J' a`` at any minimum. The initial ones give the "lazy" kernel.
            tile_size: examples whose Jacobian is held at once; None is as many as 1 GiB holds.
            options: ``convention``, ``sample_weight`` and ``solver``.

        Raises:
            ConfigurationError: any argument that can not be right.

        Warns:
            UserWarning: the module is not at a minimum and the convention ``"per_example"`` needs one.
        """
        inputs, targets = _read(data)
        if targets is None:
            raise ConfigurationError("`data` has no targets: give (inputs, targets), or batches of them.")
        network = Network(module, unpenalized, jacobian_at)
        points = NetworkPoints(network, inputs, tile_size)
        influence = cls(points, targets, loss=loss, ridge=ridge, **options)
        at = None if centre is None else network.vectors(centre, "centre")
        influence._stationarity = of_network(influence._fit, points, at)
        if at is not None:
            influence._linearity_gap = step_gap(points, at, network.trained)
        influence._warn()
        return influence

    @classmethod
    def from_kernel(
        cls,
        kernel: Tensor,
        outputs: Tensor,
        targets: Tensor,
        *,
        loss: str | Callable[[Tensor, Tensor], Tensor] | Loss,
        ridge: float,
        basis: Tensor | None = None,
        centre_outputs: Tensor | None = None,
        **options: Unpack[Options],
    ) -> KernelInfluence:
        """Return the influence functions of a fit whose kernel is given, such as that of an infinitely wide network.

        Args:
            kernel: between training points, positive semidefinite. ``(n, n)``: the same for every output, and none
                between outputs, which under the squared loss takes a system of size ``n``. Or ``(n, n, C, C)``, or
                ``(nC, nC)`` with the outputs of an example next to each other.
            outputs: of the fit at the training points, ``(n,)`` or ``(n, C)``.
            targets: of the training points.
            loss: see :class:`KernelInfluence`.
            ridge: see :class:`KernelInfluence`.
            basis: ``(n, q)``, functions whose coefficients, ``q`` for each output, have no ridge, such as a column of
                ones for an intercept.
            centre_outputs: outputs at the centre of the ridge, in the shape of ``outputs``: zeros for a kernel ridge
                regression, the initial network's for a network. Diagnostics alone depend on it; None is not known.
            options: ``convention``, ``sample_weight`` and ``solver``; but not ``"primal"``.

        A ridge ``(theta - centre)' R (theta - centre) / 2`` has the kernel ``J R^-1 J'`` and ``ridge=1``.

        Raises:
            ConfigurationError: any argument that can not be right.

        Warns:
            UserWarning: the fit is not a minimum and the convention ``"per_example"`` needs one.
        """
        # One block for all outputs serves where their Hessian is the same
        block = None if resolve_loss(loss).quadratic or outputs.ndim < 2 else outputs.shape[1]
        points = given_points(kernel, outputs, basis, len(outputs), block)
        k = points.kernel
        if float((k - k.T).abs().max()) > 1e-6 * float(k.abs().max()):
            raise ConfigurationError("`kernel` is not symmetric: give the kernel between training points.")
        points.kernel = (k + k.T) / 2
        influence = cls(points, targets, loss=loss, ridge=ridge, **options)
        if centre_outputs is not None:
            if centre_outputs.shape != outputs.shape:
                raise ConfigurationError(
                    f"`centre_outputs` has shape {tuple(centre_outputs.shape)}: give {tuple(outputs.shape)}."
                )
            f0 = centre_outputs.detach().to(points.outputs).reshape(points.outputs.shape)
            influence._stationarity = of_kernel(influence._fit, f0)
        influence._warn()
        return influence

    @property
    def num_examples(self) -> int:
        """``n``."""
        return self._fit.n

    @property
    def solver(self) -> Solver:
        """``"dual"``, ``"primal"`` or ``"matrix_free"``."""
        return self._fit.solver

    def prepare(self, data: Tensor | tuple[Tensor, Tensor] | Iterable[Any]) -> KernelEffect:
        """Compute outputs and kernels at points where changes are asked for; any number of deletions follow.

        Args:
            data: inputs ``(t, ...)``; ``(inputs, targets)``, for losses; or a ``DataLoader`` of such batches.

        Raises:
            ConfigurationError: if the kernel was given (use :meth:`prepare_kernel`), or the data are not such.
        """
        train = self._network_points("prepare_kernel")
        inputs, targets = _read(data)
        points: Points = NetworkPoints(train.network, inputs, train.tile_size)
        if self.solver == "dual":
            points = KernelPoints(points.cross(train), points.outputs, points.output_shape, points.block, points.basis)
        return KernelEffect(self._fit, points, targets)

    def prepare_kernel(
        self, kernel: Tensor, outputs: Tensor, targets: Tensor | None = None, *, basis: Tensor | None = None
    ) -> KernelEffect:
        """Do the same where the kernel is given.

        Args:
            kernel: between ``t`` points and the training points, in the shape of that of :meth:`from_kernel`:
                ``(t, n)``, ``(t, n, C, C)`` or ``(tC, nC)``.
            outputs: of the fit, ``(t,)`` or ``(t, C)``.
            targets: for losses.
            basis: ``(t, q)``, if one was given for the training points.

        Raises:
            ConfigurationError: shapes that do not fit.
        """
        train = self._fit.points
        if not isinstance(train, KernelPoints):
            raise ConfigurationError("this fit has a module, which gives kernels itself: use `prepare`.")
        if tuple(outputs.shape[1:]) != train.output_shape:
            raise ConfigurationError(
                f"`outputs` has shape {tuple(outputs.shape)}: give (t, {', '.join(map(str, train.output_shape))})."
            )
        if (basis is None) is not (train.basis is None):
            raise ConfigurationError("`basis` must be given here if, and only if, it was for the training points.")
        return KernelEffect(self._fit, given_points(kernel, outputs, basis, self._fit.n, train.block), targets)

    def delete(
        self, examples: Sequence[int] | None = None, *, weights: ArrayLike | None = None, mode: Mode = "newton"
    ) -> Removal:
        """Predict the change of the model itself; arguments are those of :meth:`KernelEffect.delete`.

        Args:
            examples: rows of the training data to delete.
            weights: ``(n,)``, the deletion weight of every example.
            mode: ``"newton"``, ``"first_order"`` or ``"exact"``.

        Raises:
            ConfigurationError: any argument that can not be right.
        """
        return self._removal(self._fit.answer(one_deletion(examples, weights, self._fit.points.outputs), mode))

    def delete_many(self, sets: Sequence[Sequence[int]] | NDArray[Any] | Tensor, *, mode: Mode = "newton") -> Removal:
        """Predict ``m`` deletions: a list of lists of examples, or deletion weights ``(m, n)``.

        Args:
            sets: the deletions.
            mode: as in :meth:`delete`.

        Raises:
            ConfigurationError: any argument that can not be right.
        """
        found = [self._removal(self._fit.answer(x, mode)) for x in many_deletions(sets, self._fit.points.outputs)]
        return Removal(
            torch.stack([removal.coefficients for removal in found]),
            torch.stack([removal.unpenalized for removal in found]),
        )

    def leave_one_out(self, *, mode: Mode = "newton") -> Removal:
        """Predict the deletion of each example alone: row ``i`` deletes example ``i``.

        Args:
            mode: as in :meth:`delete`.
        """
        return self.delete_many([[i] for i in range(self.num_examples)], mode=mode)

    def parameter_change(self, removal: Removal) -> dict[str, Tensor]:
        """Return the change of the module's parameters, ``J' da``, by name, ``(*m, *shape)``.

        Args:
            removal: of this object.

        Raises:
            ConfigurationError: if the kernel was given, so that parameters are not known.
        """
        points = self._network_points("`coefficients` of the removal")
        return points.network.named(*self._flat_change(points, removal))

    def linearity_gap(self, removal: Removal) -> float:
        """Return how far the module is from linear over a predicted change of parameters ``d``.

        ``||f(theta + d) - f(theta) - J d|| / ||f(theta + d) - f(theta)||`` over the training outputs: a prediction can
        hardly be better than that.

        Args:
            removal: of one deletion.

        Raises:
            ConfigurationError: if the kernel was given, or for several deletions.
        """
        points = self._network_points("the model that the kernel is of")
        change = self._flat_change(points, removal)
        if change[0].ndim != 1:
            raise ConfigurationError("`removal` is of several deletions: give one of `delete`.")
        start = points.network.trained
        return step_gap(points, start, (start[0] + change[0], start[1] + change[1]))

    def diagnostics(self) -> Diagnostics:
        """Return stationarity, linearity, condition and leverage of the fit."""
        response = self._fit.response(self._fit.ridge)
        if isinstance(response, FactoredResponse):
            return Diagnostics(self._stationarity, self._linearity_gap, response.condition(), self._fit.leverage())
        return Diagnostics(self._stationarity, self._linearity_gap, None, None)

    def _warn(self) -> None:
        found = self._stationarity
        if self._fit.convention == "per_example" and found is not None and not found.stationary:
            warnings.warn(
                f"the model is not at a minimum of the penalised loss (relative gradient {found.relative:.2g}), as the "
                "convention 'per_example' takes it to be: train on, or check `ridge` and the centre.",
                stacklevel=3,
            )

    def _removal(self, answer: Answer) -> Removal:
        points = self._fit.points
        shape = () if isinstance(points, NetworkPoints) else points.output_shape
        return Removal(self._fit.unpack(answer.coefficients()), answer.basis_change().reshape(-1, *shape))

    def _flat_change(self, points: NetworkPoints, removal: Removal) -> tuple[Tensor, Tensor]:
        """``(*m, P), (*m, q)``."""
        many = removal.coefficients.shape[: -1 - len(points.output_shape)]
        columns = removal.coefficients.reshape(*many, -1)
        penalized = points.pull(columns.reshape(-1, columns.shape[-1]).T).T
        return penalized.reshape(*many, -1), removal.unpenalized

    def _network_points(self, instead: str) -> NetworkPoints:
        points = self._fit.points
        if not isinstance(points, NetworkPoints):
            raise ConfigurationError(f"this fit has a kernel and no module: use {instead}.")
        return points


def _read(data: Any) -> tuple[Tensor, Tensor | None]:
    """Return all inputs and, where there are any, all targets of tensors or of batches."""
    if isinstance(data, Tensor):
        return data.detach(), None
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        inputs, targets = data
        if len(inputs) != len(targets) or not len(inputs):
            raise ConfigurationError(
                f"`data` has {len(inputs)} inputs and {len(targets)} targets: give as many, and at least one."
            )
        return inputs.detach(), targets.detach()
    if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
        raise ConfigurationError("`data` is a DataLoader that shuffles: give one with shuffle=False.")
    if not isinstance(data, Iterable):
        raise ConfigurationError(f"`data` is {type(data).__name__}: give (inputs, targets) or a DataLoader of them.")
    batches = []
    for batch in data:
        whole = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
        if not whole and not isinstance(batch, Tensor):
            raise ConfigurationError("`data` gives other batches than (inputs, targets): give tensors.")
        batches.append(_read(batch))
    if not batches:
        raise ConfigurationError("`data` has no batch: give some.")
    known = [targets for _, targets in batches if targets is not None]
    return torch.cat([inputs for inputs, _ in batches]), torch.cat(known) if known else None
