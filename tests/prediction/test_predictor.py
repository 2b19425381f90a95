"""``DeletionPredictor``: outputs of the counterfactual model, from the sketch and the module's code alone."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import ConfigurationError, DeletionPredictor, Reweight, Sketch, SketchCallback, SketchError
from lightning_sketch.optim import StableAdamW

UNITS = np.arange(40) % 5


class Net(pl.LightningModule):
    """BatchNorm and dropout, so that evaluation mode differs from training mode and buffers vary."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(0.3), nn.Linear(width, 3)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        penalty = 1e-3 * self.net[0].weight.square().sum()
        return 0.5 * F.cross_entropy(self.net(inputs), targets) + penalty

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return StableAdamW(self.parameters(), lr=1e-2)


def train(*callbacks: pl.Callback, dtype: str = "64-true") -> Net:
    pl.seed_everything(0, verbose=False)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    targets = inputs[:, :3].argmax(1)
    inputs = inputs.float() if dtype == "32-true" else inputs
    trainer = pl.Trainer(
        max_epochs=2,
        precision=dtype,
        callbacks=list(callbacks),
        **QUIET,
    )
    model = Net()
    trainer.fit(model, DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True))
    return model


def logits(module: Net, batch: tuple[Tensor, Tensor]) -> Tensor:
    return module.net(batch[0])


