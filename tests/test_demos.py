"""Lightning's own demo models, as they are shipped and in float32, against retraining."""

import random
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import QUIET
from lightning.pytorch.demos.lstm import SequenceSampler, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer, WikiText2
from torch.utils.data import DataLoader

from lightning_sketch import DeletionPredictor, Reweight, Sketch, SketchCallback

UNITS = 4


@pytest.fixture
def text(tmp_path):
    """Articles of their own words each, and words that all share, where the dataset's download would lie."""
    draw = random.Random(0)
    shared = [f"w{i}" for i in range(20)]
    articles = [[draw.choice([*shared, *[f"a{u}{i}" for i in range(8)]]) for _ in range(90)] for u in range(UNITS)]
    (tmp_path / "wikitext-2.txt").write_text("\n".join(" ".join(article) for article in articles))
    return WikiText2(tmp_path, block_size=10, download=False)


class SmallTransformer(LightningTransformer):
    """The demo with fewer and smaller layers."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        self.model = Transformer(vocabulary, ninp=16, nhid=16, nlayers=1)
        for layer in self.model.modules():
            if hasattr(layer, "linear1"):
                layer.activation = F.gelu

    def prepare_data(self) -> None:
        """Download nothing."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.003)


class SmallLSTM(L.LightningModule):
    """The demo, with its hidden state in buffers."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.model = SimpleLSTM(vocabulary, ninp=8, nhid=8, nlayers=2)
        self.register_buffer("hidden", None)
        self.register_buffer("cell", None)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, target = batch
        state = self.model.init_hidden(len(inputs)) if self.hidden is None else (self.hidden, self.cell)
        output, state = self.model(inputs, state)
        self.hidden, self.cell = (s.detach() for s in state)
        return F.nll_loss(output, target.view(-1))

    def on_train_epoch_end(self) -> None:
        self.hidden = self.cell = None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize(
    ("model", "batches", "tolerance"),
    [
        (SmallTransformer, lambda text: DataLoader(text, batch_size=4), 0.002),
        (SmallLSTM, lambda text: DataLoader(text, batch_sampler=SequenceSampler(text, 5)), 0.001),
    ],
)
def test_a_demo_is_predicted_at_the_first_attempt(model, batches, tolerance, text, tmp_path):
    """Oracle: retraining without one of four articles, which are units; the losses are of every block of the text."""
    units = [i * UNITS // len(text) for i in range(len(text))]

    def train(*callbacks: L.Callback) -> L.LightningModule:
        L.seed_everything(1, verbose=False)
        module = model(text.vocab_size)
        L.Trainer(max_epochs=2, callbacks=list(callbacks), **QUIET).fit(module, batches(text))
        return module

    plain, sketched = train(), train(SketchCallback(tmp_path / "sketch", degree=3, design="basis", units=units))
    for ours, theirs in zip(sketched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    predictor = DeletionPredictor(Sketch.load(tmp_path / "sketch"), sketched)
    found = predictor.calibrate(batches(text), {(1,): train(Reweight(units=units, delete=[1]))})
    assert found.relative_error < tolerance
