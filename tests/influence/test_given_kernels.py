"""Kernels that are given, in every shape; and the linear system as published."""

import pytest
import torch
from torch.nn.functional import one_hot

from lightning_sketch.influence import KernelInfluence

N, T, C, RIDGE = 14, 5, 3, 0.4
GROUP = [1, 4, 5]


def gram(rows, columns):
    return torch.exp(-0.2 * torch.cdist(rows, columns).square())


def shapes(k):
    """The kernel ``k (x) I_C`` in the three shapes."""
    identity = torch.eye(C).double()
    four = k[:, :, None, None] * identity
    return {"(n, n)": k, "(n, n, C, C)": four, "(nC, nC)": torch.kron(k, identity)}


@pytest.mark.parametrize("solver", ["dual", "matrix_free"])
@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_shapes_of_a_kernel_agree(loss, solver):
    """Oracle: the same numbers in another shape; under the squared loss, each output alone, too."""
    torch.manual_seed(0)
    x, x_test = torch.randn(N, 4).double(), torch.randn(T, 4).double()
    f, f_test = torch.randn(N, C).double(), torch.randn(T, C).double()
    y, y_test = (torch.randn(N, C), torch.randn(T, C)) if loss == "squared" else (f.argmax(1), f_test.argmax(1))
    train, test = shapes(gram(x, x)), shapes(gram(x_test, x))
    ones, test_ones = torch.ones(N, 1), torch.ones(T, 1)

    def predict(kernel, test_kernel, column=slice(None), mode="newton", **options):
        influence = KernelInfluence.from_kernel(
            kernel, f[:, column], y[:, column] if loss == "squared" else y, loss=loss, ridge=RIDGE, basis=ones,
            convention="per_example", solver=solver,
        )  # fmt: skip
        targets = y_test[:, column] if loss == "squared" else y_test
        return influence.prepare_kernel(test_kernel, f_test[:, column], targets, basis=test_ones)

    expected = predict(train["(nC, nC)"], test["(nC, nC)"])
    for shape in train:
        effect = predict(train[shape], test[shape])
        for found, truth in (
            (effect.delete(GROUP), expected.delete(GROUP)),
            (effect.leave_one_out(), expected.leave_one_out()),
        ):
            torch.testing.assert_close(found.change, truth.change, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(found.loss.change, truth.loss.change, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(found.loss.ridge, truth.loss.ridge, rtol=1e-8, atol=1e-10)
    if loss == "squared":
        alone = predict(train["(n, n)"], test["(n, n)"], column=1).delete(GROUP)
        assert alone.change.shape == (T,)
        torch.testing.assert_close(alone.change, expected.delete(GROUP).change[:, 1], rtol=1e-8, atol=1e-10)


def test_an_output_that_fits_its_targets_does_not_change():
    """Oracle: it has no gradient, and so no influence; the other outputs have theirs beside it."""
    torch.manual_seed(0)
    k, f = gram(torch.randn(N, 4).double(), torch.randn(N, 4).double()), torch.randn(N, C).double()
    k, y = k @ k.T, torch.randn(N, C).double()
    y[:, 0] = f[:, 0]
    changes = [
        KernelInfluence.from_kernel(k, f, y, loss="squared", ridge=RIDGE, solver=solver)
        .prepare_kernel(k, f)
        .delete(GROUP)
        .change
        for solver in ("dual", "matrix_free")
    ]
    assert torch.equal(changes[0][:, 0], torch.zeros(N).double())
    torch.testing.assert_close(changes[1], changes[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", ["(n, n)", "(nC, nC)"])
def test_a_minimum_is_told_from_a_fit_that_is_not(shape):
    """Oracle: kernel ridge regression with intercepts, solved as a bordered system, and its refit."""
    torch.manual_seed(0)
    x, y = torch.randn(N, 4).double(), torch.randn(N, C).double()
    k, one = gram(x, x), torch.ones(N, 1).double()

    def solve(rows):
        top = torch.cat([k[rows][:, rows] + RIDGE * torch.eye(len(rows)).double(), one[rows]], dim=1)
        bottom = torch.cat([one[rows].T, torch.zeros(1, 1)], dim=1)
        found = torch.linalg.solve(torch.cat([top, bottom]), torch.cat([y[rows], torch.zeros(1, C)]))
        return found[:-1], found[-1]

    everything = torch.arange(N)
    a, intercept = solve(everything)
    for outputs, stationary in ((k @ a + intercept, True), (k @ a + 1.1 * intercept + 0.1 * x[:, :C], False)):
        arguments = (shapes(k)[shape], outputs, y)
        options = {"loss": "squared", "basis": one, "centre_outputs": torch.zeros(N, C)}
        influence = KernelInfluence.from_kernel(*arguments, ridge=RIDGE, **options)
        found = influence.diagnostics().stationarity
        assert found.stationary is stationary
        assert (found.representer_gap < 1e-10) is stationary
        if stationary:
            kept = torch.tensor([i for i in everything if i not in GROUP])
            change = influence.delete(GROUP).unpenalized
            torch.testing.assert_close(change, (solve(kept)[1] - intercept)[None], rtol=1e-8, atol=1e-10)
        else:
            with pytest.warns(UserWarning, match="not at a minimum"):
                KernelInfluence.from_kernel(*arguments, ridge=RIDGE / N, convention="per_example", **options)
    single = KernelInfluence.from_kernel(
        k, (k @ a + intercept)[:, 0], y[:, 0], loss="squared", ridge=RIDGE, basis=one, centre_outputs=torch.zeros(N)
    )
    assert single.diagnostics().stationarity.representer_gap < 1e-10
    assert KernelInfluence.from_kernel(k, y, y, loss="squared", ridge=RIDGE).diagnostics().stationarity is None


def test_the_system_as_published_has_the_same_solution():
    """Oracle: arXiv 2605.11239, eq. 13, with its factor ``K`` and means over what is kept, solved densely."""
    torch.manual_seed(0)
    x = torch.randn(N, 4).double()
    k = torch.kron(gram(x, x), torch.eye(C).double())
    y = torch.randint(C, (N,))
    lam = 0.05
    # A minimum f = K a, a = -g / (n lam), by fixed-point steps
    f = torch.zeros(N * C).double()
    for _ in range(5000):
        p = f.reshape(N, C).softmax(1)
        f = f - 0.2 * (f + k @ (p - one_hot(y, C)).flatten() / (N * lam))
    p = f.reshape(N, C).softmax(1)
    a = -(p - one_hot(y, C)).flatten() / (N * lam)
    torch.testing.assert_close(f, k @ a, rtol=1e-12, atol=1e-12)

    forget = torch.tensor([i * C + c for i in GROUP for c in range(C)])
    kept = torch.tensor([row for row in range(N * C) if row not in forget.tolist()])
    n_f, n_r = len(GROUP), N - len(GROUP)
    hessian = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p))[kept][:, kept] / n_r
    rr, rs = k[kept][:, kept], k[kept][:, forget]
    gradient = (p - one_hot(y, C)).flatten()[forget] / n_f
    left = n_r / N * (rr @ hessian @ rr + lam * rr)
    right = n_f / N * (rs @ gradient + lam * (rs @ a[forget] + rr @ a[kept]))
    right = right + n_r / N * (rr @ hessian @ rs + lam * rs) @ a[forget]
    change = torch.zeros(N * C).double()
    change[kept], change[forget] = torch.linalg.solve(left, right), -a[forget]

    influence = KernelInfluence.from_kernel(k, f.reshape(N, C), y, loss="softmax", ridge=lam, convention="per_example")
    found = influence.delete(GROUP).coefficients.flatten()
    torch.testing.assert_close(found, change, rtol=0, atol=1e-8 * float(change.norm()))