def batch_of_seven() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    return inputs, inputs[:, :3].argmax(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    dirpath = tmp_path_factory.mktemp("run")
    model = train(SketchCallback(dirpath, 4, 3, design="basis+common+sphere", units=UNITS, directions_per_pass=4))
    return Sketch.load(dirpath), model


@pytest.mark.parametrize("x", [[0, 0, 0.5, 0, 0], [0.15, 0, 0, 0.15, -0.1]])
def test_losses_and_logits_equal_retraining_in_evaluation_mode(run, x):
    """Oracle: a ``Reweight`` run, its losses and logits in evaluation mode; a unit is a fifth of the data."""
    sketch, _ = run
    retrained = train(Reweight(units=UNITS, weights=x)).eval()
    batch = batch_of_seven()
    with torch.no_grad():
        true = logits(retrained, batch)
    p = DeletionPredictor(sketch, Net().double(), logits).prepare(batch).delete(weights=x)
    error = (p.value - true).norm() / (true - p.baseline).norm()
    first_order = (p.by_degree[0] - true).norm() / (true - p.baseline).norm()
    assert error < 0.02
    assert error < first_order / 5
    losses = DeletionPredictor(sketch, Net().double()).prepare(batch).delete(weights=x)
    true_losses = 0.5 * F.cross_entropy(true, batch[1], reduction="none")
    assert (losses.value - true_losses).norm() < 0.02 * (true_losses - losses.baseline).norm()


def test_baseline_is_the_trained_model_in_evaluation_mode(run):
    """Oracle: the trained module itself."""
    sketch, model = run
    batch = batch_of_seven()
    model.eval()
    with torch.no_grad():
        expected = 0.5 * F.cross_entropy(logits(model, batch), batch[1], reduction="none")
    torch.testing.assert_close(DeletionPredictor(sketch, Net().double()).prepare(batch).baseline, expected)


def test_passes_of_any_size_give_the_same_coefficients(run, tmp_path):
    """Oracle: a sketch of the same directions in one pass per kind."""
    sketch, _ = run
    train(SketchCallback(tmp_path, 4, 3, design="basis+common+sphere", units=UNITS))
    batch = batch_of_seven()
    one, other = (DeletionPredictor(s, Net().double(), logits).prepare(batch) for s in (sketch, Sketch.load(tmp_path)))
    assert len(list(sketch.shards())) > len(list(Sketch.load(tmp_path).shards()))
    torch.testing.assert_close(one.coefficients, other.coefficients, rtol=1e-10, atol=1e-12)


def test_complex_directions_agree_with_real_ones(run):
    """Oracle: order 1 is linear in the direction, so it follows from the basis directions of the same sketch."""
    sketch, _ = run
    effect = DeletionPredictor(sketch, Net().double(), logits).prepare(batch_of_seven())
    directions = torch.tensor(sketch.directions)
    gradient = torch.linalg.lstsq(directions[:5], effect.coefficients[0, :5].flatten(1)).solution
    torch.testing.assert_close(effect.coefficients[0].flatten(1), directions @ gradient, rtol=1e-9, atol=1e-11)
    assert (effect.coefficients[:, directions.imag.any(1)].imag != 0).any()


def test_a_float32_run_is_predicted_to_single_precision(run, tmp_path):
    """Oracle: the float64 sketch of the same run."""
    sketch, _ = run
    train(SketchCallback(tmp_path, 4, 2, design="basis+common", units=UNITS), dtype="32-true")
    batch = batch_of_seven()
    single = DeletionPredictor(Sketch.load(tmp_path), Net(), logits).prepare((batch[0].float(), batch[1]))
    double = DeletionPredictor(sketch, Net().double(), logits).prepare(batch)
    assert single.baseline.dtype == torch.float32
    change, expected = single.delete([1]).change.double(), double.delete([1], degree=2).change
    assert (change - expected).norm() < 1e-3 * expected.norm()


def test_the_module_is_left_alone(run):
    """Oracle: its mode, attributes, tensors and the random state before."""
    sketch, _ = run
    module = Net().double()
    module.train()
    tensors = {name: t.clone() for name, t in module.state_dict().items()}
    random_state, attributes = torch.get_rng_state(), dict(module.__dict__)
    DeletionPredictor(sketch, module).prepare(batch_of_seven())
    assert module.training
    assert all(m.training for m in module.modules())
    assert all(torch.equal(t, module.state_dict()[name]) for name, t in tensors.items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert module.__dict__.keys() == attributes.keys()


def test_a_sketch_of_another_model_is_refused(run):
    """Oracle: the error's words."""
    with pytest.raises(SketchError, match=r"another model.*net\.0\.weight"):
        DeletionPredictor(run[0], Net(width=7))


def test_a_sketch_of_the_same_shapes_but_other_functions_is_refused(run):
    """Oracle: the error's words."""
    module = Net()
    module.net[2] = nn.Tanh()
    with pytest.raises(SketchError, match=r"another model.*`net\.2` is GELU in the sketch and Tanh in the module"):
        DeletionPredictor(run[0], module)


def test_a_path_is_not_a_sketch(run):
    """Oracle: the error's words."""
    with pytest.raises(ConfigurationError, match=r"`sketch`.*PosixPath.*Sketch.load"):
        DeletionPredictor(run[0].dirpath, Net())


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (lambda module, batch: module.net(batch[0]).mean(), r"`output`.*first dimension.*7"),
        (lambda module, batch: module.net(batch[0]).T, r"`output`.*first dimension.*7.*\(3, 7\)"),
        (lambda module, batch: module.net(batch[0]).argmax(1), "`output`.*int64"),
        (lambda module, batch: (1, 2), "`output`.*tuple"),
        (lambda module, batch: module.net(batch[0]) * float("nan"), "`output` is not finite"),
        ("accuracy", "`output`.*'accuracy'"),
    ],
)
def test_a_bad_output_is_refused(run, output, match):
    """Oracle: the error's words."""
    with pytest.raises(ConfigurationError, match=match):
        DeletionPredictor(run[0], Net().double(), output).prepare(batch_of_seven())


def test_a_loss_given_to_the_sketch_must_be_given_as_output(tmp_path):
    """Oracle: the error's words, and the losses by hand once it is given."""

    def losses(module: Net, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(logits(module, batch), batch[1], reduction="none")

    class Plain(Net):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return losses(self, batch).mean()

    pl.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(16, 4), torch.randint(0, 3, (16,)))
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[SketchCallback(tmp_path, 2, 1, loss=losses)],
        **QUIET,
    )
    model = Plain()
    trainer.fit(model, DataLoader(data, batch_size=8))
    sketch = Sketch.load(tmp_path)
    with pytest.raises(ConfigurationError, match=r"`output='loss'`.*losses"):
        DeletionPredictor(sketch, Plain())
    model.eval()
    with torch.no_grad():
        expected = losses(model, data[:5])
    torch.testing.assert_close(DeletionPredictor(sketch, Plain(), losses).prepare(data[:5]).baseline, expected)
