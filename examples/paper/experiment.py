"""What the three figures share: the names, the training run and the loss that is predicted.

The run is that of the paper's published code: microgpt, one epoch, one name a step, in float64. One stream of random
numbers, ``random.Random(42)``, shuffles the names of the file, of which the first 1,000 are trained on, and then draws
the initial weights. Every name is a unit. Deleted are the names that contain an ``x``, along the ray ``s * 1_D``: at
``s = 1`` they are not trained on. The output is the loss of the trained model on the name ``max``.
"""

import argparse
import logging
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from microgpt import MicroGPT, NamesDataset, collate_names
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sketch import DeletionPredictor, Reweight, Sketch, SketchCallback
from lightning_sketch.prediction import Effect

TEST_NAME = "max"
FULL, QUICK = 1000, 100  # names
FRACTIONS = np.linspace(0, 1, 11)  # of the deletion, where the model is retrained
# the order in which initial weights are drawn
DRAWN = ["wte", "wpe", "lm_head", "attn_wq", "attn_wk", "attn_wv", "attn_wo", "mlp_fc1", "mlp_fc2"]
NAMES = (
    "anna maria emma laura lena julia sara clara nora ella mia lily grace rose alice lucy eva hannah sofia elena "
    "james john peter paul thomas david daniel samuel joseph simon martin oscar leo adam noah liam lucas henry jack "
    "oliver alexander felix roxanne xavier amelia charlotte isabel victoria katherine helen ruth judith miriam "
    "rachel rebecca naomi esther diana irene monica andrew philip stephen george edward robert william charles "
    "arthur walter frank louis victor hugo bruno ivan igor olga vera nina tamara"
)


@dataclass(frozen=True)
class Experiment:
    """One set of names and initial weights, trained on as often as needed.

    Attributes:
        names: in training order.
        weights: initial ones, by the names of a ``state_dict``.
        quick: whether sizes are to be small.
        out: directory for sketch and figure.
    """

    names: list[str]
    weights: dict[str, Tensor]
    quick: bool
    out: Path

    @property
    def deleted(self) -> np.ndarray:
        """``1_D``, ``(n,)``: 1 for names with an ``x``."""
        return np.array([float("x" in name) for name in self.names])

    def train(self, callback: pl.Callback, progress: bool = False) -> MicroGPT:
        """Train from the same initial weights, with one callback more."""
        model = MicroGPT(steps=len(self.names)).double()
        model.load_state_dict(self.weights)
        trainer = pl.Trainer(
            max_epochs=1,
            precision="64-true",
            accelerator="cpu",
            callbacks=[callback],
            enable_progress_bar=progress,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(NamesDataset(self.names), batch_size=1, collate_fn=collate_names))
        return model

    def sketch(self, directions: int | np.ndarray, degree: int) -> Sketch:
        """Train with a sketch along random directions of the sphere, or along explicit ones, ``(K, n)``."""
        dirpath = self.out / "sketch"
        self.train(SketchCallback(dirpath, directions, degree, design="sphere"), progress=True)
        return Sketch.load(dirpath)

    def effect(self, sketch: Sketch) -> Effect:
        """Return the effect of deletions on the loss of the test name, one number in nats."""
        effect = DeletionPredictor(sketch, MicroGPT().double()).prepare(_test_batch())
        return effect.reduce(torch.ones_like(effect.baseline))

    def retrain(self, fractions: Sequence[float] | np.ndarray = FRACTIONS) -> np.ndarray:
        """Return the loss of the test name after training with deletion weights ``s * 1_D``, in nats."""
        losses = []
        for s in fractions:
            model = self.train(Reweight(weights=(s * self.deleted).tolist()))
            with torch.no_grad():
                losses.append(float(model.training_step(_test_batch(), 0)))
        return np.array(losses)


class Clock:
    """Wall and CPU time of this process since it was made, as text."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __str__(self) -> str:
        return f"{time.perf_counter() - self._wall:.0f} s wall, {time.process_time() - self._cpu:.0f} s CPU"


def prepare(names: Sequence[str], quick: bool, out: Path) -> Experiment:
    """Shuffle the names, keep the first ones and draw the initial weights."""
    stream = random.Random(42)
    shuffled = list(names)
    stream.shuffle(shuffled)
    weights = {name: p.detach().double() for name, p in MicroGPT().named_parameters()}
    for name in DRAWN:
        weights[f"{name}.weight"].apply_(lambda _: stream.gauss(0, 0.08))  # row by row
    return Experiment(shuffled[: QUICK if quick else FULL], weights, quick, out)


def parse(description: str, figure: str) -> Experiment:
    """Read the command line.

    Args:
        description: docstring of the script.
        figure: its name, for the default output directory.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--names", type=Path, help=f"text file of names; {FULL} of them are trained on")
    parser.add_argument("--quick", action="store_true", help="small sizes, done in less than two minutes")
    parser.add_argument("--out", type=Path, default=Path("paper_output") / figure, help="where sketch and figure go")
    given = parser.parse_args()
    names = NAMES.split() if given.names is None else given.names.read_text(encoding="utf-8").split()
    run = prepare(names, given.quick, given.out)
    if not run.deleted.any():
        parser.error(f"none of the {len(run.names)} names contains an x, so that there is nothing to delete")
    given.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print(f"{len(run.names)} names, of which {int(run.deleted.sum())} contain an x; {torch.get_num_threads()} threads")
    return run


def _test_batch() -> Tensor:
    return collate_names([NamesDataset([TEST_NAME])[0]])
