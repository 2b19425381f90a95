"""Weights enter the losses of torch.nn.functional as in a loop over examples."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.shadow.weighting import LossWeighting, WeightedReductions, check_normalization

B, C, T = 4, 3, 2
WEIGHTS = torch.tensor([0.3, 1.7, 0.0, -0.6], dtype=torch.float64)
WEIGHTS_OF_CLASSES = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, C, shape, generator=torch.Generator().manual_seed(seed))


LOGITS, TARGET = draw(B, C), classes(B)
SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
P, Q = draw(B, C).softmax(-1), draw(B, C, seed=2).softmax(-1)
PADDED = torch.tensor([[0, 2], [1, -100], [-100, -100], [2, 0]])

# name -> (loss of some rows of the tensors, the tensors); every reduction of its is a plain one over these rows'
# elements
PLAIN: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "cross_entropy": (F.cross_entropy, (LOGITS, TARGET)),
    "cross_entropy label smoothing": (
        lambda x, y, reduction: F.cross_entropy(x, y, reduction=reduction, label_smoothing=0.2),
        (LOGITS, TARGET),
    ),
    "cross_entropy probabilities": (F.cross_entropy, (LOGITS, Q)),
    "cross_entropy probabilities and class weights": (
        lambda x, y, reduction: F.cross_entropy(x, y, WEIGHTS_OF_CLASSES, reduction=reduction),
        (LOGITS, Q),
    ),
    "cross_entropy (B, C, T)": (F.cross_entropy, (draw(B, C, T), classes(B, T))),
    "nll_loss": (F.nll_loss, (LOGITS.log_softmax(-1), TARGET)),
    "mse_loss": (F.mse_loss, (LOGITS, Q)),
    "mse_loss flat": (F.mse_loss, (draw(B), draw(B, seed=1))),
    "l1_loss": (F.l1_loss, (LOGITS, Q)),
    "smooth_l1_loss": (F.smooth_l1_loss, (LOGITS, Q)),
    "huber_loss": (F.huber_loss, (LOGITS, Q)),
    "binary_cross_entropy": (F.binary_cross_entropy, (P, Q)),
    "binary_cross_entropy element weights": (
        lambda x, y, w, reduction: F.binary_cross_entropy(x, y, weight=w, reduction=reduction),
        (P, Q, draw(B, C, seed=5).abs()),
    ),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, (LOGITS, Q)),
    "binary_cross_entropy_with_logits pos_weight": (
        lambda x, y, reduction: F.binary_cross_entropy_with_logits(
            x, y, pos_weight=WEIGHTS_OF_CLASSES, reduction=reduction
        ),
        (LOGITS, Q),
    ),
    "poisson_nll_loss": (F.poisson_nll_loss, (LOGITS, Q)),
    "gaussian_nll_loss": (F.gaussian_nll_loss, (LOGITS, Q, P)),
    "hinge_embedding_loss": (F.hinge_embedding_loss, (draw(B), SIGNS)),
    "soft_margin_loss": (F.soft_margin_loss, (draw(B), SIGNS)),
    "multi_margin_loss": (F.multi_margin_loss, (LOGITS, TARGET)),
    "multilabel_margin_loss": (F.multilabel_margin_loss, (LOGITS, torch.tensor([[0, 2, -1]] * B))),
    "multilabel_soft_margin_loss": (F.multilabel_soft_margin_loss, (LOGITS, (Q > 0.3).double())),
    "margin_ranking_loss": (F.margin_ranking_loss, (draw(B), draw(B, seed=1), SIGNS)),
    "cosine_embedding_loss": (F.cosine_embedding_loss, (LOGITS, Q, SIGNS)),
    "triplet_margin_loss": (F.triplet_margin_loss, (LOGITS, P, Q)),
    "kl_div": (F.kl_div, (P.log(), Q)),
}
MODULES = {
    "CrossEntropyLoss": (nn.CrossEntropyLoss, (LOGITS, TARGET)),
    "MSELoss": (nn.MSELoss, (LOGITS, Q)),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, (LOGITS, Q)),
    "HuberLoss": (nn.HuberLoss, (LOGITS, Q)),
    "KLDivLoss": (nn.KLDivLoss, (P.log(), Q)),
}


def weighted(function: Callable[[], Tensor], normalization: str = "batch", weights: Tensor = WEIGHTS) -> Tensor:
    with WeightedReductions(weights, check_normalization(normalization)):
        return function()


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("normalization", ["batch", "remaining"])
@pytest.mark.parametrize("name", PLAIN)
def test_means_weight_examples(name, normalization):
    """Oracle: a loop over examples, each with the mean of its own elements."""
    function, tensors = PLAIN[name]
    each = [function(*(t[i : i + 1] for t in tensors), reduction="mean") for i in range(B)]
    total = sum(w * loss for w, loss in zip(WEIGHTS, each, strict=True))
    expected = total / (B if normalization == "batch" else WEIGHTS.sum())
    torch.testing.assert_close(weighted(lambda: function(*tensors, reduction="mean"), normalization), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_sums_and_unreduced_losses_weight_examples(name):
    """Oracle: a loop over examples, each with the sum of its own elements."""
    function, tensors = PLAIN[name]
    each = [function(*(t[i : i + 1] for t in tensors), reduction="sum") for i in range(B)]
    expected = sum(w * loss for w, loss in zip(WEIGHTS, each, strict=True))
    torch.testing.assert_close(weighted(lambda: function(*tensors, reduction="sum")), expected)
    elements = weighted(lambda: function(*tensors, reduction="none"))
    torch.testing.assert_close(elements.reshape(B, -1).sum(1), torch.stack(each) * WEIGHTS)


def test_batchmean_divides_by_rows():
    """Oracle: a loop over examples."""
    each = torch.stack([F.kl_div(P[i].log(), Q[i], reduction="sum") for i in range(B)])
    torch.testing.assert_close(weighted(lambda: F.kl_div(P.log(), Q, reduction="batchmean")), (WEIGHTS @ each) / B)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", MODULES)
def test_loss_modules_are_intercepted(name):
    """Oracle: the function that the module calls."""
    module, tensors = MODULES[name]
    each = torch.stack([module()(*(t[i : i + 1] for t in tensors)) for i in range(B)])
    torch.testing.assert_close(weighted(lambda: module()(*tensors)), (WEIGHTS @ each) / B)


@pytest.mark.parametrize("normalization", ["batch", "remaining"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS_OF_CLASSES])
def test_flattened_tokens_class_weights_and_ignored_targets(class_weights, smoothing, normalization):
    """Oracle: a loop over tokens, with torch's denominator, the class weights of targets that are not ignored."""
    logits, weights = draw(B, T, C), torch.tensor([0.3, 1.7, 0.4, -0.6], dtype=torch.float64)
    total, original, remaining = 0.0, 0.0, 0.0
    for i in range(B):
        for t in range(T):
            y = int(PADDED[i, t])
            if y == -100:
                continue
            share = 1.0 if class_weights is None else float(class_weights[y])
            loss = F.cross_entropy(
                logits[i, t], PADDED[i, t], class_weights, reduction="sum", label_smoothing=smoothing
            )
            total = total + weights[i] * loss
            original += share
            remaining += float(weights[i]) * share
    found = weighted(
        lambda: F.cross_entropy(logits.flatten(0, 1), PADDED.flatten(), class_weights, label_smoothing=smoothing),
        normalization,
        weights,
    )
    torch.testing.assert_close(found, total / (original if normalization == "batch" else remaining))


