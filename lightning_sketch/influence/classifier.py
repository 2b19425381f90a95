"""Influence at a softmax classifier's last layer, in closed form (Fan et al., *IMU*, arXiv 2508.01620)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from lightning_sketch.errors import ConfigurationError, check_choice
from lightning_sketch.influence.fit import LARGEST_DENSE
from lightning_sketch.influence.losses import LOSSES

Curvature = Literal["diag_fisher", "full_fisher", "softmax_hessian"]
CURVATURES = ("diag_fisher", "full_fisher", "softmax_hessian")
CHUNK_ENTRIES = 1 << 24


def classifier_influence(
    features: Tensor,
    logits: Tensor,
    targets: Tensor,
    *,
    curvature: Curvature = "diag_fisher",
    damping: float = 0.01,
    bias: bool = True,
) -> Tensor:
    """Return the influence of each example on the mean loss of all, through the last layer alone, ``(n,)`` float64.

    ``I_i = -g_i' F^-1 mean_j(g_j)``, where ``g_i = e_i (x) h_i`` is the gradient of example ``i``'s cross-entropy by
    the last layer's weight and bias, with the features ``h_i`` (1 appended for the bias) and
    ``e_i = p_i - onehot(y_i)``. ``I_i`` is how fast the mean loss rises as example ``i`` is weighted up, so it is
    negative for an example that supports the others, as it is on average: the mean of ``I`` is at most 0. Features and
    logits of one forward pass are enough; no gradient of an example is formed.

    The curvature ``F`` is one of

    - ``"diag_fisher"``: diagonal of the empirical Fisher matrix, ``mean_j g_j^2 + damping``, that of IMU;
    - ``"full_fisher"``: ``mean_j g_j g_j' + damping I``. With ``damping`` to 0 all scores go to -1 where the gradients
      are linearly independent, so it is the damping that tells examples apart;
    - ``"softmax_hessian"``: Hessian of the mean loss by the last layer, ``mean_j (diag p_j - p_j p_j') (x) h_j h_j' +
      damping I``.

    The last two solve one system, of the size of ``n`` (``nC`` for the Hessian) or of the layer's parameters, whichever
    is smaller.

    Args:
        features: inputs of the last layer, ``(n, d)``.
        logits: its outputs, ``(n, C)``, in evaluation mode.
        targets: classes, ``(n,)`` integers.
        curvature: see above.
        damping: positive, in the units of the curvature.
        bias: whether the last layer has a bias.

    Raises:
        ConfigurationError: any argument that can not be right, or a system of more than 20,000 rows.

    Example:
        >>> h = torch.tensor([[1.0, 0.0], [0.8, 0.1], [0.0, 1.0]])
        >>> logits = torch.tensor([[1.0, 0.0], [0.5, 0.0], [1.0, 0.0]])
        >>> classifier_influence(h, logits, torch.tensor([0, 0, 1]))
        tensor([-1.5284, -1.6075, -1.9501], dtype=torch.float64)
    """
    if features.ndim != 2 or logits.ndim != 2 or len(features) != len(logits) or not len(logits):
        raise ConfigurationError(
            f"`features` and `logits` have shapes {tuple(features.shape)} and {tuple(logits.shape)}: give (n, d) and "
            "(n, C) of the same n examples, at least one."
        )
    check_choice("curvature", curvature, CURVATURES)
    if not 0 < damping < float("inf"):
        raise ConfigurationError(f"`damping` is {damping}: give a positive number.")
    f = logits.detach().double()
    h = pad(features.detach().to(f), (0, int(bias)), value=1.0)
    if not (torch.isfinite(f).all() and torch.isfinite(h).all()):
        raise ConfigurationError("`features` or `logits` holds NaN or infinity: give those of a trained model.")
    y = LOSSES["softmax"].targets(targets, f)
    n = len(f)
    e = f.softmax(dim=1) - one_hot(y, f.shape[1])
    if curvature == "diag_fisher":
        # F = (E * E)' (h * h) / n + damping;  I = -rowsum(E * (h (mean g / F)'))
        fisher = e.square().T @ h.square() / n + damping
        return -(e * (h @ (e.T @ h / n / fisher).T)).sum(dim=1)
    # F = sum_r v_r v_r' / n + damping I, with rows v = e_i (x) h_i, or v = s (x) h_i for the columns s of a root of H_i
    factors = e[:, None, :] if curvature == "full_fisher" else LOSSES["softmax"].root(f, y).mT
    rows, parameters = factors.shape[:2].numel(), f.shape[1] * h.shape[1]
    if min(rows, parameters) > LARGEST_DENSE:
        raise ConfigurationError(
            f"`curvature={curvature!r}` would factorise a matrix of {min(rows, parameters):,} rows, above "
            f"{LARGEST_DENSE:,}: use 'diag_fisher', or fewer examples."
        )
    solve = _by_examples if rows <= parameters else _by_parameters
    return -solve(e, factors, h, damping)


def _by_examples(e: Tensor, factors: Tensor, h: Tensor, damping: float) -> Tensor:
    """``G F^-1 mean(g)`` by Woodbury's identity, ``F^-1 = (I - V' (n damping I + V V')^-1 V) / damping``."""
    n, k, _ = factors.shape
    inner = h @ h.T
    cross = torch.einsum("ic,jkc,ij->ijk", e, factors, inner).reshape(n, n * k)  # G V'
    gram = torch.einsum("ilc,jkc,ij->iljk", factors, factors, inner).reshape(n * k, n * k)  # V V'
    gram.diagonal().add_(n * damping)
    along = ((e @ e.T) * inner).mean(dim=1)  # G mean(g)
    return (along - cross @ torch.linalg.solve(gram, cross.mean(dim=0))) / damping


def _by_parameters(e: Tensor, factors: Tensor, h: Tensor, damping: float) -> Tensor:
    """``G F^-1 mean(g)`` with ``F`` assembled."""
    n, k, classes = factors.shape
    parameters = classes * h.shape[1]
    matrix = h.new_zeros(parameters, parameters)
    step = max(1, CHUNK_ENTRIES // (k * parameters))
    for v, x in zip(factors.split(step), h.split(step), strict=True):
        rows = torch.einsum("nkc,nd->nkcd", v, x).reshape(-1, parameters)
        matrix.addmm_(rows.T, rows)
    matrix = matrix / n
    matrix.diagonal().add_(damping)
    mean = (e.T @ h / n).reshape(-1)
    return (e * (h @ torch.linalg.solve(matrix, mean).reshape(classes, -1).T)).sum(dim=1)
