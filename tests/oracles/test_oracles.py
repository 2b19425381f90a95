"""Tests of the oracles themselves: each against a second, different way to the same numbers."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import lightning
import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

from . import contour, digits, microgpt_numpy, scalar_jet
from .names import PROJECT_ROOT, names_path, training_names
from .scalar_jet import ScalarJet

NAMES = ["emma", "olivia", "ava", "isabella", "anna"]  # with repeated letters and different lengths


def load_example() -> ModuleType:
    """Import ``examples/paper/microgpt.py``."""
    spec = importlib.util.spec_from_file_location(
        "microgpt_example", PROJECT_ROOT / "examples" / "paper" / "microgpt.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def initial_arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Copies of the model's parameters by name."""
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}


def adam_inside_root(
    params: Sequence[torch.Tensor], moments: list[list[torch.Tensor]], t: int, rate: float, betas: tuple[float, float]
) -> None:
    """One step of Adam with eps = 1e-3 inside the root, from its formulas; ``moments``: [m, v] of each parameter."""
    with torch.no_grad():
        for param, moment in zip(params, moments, strict=True):
            assert param.grad is not None
            moment[0] = betas[0] * moment[0] + (1 - betas[0]) * param.grad
            moment[1] = betas[1] * moment[1] + (1 - betas[1]) * param.grad**2
            param -= rate * (moment[0] / (1 - betas[0] ** t)) / (moment[1] / (1 - betas[1] ** t) + 1e-3) ** 0.5


# --- contour ---------------------------------------------------------------------------------------------------------


def gradient_descent(x: np.ndarray) -> np.ndarray:
    """Three trainings by one step: ``theta = (1 - x_0) a / (2 - x_1)``, a rational function with known series."""
    return np.asarray((1 - x[:, :1]) / (2 - x[:, 1:2]) * np.array([1.0, 2.0, -3.0]))


def test_contour_gives_the_series_of_a_rational_function() -> None:
    """Oracle: closed form; along (1, 2i), (1 - z) / (2 - 2iz) has c_r = (i^r - i^(r-1)) / 2."""
    coefficients, difference = contour.disagreement(gradient_descent, [1, 2j], 4, (0.25, 0.2), 32)
    expected = np.array([(1j**r - 1j ** (r - 1)) / 2 for r in range(1, 5)])
    np.testing.assert_allclose(coefficients, expected[:, None] * np.array([1.0, 2.0, -3.0]), rtol=1e-12)
    assert difference.shape == (4,)
    assert difference.max() < 1e-12


def test_contour_refuses_a_circle_too_wide_for_its_points() -> None:
    """Oracle: the series above converges for |z| < 1, so sixteen points at 0.9 alias; three cannot hold degree 3."""
    with pytest.raises(ArithmeticError, match="`points`"):
        contour.taylor_coefficients(gradient_descent, [1, 2j], 3, 0.9, 16)
    with pytest.raises(ValueError, match="`points` is 3"):
        contour.taylor_coefficients(gradient_descent, [1, 2j], 3, 0.2, 3)


# --- scalar jets -----------------------------------------------------------------------------------------------------

