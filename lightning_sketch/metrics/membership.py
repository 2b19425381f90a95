"""Membership inference: can it be told from a classifier's outputs which examples it was trained on?

All arithmetic is float64, whatever the dtype of the logits. A model that never saw the examples has an AUROC of 0.5 if
they and the non-members are of the same distribution: for a deleted class, take non-members of that class.
"""

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from lightning_sketch.errors import ConfigurationError, check_choice, check_count
from lightning_sketch.metrics.plotted import PlottedMetric

Attack = Literal["loss", "confidence", "entropy", "modified_entropy"]
Role = Literal["forget", "retain", "test"]

_DRAWS_AT_ONCE = 100  # bounds the memory of a bootstrap


def membership_scores(logits: Tensor, targets: Tensor, attack: Attack) -> Tensor:
    """Return how much every example looks like a member, ``(N,)`` float64: the larger, the more.

    With ``p = softmax(logits)`` and the own class ``y``:

    - ``"loss"``: ``log p_y``, the cross-entropy's negative;
    - ``"confidence"``: ``max_c p_c``, for which no label is needed (Salem et al., *ML-Leaks*, arXiv 1806.01246);
    - ``"entropy"``: ``sum_c p_c log p_c``;
    - ``"modified_entropy"``: ``(1 - p_y) log p_y + sum_(c != y) p_c log(1 - p_c)`` (Song and Mittal, *Systematic
      Evaluation of Privacy Risks of Machine Learning Models*, arXiv 2003.10595).

    Probabilities near 1 keep their relative distance from 1, so that very sure predictions still differ.

    Args:
        logits: ``(N, C)``, at least two classes.
        targets: ``(N,)`` integers, the own classes.
        attack: see above.

    Raises:
        ConfigurationError: an unknown attack, other shapes, targets that are not classes, or logits that are not
            finite.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [20.0, 0.0]])
        >>> membership_scores(logits, torch.tensor([0, 0]), "loss").exp()
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    check_choice("attack", attack, get_args(Attack))
    check_logits(logits, targets)
    log_p, log_rest = _log_probabilities(logits.double())
    p, rest = log_p.exp(), log_rest.exp()
    own = targets[:, None]
    if attack == "loss":
        return log_p.gather(1, own)[:, 0]
    if attack == "confidence":  # of two that both round to 1, the one with less left over is the surer
        return -log_rest.amin(dim=1)
    if attack == "entropy":
        return (p * log_p).sum(dim=1)
    others = (p * log_rest).scatter(1, own, 0.0).sum(dim=1)
    return (rest.gather(1, own) * log_p.gather(1, own))[:, 0] + others


class _MembershipMetric(PlottedMetric):
    """Keeps the scores of members and of others."""

    is_differentiable = False
    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    members: list[Tensor]
    others: list[Tensor]

    def __init__(self, attack: Attack, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("attack", attack, get_args(Attack))
        self.attack: Attack = attack
        self.add_state("members", [], dist_reduce_fx="cat")
        self.add_state("others", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor, member: Tensor) -> None:
        """Add examples.

        Args:
            logits: ``(N, C)``.
            targets: ``(N,)`` integers, the classes.
            member: ``(N,)`` bool, whether the original model was trained on the example.
        """
        scores = membership_scores(logits, targets, self.attack)
        if not isinstance(member, Tensor) or member.shape != scores.shape or member.dtype != torch.bool:
            raise ConfigurationError(f"`member` must be a bool tensor of shape {tuple(scores.shape)}.")
        self.members.append(scores[member])
        self.others.append(scores[~member])

    def compute(self) -> Tensor:
        """Return the value."""
        return torch.tensor(self._value(*(counts[None] for counts in self._counts()))[0], dtype=torch.float64)

    def interval(self, level: float = 0.95, *, samples: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return the percentile bootstrap interval of the value, two scalars, of the examples of this process.

        Members and others are drawn anew, with replacement, each as many as there are.

        Args:
            level: of the interval.
            samples: draws.
            seed: of the draws.

        Raises:
            ConfigurationError: ``level`` is not between 0 and 1, or ``samples`` not positive; no member, or no other.
        """
        if not 0 < level < 1:
            raise ConfigurationError(f"`level` is {level}: give a probability between 0 and 1.")
        check_count("samples", samples)
        members, others = self._counts()
        generator = np.random.default_rng(seed)
        values = [
            self._value(_resampled(members, rows, generator), _resampled(others, rows, generator))
            for rows in np.diff([*range(0, samples, _DRAWS_AT_ONCE), samples])
        ]
        low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
        return torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)

    def _counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return how many members and others have each of the distinct scores, in rising order, ``(V,)``."""
        if not len(self.members):
            raise ConfigurationError("the metric has no examples yet: call `update` first.")
        members, others = (dim_zero_cat(scores).cpu().numpy() for scores in (self.members, self.others))
        if not len(members) or not len(others):
            raise ConfigurationError("`member` is the same for all examples: give members and others.")
        distinct, place = np.unique(np.concatenate([members, others]), return_inverse=True)
        size = len(distinct)
        return (
            np.bincount(place[: len(members)], minlength=size),
            np.bincount(place[len(members) :], minlength=size),
        )

    def _value(self, members: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the value, ``(S,)``, of numbers of members and others that have each score, ``(S, V)``."""
        raise NotImplementedError


