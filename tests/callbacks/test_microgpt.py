"""The names transformer of the paper against an independent numpy training in complex arithmetic on a circle."""

import sys

import lightning.pytorch as pl
import numpy as np
import pytest
from helpers import QUIET
from oracles import contour, microgpt_numpy
from oracles.names import PROJECT_ROOT, names_path
from torch.utils.data import DataLoader

from lightning_sketch import Sketch, SketchCallback

sys.path.insert(0, str(PROJECT_ROOT / "examples" / "paper"))
from microgpt import MicroGPT, NamesDataset, collate_names, load_names

DEGREE = 3


@pytest.mark.parametrize(
    ("count", "radius", "early_radius"), [(40, 1.0, 0.3), pytest.param(1000, 4.0, 0.5, marks=pytest.mark.slow)]
)
def test_coefficients_to_degree_3_equal_complex_training(count, radius, early_radius, tmp_path):
    """Oracle: numpy training with hand-written backpropagation on a circle, and a discrete Fourier transform."""
    names = load_names(names_path(), count)
    generator = np.random.default_rng(5)
    wide = generator.normal(size=count) + 1j * generator.normal(size=count)
    single = np.zeros(count, dtype=complex)
    single[count // 2] = 1
    directions = np.stack([wide / np.linalg.norm(wide), single])

    pl.seed_everything(0, verbose=False)
    model = MicroGPT(steps=count).double()
    initial = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    trainer = pl.Trainer(
        max_epochs=1,
        precision="64-true",
        callbacks=[SketchCallback(tmp_path, directions, DEGREE)],
        **QUIET,
    )
    trainer.fit(model, DataLoader(NamesDataset(names), batch_size=1, collate_fn=collate_names))

    def train(x: np.ndarray) -> np.ndarray:
        sequences = [microgpt_numpy.encode(name) for name in names]
        return microgpt_numpy.flatten(microgpt_numpy.train(initial, sequences, x))

    sketch = Sketch.load(tmp_path)
    assert sketch.num_directions == 2
    for shard in sketch.shards():
        for position, row in enumerate(shard.indices):
            circle = radius if row == 0 else early_radius
            expected = contour.taylor_coefficients(train, directions[row], DEGREE, circle, 32)
            for order in range(DEGREE):
                parts = [shard.coefficients[name][order, :, position].numpy() for name in initial]
                got = np.concatenate([(p[0] + 1j * p[1] if len(p) == 2 else p[0]).ravel() for p in parts])
                error = np.linalg.norm(got - expected[order]) / np.linalg.norm(expected[order])
                print(f"{count} names, direction {row}, order {order + 1}: relative error {error:.1e}")
                assert error < 1e-10