CLOSED_FORMS: dict[str, tuple[ScalarJet, list[float]]] = {
    "exp(z)": (scalar_jet.exp(ScalarJet([0, 1, 0, 0, 0])), [1 / math.factorial(k) for k in range(5)]),
    "log(1 + z)": (scalar_jet.log(ScalarJet([1, 1, 0, 0, 0])), [0, 1, -1 / 2, 1 / 3, -1 / 4]),
    "1 / (1 - z)": (1 / (1 - ScalarJet([0, 1, 0, 0, 0])), [1] * 5),
    "sqrt(1 + z)": (scalar_jet.sqrt(ScalarJet([1, 1, 0, 0, 0])), [1, 1 / 2, -1 / 8, 1 / 16, -5 / 128]),
    "(1 + z)^-2": (ScalarJet([1, 1, 0, 0, 0]) ** -2, [1, -2, 3, -4, 5]),
    "z^3": (ScalarJet([0, 1, 0, 0, 0]) ** 3, [0, 0, 0, 1, 0]),
    "sqrt(0)": (scalar_jet.sqrt(ScalarJet([0] * 5)), [0] * 5),
    "tanh(z)": (scalar_jet.tanh(ScalarJet([0, 1, 0, 0, 0, 0])), [0, 1, 0, -1 / 3, 0, 2 / 15]),
    "sigmoid(z)": (scalar_jet.sigmoid(ScalarJet([0, 1, 0, 0, 0, 0])), [1 / 2, 1 / 4, 0, -1 / 48, 0, 1 / 480]),
    "erf(z)": (
        scalar_jet.erf(ScalarJet([0, 1, 0, 0, 0, 0])),
        [2 / math.sqrt(math.pi) * c for c in (0, 1, 0, -1 / 3, 0, 1 / 10)],
    ),
    "gelu(z)": (
        scalar_jet.gelu(ScalarJet([0, 1, 0, 0, 0])),
        [0, 1 / 2, 1 / math.sqrt(2 * math.pi), 0, -1 / (6 * math.sqrt(2 * math.pi))],
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_scalar_jets_give_the_textbook_series(name: str) -> None:
    """Oracle: closed forms."""
    computed, expected = CLOSED_FORMS[name]
    np.testing.assert_allclose(computed.c, expected, rtol=1e-14, atol=1e-16)


FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "exp": (scalar_jet.exp, np.exp),
    "log": (scalar_jet.log, np.log),
    "sqrt": (scalar_jet.sqrt, np.sqrt),
    "sigmoid": (scalar_jet.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "tanh": (scalar_jet.tanh, np.tanh),
    "erf": (scalar_jet.erf, scipy.special.erf),
    "gelu": (scalar_jet.gelu, lambda x: x * (1 + scipy.special.erf(x / math.sqrt(2))) / 2),
    "x^-1.7": (lambda x: x**-1.7, lambda x: x**-1.7),
    "rational": (lambda x: (3 - 2 * x) / (x * x + 1) - x / 4, lambda x: (3 - 2 * x) / (x * x + 1) - x / 4),
    "composed": (
        lambda x: scalar_jet.log(1 + scalar_jet.exp(scalar_jet.tanh(x) * x)),
        lambda x: np.log(1 + np.exp(np.tanh(x) * x)),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scalar_jets_agree_with_complex_values_on_a_circle(name: str) -> None:
    """Oracle: numpy's and scipy's complex functions on a circle, and an FFT."""
    jet_function, function = FUNCTIONS[name]
    series = [0.9, 0.5 + 0.3j, -0.2j, 0.1, -0.3 + 0.2j]
    expected = contour.taylor_coefficients(lambda z: function(np.polyval(series[::-1], z))[:, 0], [1.0], 4, 0.2, 48)
    np.testing.assert_allclose(jet_function(ScalarJet(series)).c[1:], expected, rtol=1e-11, atol=1e-11)


# --- microgpt --------------------------------------------------------------------------------------------------------


def test_microgpt_gradient_equals_finite_differences() -> None:
    """Oracle: central differences of the loss along a random direction of each parameter."""
    torch.manual_seed(0)
    parameters = {name: value[None] for name, value in initial_arrays(load_example().MicroGPT().double()).items()}
    tokens = microgpt_numpy.encode("anna")
    _, gradient = microgpt_numpy.loss_and_gradient(parameters, tokens)
    rng = np.random.default_rng(0)
    for name, value in parameters.items():
        direction = rng.normal(size=value.shape)
        loss = [
            microgpt_numpy.loss_and_gradient({**parameters, name: value + h * direction}, tokens)[0][0]
            for h in (1e-5, -1e-5)
        ]
        np.testing.assert_allclose(
            (gradient[name] * direction).sum(), (loss[0] - loss[1]) / 2e-5, rtol=1e-7, atol=1e-10
        )


def test_microgpt_training_equals_autograd_training() -> None:
    """Oracle: 50 steps of autograd through the example's model, Adam from its formulas; weights from -0.5 to 1.5."""
    example = load_example()
    torch.manual_seed(1)
    model = example.MicroGPT(steps=50).double()
    assert sum(value.numel() for value in model.parameters()) == 4192
    initial = initial_arrays(model)
    x = np.random.default_rng(0).uniform(-0.5, 1.5, len(NAMES))
    dataset = example.NamesDataset(NAMES)
    params = list(model.parameters())
    moments = [[torch.zeros_like(param), torch.zeros_like(param)] for param in params]
    order = np.random.default_rng(1).integers(0, len(NAMES), 50)
    for t, i in enumerate(order):
        model.zero_grad()
        ((1 - x[i]) * model.training_step(dataset[i][None], t)).backward()
        adam_inside_root(params, moments, t + 1, 0.01 * (1 - t / 50), (0.85, 0.99))
    sequences = [microgpt_numpy.encode(name) for name in NAMES]
    trained = microgpt_numpy.train(initial, sequences, np.stack([np.zeros_like(x), x]), order=list(order))
    for name, value in model.named_parameters():
        np.testing.assert_allclose(trained[name][1], value.detach().numpy(), rtol=0, atol=1e-12)
        assert np.abs(trained[name][1] - initial[name]).max() > 1e-3  # it did train
        assert np.abs(trained[name][1] - trained[name][0]).max() > 1e-4  # and the weights matter


@pytest.mark.parametrize("real", [True, False])
def test_microgpt_complex_training_is_holomorphic(real: bool) -> None:
    """Oracle: a second radius for all orders, and for order 1 central differences of real trainings."""
    torch.manual_seed(2)
    initial = initial_arrays(load_example().MicroGPT().double())
    sequences = [microgpt_numpy.encode(name) for name in NAMES]
    rng = np.random.default_rng(0)
    direction = rng.normal(size=5) + (0 if real else 1j * rng.normal(size=5))
    direction /= np.linalg.norm(direction)

    def run(x: np.ndarray) -> np.ndarray:
        return microgpt_numpy.flatten(microgpt_numpy.train(initial, sequences, x, order=list(range(5)) * 4))

    coefficients, difference = contour.disagreement(run, direction, 3, (0.2, 0.15), 24)
    assert difference.max() < 1e-10
    h = 1e-5
    parts = [(run(h * part[None]) - run(-h * part[None]))[0] / (2 * h) for part in (direction.real, direction.imag)]
    np.testing.assert_allclose(
        coefficients[0], parts[0] + 1j * parts[1], rtol=0, atol=1e-8 * np.abs(coefficients[0]).max()
    )


@pytest.mark.slow
@pytest.mark.parametrize("real", [True, False])
def test_coefficients_of_a_thousand_names_do_not_depend_on_the_radius(real: bool) -> None:
    """Oracle: a second radius, on the paper's run; the radii given here are good for this run at other seeds too."""
    torch.manual_seed(0)
    initial = initial_arrays(load_example().MicroGPT().double())
    sequences = [microgpt_numpy.encode(name) for name in training_names(1000)]
    rng = np.random.default_rng(0)
    direction = np.eye(1000)[500] if real else rng.normal(size=1000) + 1j * rng.normal(size=1000)

    def run(x: np.ndarray) -> np.ndarray:
        return microgpt_numpy.flatten(microgpt_numpy.train(initial, sequences, x))

    radii = (0.5, 0.4) if real else (4.0, 3.0)
    _, difference = contour.disagreement(run, direction / np.linalg.norm(direction), 3, radii, 32)
    assert difference.max() < 1e-11


def test_microgpt_example_trained_by_lightning_equals_the_oracle() -> None:
    """Oracle: the numpy training; checks the example's order, schedule and optimizer settings."""
    example = load_example()
    torch.manual_seed(3)
    model = example.MicroGPT(steps=5).double()
    initial = initial_arrays(model)
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **silent)
    trainer.fit(model, torch.utils.data.DataLoader(example.NamesDataset(NAMES)))
    trained = microgpt_numpy.train(initial, [microgpt_numpy.encode(name) for name in NAMES], np.zeros((1, 5)))
    for name, value in model.named_parameters():
        np.testing.assert_allclose(trained[name][0], value.detach().numpy(), rtol=0, atol=1e-13)


def test_microgpt_example_pads_without_effect() -> None:
    """Oracle: the mean over all positions of names taken one at a time."""
    example = load_example()
    torch.manual_seed(0)
    model = example.MicroGPT().double()
    dataset = example.NamesDataset(NAMES)
    single = sum(model.training_step(dataset[i][None], 0) * (len(NAMES[i]) + 1) for i in range(5)) / sum(
        len(n) + 1 for n in NAMES
    )
    padded = model.training_step(example.collate_names([dataset[i] for i in range(5)]), 0)
    torch.testing.assert_close(padded, single, rtol=1e-13, atol=0)


def test_example_and_oracle_read_the_same_names() -> None:
    """Oracle: the other reader, and the tokens of each."""
    example = load_example()
    names = training_names(1000)
    assert example.load_names(names_path(), 1000) == names
    assert len(set(names)) == 1000
    dataset = example.NamesDataset(names)
    assert all(np.array_equal(dataset[i].numpy(), microgpt_numpy.encode(name)) for i, name in enumerate(names))


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_retraining_equals_autograd_training() -> None:
    """Oracle: autograd through torch.nn layers and Adam from its formulas, one deletion set at a time."""
    rng = np.random.default_rng(0)
    inputs, targets = torch.from_numpy(rng.uniform(size=(130, 64))), torch.from_numpy(rng.integers(0, 10, 130))
    units = rng.integers(-1, 6, 100)
    batches = [
        order[start : start + 24] for order in (rng.permutation(100) for _ in range(5)) for start in range(0, 96, 24)
    ]
    x = np.concatenate([np.zeros((1, 6)), np.eye(6)[:, ::-1], rng.uniform(-0.5, 1.5, (2, 6))])  # 9 sets: two groups
    torch.manual_seed(0)
    initial = (
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 10)).double().state_dict()
    )
    final, losses = digits.retrain(initial, inputs[:100], targets[:100], batches, units, x, inputs[100:], targets[100:])
    for row in (0, 3, 8):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 10)).double()
        model.load_state_dict(initial)
        params = list(model.parameters())
        moments = [[torch.zeros_like(param), torch.zeros_like(param)] for param in params]
        weights = torch.from_numpy(np.array([1.0 if unit < 0 else 1 - x[row, unit] for unit in units]))
        for t, batch in enumerate(batches):
            model.zero_grad()
            examples = F.cross_entropy(model(inputs[batch]), targets[batch], reduction="none")
            (weights[batch] * examples).mean().backward()
            adam_inside_root(params, moments, t + 1, 1e-2 * (1 - t / len(batches)), (0.9, 0.99))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(final[name][row], value, rtol=0, atol=1e-12)
        expected = F.cross_entropy(model(inputs[100:]), targets[100:], reduction="none").detach()
        torch.testing.assert_close(losses[row], expected, rtol=0, atol=1e-12)
    assert (losses[1] - losses[0]).abs().max() > 1e-3  # deletion matters