class MembershipAUROC(_MembershipMetric):
    """Area under the ROC curve of a membership attack: members are to be told from others by one score.

    0.5 is chance, 1 tells all. A good unlearned model has the value of the retrained one, which for examples of the
    same distribution is about 0.5; clearly below, the examples are conspicuous for having been forgotten too much.
    Ties count half. Several processes each need an update.

    Shape:
        - logits: ``(N, C)``.
        - targets: ``(N,)`` integers.
        - member: ``(N,)`` bool.
        - result: scalar, float64.

    Args:
        attack: ``"loss"``, ``"confidence"``, ``"entropy"`` or ``"modified_entropy"``, see :func:`membership_scores`.
        kwargs: those of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: an unknown attack; in ``update``, what can not be right; in ``compute``, no member or no
            other.

    Example:
        >>> logits = torch.tensor([[5.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> auroc = MembershipAUROC("loss")
        >>> auroc(logits, torch.zeros(4, dtype=torch.long), torch.tensor([True, True, False, False]))
        tensor(0.7500, dtype=torch.float64)
    """

    def __init__(self, attack: Attack = "modified_entropy", **kwargs: Any) -> None:
        super().__init__(attack, **kwargs)

    def _value(self, members: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
        below = np.cumsum(others, axis=1) - others
        pairs = members.sum(axis=1) * others.sum(axis=1)
        return np.asarray((members * (below + others / 2)).sum(axis=1) / pairs)


class MembershipTPR(_MembershipMetric):
    """True positive rate of a membership attack at a low false positive rate (Carlini et al., arXiv 2112.03570).

    The largest share of members found by a threshold that takes at most ``max_fpr`` of the others for members; not
    interpolated, so that with fewer than ``1 / max_fpr`` others it is the share found without any error. Chance gives
    ``max_fpr``. Several processes each need an update.

    Shape:
        - logits: ``(N, C)``.
        - targets: ``(N,)`` integers.
        - member: ``(N,)`` bool.
        - result: scalar, float64.

    Args:
        attack: ``"loss"``, ``"confidence"``, ``"entropy"`` or ``"modified_entropy"``, see :func:`membership_scores`.
        max_fpr: the false positive rate allowed.
        kwargs: those of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: as :class:`MembershipAUROC`; a rate that is not from 0 to 1.

    Example:
        >>> logits = torch.tensor([[5.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> tpr = MembershipTPR("loss")
        >>> tpr(logits, torch.zeros(4, dtype=torch.long), torch.tensor([True, True, False, False]))
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, attack: Attack = "modified_entropy", max_fpr: float = 0.01, **kwargs: Any) -> None:
        super().__init__(attack, **kwargs)
        if not 0 <= max_fpr <= 1:
            raise ConfigurationError(f"`max_fpr` is {max_fpr}: give a rate from 0 to 1.")
        self.max_fpr = max_fpr

    def _value(self, members: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
        found, wrong = (np.cumsum(counts[:, ::-1], axis=1) for counts in (members, others))
        allowed = wrong <= self.max_fpr * others.sum(axis=1, keepdims=True)
        return np.asarray(np.where(allowed, found, 0).max(axis=1) / members.sum(axis=1))


class ForgetEfficacy(PlottedMetric):
    """Share of the examples to forget that a trained attack takes for never trained on (Jia et al., arXiv 2304.04934).

    A support vector machine (radial basis functions, ``C=3``, ``gamma="auto"``, classes balanced by weights) learns
    to tell retained examples from test examples by one score of this model, and is asked about those to forget. The
    retrained model's efficacy is the one to reach. Needs scikit-learn. Several processes each need an update of every
    role.

    Shape:
        - logits: ``(N, C)``.
        - targets: ``(N,)`` integers.
        - result: scalar, float64.

    Args:
        attack: the score, see :func:`membership_scores`.
        kwargs: those of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: an unknown attack; in ``update``, what can not be right; in ``compute``, a role without
            examples, or scikit-learn is not installed.

    Example:
        >>> efficacy = ForgetEfficacy("loss")
        >>> sure, unsure, classes = torch.tensor([[3.0, 0.0]] * 8), torch.zeros(8, 2), torch.zeros(8, dtype=torch.long)
        >>> efficacy.update(sure, classes, "retain")
        >>> efficacy.update(unsure, classes, "test")
        >>> efficacy.update(torch.cat([sure[:2], unsure[:6]]), classes, "forget")
        >>> efficacy.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None  # the retrained model's is right
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, attack: Attack = "modified_entropy", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("attack", attack, get_args(Attack))
        self.attack: Attack = attack
        for role in get_args(Role):
            self.add_state(role, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor, role: Role) -> None:
        """Add examples.

        Args:
            logits: ``(N, C)``.
            targets: ``(N,)`` integers, the classes.
            role: ``"forget"``, ``"retain"`` or ``"test"``, of all of them.
        """
        check_choice("role", role, get_args(Role))
        getattr(self, role).append(membership_scores(logits, targets, self.attack))

    def compute(self) -> Tensor:
        """Return the share."""
        try:
            from sklearn.svm import SVC
        except ImportError as error:
            raise ConfigurationError(
                "`ForgetEfficacy` needs scikit-learn: run `pip install 'lightning_sketch[examples]'`."
            ) from error
        scores: dict[str, NDArray[np.float64]] = {}
        for role in get_args(Role):
            kept = getattr(self, role)
            scores[role] = dim_zero_cat(kept).cpu().numpy() if len(kept) else np.empty(0)
            if not len(scores[role]):
                raise ConfigurationError(f"`role` has never been {role!r}: give examples of all three roles.")
        attacker = SVC(C=3, kernel="rbf", gamma="auto", class_weight="balanced")
        known = np.concatenate([scores["retain"], scores["test"]])
        attacker.fit(known[:, None], np.arange(len(known)) < len(scores["retain"]))
        return torch.tensor(1 - attacker.predict(scores["forget"][:, None]).mean(), dtype=torch.float64)


def check_logits(logits: object, targets: object = None, name: str = "logits") -> None:
    """Refuse logits that are not ``(N, C)`` or not finite, and targets that are not their classes.

    Raises:
        ConfigurationError: naming the argument.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigurationError(f"`{name}` is {found}: give logits (N, C) of two classes or more.")
    if not bool(logits.isfinite().all()):
        raise ConfigurationError(f"`{name}` holds NaN or infinity: leave out models that diverged.")
    if targets is None:
        return
    if not isinstance(targets, Tensor) or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ConfigurationError(f"`targets` must be int64 classes of shape ({len(logits)},).")
    if bool(((targets < 0) | (targets >= logits.shape[1])).any()):
        raise ConfigurationError(f"`targets` must be classes from 0 to {logits.shape[1] - 1}.")


def _log_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log p`` and ``log(1 - p)``, ``(N, C)``, without cancellation where ``p`` is near 1."""
    top = logits.argmax(dim=1, keepdim=True)
    others = logits.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True)
    log_p = logits.log_softmax(dim=1)
    log_rest_of_top = others - logits.logsumexp(dim=1, keepdim=True)
    log_p = log_p.scatter(1, top, torch.log1p(-log_rest_of_top.exp()))
    log_rest = torch.log1p(-log_p.exp().scatter(1, top, 0.0))
    return log_p, log_rest.scatter(1, top, log_rest_of_top)


def _resampled(counts: NDArray[np.int64], rows: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return the numbers of examples that have each score, ``(rows, V)``, when as many are drawn with replacement."""
    places = np.repeat(np.arange(len(counts)), counts)
    drawn = places[generator.integers(0, len(places), (rows, len(places)))]
    drawn += len(counts) * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * len(counts)).reshape(rows, -1)