@pytest.mark.parametrize("normalization", ["batch", "remaining"])
@pytest.mark.parametrize(("function", "by_sum"), [(F.mse_loss, True), (F.huber_loss, False)])
def test_element_weights(function, by_sum, normalization):
    """Oracle: a loop over elements; torch divides the one by the sum of their weights, the other by their number."""
    element_weights = draw(B, C, seed=7).abs()

    def loss() -> Tensor:
        return function(LOGITS, Q, weight=element_weights)

    torch.testing.assert_close(weighted(loss, normalization, torch.ones(B, dtype=torch.float64)), loss())
    elements = function(LOGITS, Q, reduction="none")
    numerator = sum(WEIGHTS[i] * element_weights[i, c] * elements[i, c] for i in range(B) for c in range(C))
    each = element_weights if by_sum else torch.ones_like(element_weights)
    if normalization == "remaining":
        each = each * WEIGHTS[:, None]
    torch.testing.assert_close(weighted(loss, normalization), numerator / each.sum())


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", PLAIN)
def test_weight_one_gives_the_loss_itself(name):
    """Oracle: torch."""
    function, tensors = PLAIN[name]
    for reduction in ("mean", "sum"):
        loss = functools.partial(function, *tensors, reduction=reduction)
        torch.testing.assert_close(weighted(loss, weights=torch.ones(B, dtype=torch.float64)), loss())


def test_weights_may_require_grad():
    """Oracle: each example's share of the mean."""
    weights = torch.ones(B, dtype=torch.float64, requires_grad=True)
    weighted(lambda: F.cross_entropy(LOGITS, TARGET), weights=weights).backward()
    torch.testing.assert_close(weights.grad, F.cross_entropy(LOGITS, TARGET, reduction="none") / B)


def test_two_losses_with_a_coefficient():
    """Oracle: a loop over examples."""
    found = weighted(lambda: F.cross_entropy(LOGITS, TARGET) + 0.3 * F.mse_loss(LOGITS, Q, reduction="sum"))
    expected = sum(
        WEIGHTS[i] * (F.cross_entropy(LOGITS[i], TARGET[i]) / B + 0.3 * F.mse_loss(LOGITS[i], Q[i], reduction="sum"))
        for i in range(B)
    )
    torch.testing.assert_close(found, expected)


def test_a_regulariser_stays_unweighted():
    """Oracle: the loss at weight zero is the regulariser alone, also where it is made by a loss function."""
    parameter = draw(C + 2, 2)  # its first dimension is no multiple of the batch
    zero = torch.zeros(B, dtype=torch.float64)

    def loss() -> Tensor:
        decay = 0.1 * parameter.square().sum() + F.mse_loss(parameter, torch.zeros_like(parameter))
        return F.cross_entropy(LOGITS, TARGET) + decay

    expected = 0.1 * parameter.square().sum() + parameter.square().mean()
    torch.testing.assert_close(weighted(loss, weights=zero), expected)


def test_unbatched_loss_of_a_batch_of_one():
    """Oracle: the loss times its weight."""
    found = weighted(lambda: F.cross_entropy(LOGITS[0], TARGET[0]), weights=WEIGHTS[:1])
    torch.testing.assert_close(found, 0.3 * F.cross_entropy(LOGITS[0], TARGET[0]))


@pytest.mark.parametrize("deprecated", [{"size_average": True}, {"reduce": False}])
def test_deprecated_reductions_are_refused(deprecated):
    with pytest.raises(ConfigurationError, match=r"`mse_loss`.*size_average.*`reduction`"):
        weighted(lambda: F.mse_loss(LOGITS, Q, **deprecated))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_remaining_needs_a_mean(reduction):
    with pytest.raises(ConfigurationError, match=f"`normalization='remaining'`.*reduction='{reduction}'"):
        weighted(lambda: F.mse_loss(LOGITS, Q, reduction=reduction), "remaining")


def run(weighting: LossWeighting, training_step: Callable[..., Any], module: Any = None) -> Any:
    return weighting(module, training_step, ((LOGITS, TARGET), 0), WEIGHTS)


def test_training_step_may_return_a_mapping():
    outputs = run(LossWeighting("auto", "batch"), lambda b, i: {"loss": F.cross_entropy(*b), "logits": b[0]})
    torch.testing.assert_close(outputs["loss"], weighted(lambda: F.cross_entropy(LOGITS, TARGET)))


def test_a_loss_that_is_not_found_is_refused():
    with pytest.raises(ConfigurationError, match=r"`loss='auto'` found no torch.nn.functional loss.*per_example_loss"):
        run(LossWeighting("auto", "batch"), lambda b, i: b[0].square().mean())


@pytest.mark.parametrize("normalization", ["batch", "remaining"])
def test_a_callable_and_a_method_give_losses_per_example(normalization):
    """Oracle: the weighted mean of these losses."""

    class Module:
        def per_example_loss(self, batch: Any) -> Tensor:
            return batch[0].square().sum(1)

    each = LOGITS.square().sum(1)
    expected = (WEIGHTS @ each) / (B if normalization == "batch" else WEIGHTS.sum())
    method = LossWeighting("auto", normalization)
    function = LossWeighting(lambda module, batch: batch[0].square().sum(1), normalization)
    torch.testing.assert_close(run(method, lambda b, i: None, Module()), expected)
    torch.testing.assert_close(run(function, lambda b, i: None), expected)


def test_a_callable_of_the_wrong_shape_is_refused():
    with pytest.raises(ConfigurationError, match=r"`loss` must return one loss per example, shape \(4,\).*\(\)"):
        run(LossWeighting(lambda module, batch: batch[0].mean(), "batch"), lambda b, i: None)


@pytest.mark.parametrize("argument", [{"loss": "mean"}, {"normalization": "sum"}])
def test_unknown_arguments_are_refused(argument):
    with pytest.raises(ConfigurationError, match=f"`{next(iter(argument))}` must be"):
        LossWeighting(**{"loss": "auto", "normalization": "batch", **argument})
