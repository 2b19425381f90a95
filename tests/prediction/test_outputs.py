"""Outputs by name against retraining, and dataloaders against one batch."""

import gc
import weakref
from collections import OrderedDict, UserDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, FEATURES, Classifier, data, fit, network
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_sketch import ConfigurationError, DeletionPredictor, Reweight, Sketch, SketchCallback

PSI = np.random.default_rng(3).normal(size=12)
H = 1e-5
TEST = data(7, seed=5).tensors


class Forward(Classifier):
    def forward(self, x):
        return self.net(x)


class Binary(Forward):
    """One logit, ``(B, 1)``."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1)))

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], (batch[1] > 0).double())


class HuggingFace(Forward):
    """Called with keywords; returns a mapping, as do the models of transformers."""

    def forward(self, values, mask=None):
        logits = self.net(values if mask is None else values * mask)
        return OrderedDict(logits=logits, hidden_states=None)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])["logits"], batch[1])


def sketched(make, dirpath, directions=PSI[None], degree=1, **options):
    """A sketch along ``PSI``, and the models of central differences."""
    fit(make, [SketchCallback(dirpath, directions, degree, **options)])
    plus, minus = (fit(make, [Reweight(weights=s * H * PSI)])[0].eval() for s in (1, -1))
    return Sketch.load(dirpath), plus, minus


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sketched(Forward, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    return sketched(Binary, tmp_path_factory.mktemp("binary"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A sketch of 15 directions in five shards."""
    dirpath = tmp_path_factory.mktemp("sharded")
    callback = SketchCallback(dirpath, 3, 2, design="basis+sphere", directions_per_pass=3)
    fit(Forward, [callback])
    return Sketch.load(dirpath)


def assert_derivative(effect, plus, minus):
    truth = (plus - minus).detach() / (2 * H)
    assert effect.baseline.shape == truth.shape
    error = (effect.coefficients[0, 0].real - truth).abs().max() / truth.abs().max()
    assert error < 1e-7
    assert not effect.coefficients.imag.any()


# By hand, from logits (B, C) and targets (B,)
BY_HAND = {
    "logits": lambda z, y: z,
    "probabilities": lambda z, y: z.exp() / z.exp().sum(1, keepdim=True),
    "margin": lambda z, y: (lambda p: (p / (1 - p)).log())((z.exp() / z.exp().sum(1, keepdim=True))[range(7), y]),
}


@pytest.mark.parametrize("output", BY_HAND)
def test_first_order_of_outputs_equals_retraining(run, output):
    """Oracle: central differences of retraining, with the output written by hand."""
    sketch, plus, minus = run
    x, y = TEST
    effect = DeletionPredictor(sketch, Forward().double(), output).prepare((x, y))
    assert_derivative(effect, *(BY_HAND[output](model.net(x), y) for model in (plus, minus)))


@pytest.mark.parametrize("flat", [False, True])
def test_first_order_of_single_logits_equals_retraining(binary, flat):
    """Oracle: central differences of retraining; the sigmoid and ``log(p / (1 - p))`` by hand."""
    sketch, plus, minus = binary
    x, y = TEST[0], (TEST[1] > 0).double()

    class Flat(Binary):
        def forward(self, inputs):
            return self.net(inputs)[:, 0]

    module = (Flat if flat else Binary)().double()
    p = [1 / (1 + (-model.net(x)).exp()) for model in (plus, minus)]
    effect = DeletionPredictor(sketch, module, "probabilities").prepare([x, y])
    assert_derivative(effect, *((q[:, 0] if flat else q) for q in p))
    own = [torch.where(y > 0, q[:, 0], 1 - q[:, 0]) for q in p]
    for targets in (y, y.long(), y.bool()) if flat else (y, y[:, None]):
        effect = DeletionPredictor(sketch, module, "margin").prepare([x, targets])
        assert_derivative(effect, *((q / (1 - q)).log() for q in own))


@pytest.mark.parametrize("name", ["net.0.weight", "net.2.bias"])
def test_first_order_of_parameters_equals_retraining(run, name):
    """Oracle: central differences of retraining."""
    sketch, plus, minus = run
    effect = DeletionPredictor(sketch, Forward(), f"parameter:{name}").prepare()
    assert_derivative(effect, *(model.state_dict()[name] for model in (plus, minus)))


def test_first_order_of_embeddings_equals_retraining(run):
    """Oracle: central differences of retraining; the module has no hooks afterwards."""
    sketch, plus, minus = run
    module = Forward().double()
    effect = DeletionPredictor(sketch, module, "embedding:net.1").prepare(TEST)
    assert_derivative(effect, *(torch.tanh(model.net[0](TEST[0])) for model in (plus, minus)))
    assert not module.net[1]._forward_hooks


@pytest.mark.parametrize("output", ["logits", "probabilities", "margin", "embedding:net"])
def test_inputs_are_found_in_every_kind_of_batch(run, tmp_path, output):
    """Oracle: the batch ``(x, y)``."""
    sketch, *_ = run
    x, y = TEST
    expected = DeletionPredictor(sketch, Forward().double(), output).prepare((x, y))
    fit(HuggingFace, [SketchCallback(tmp_path, PSI[None], 1)])
    keywords = DeletionPredictor(Sketch.load(tmp_path), HuggingFace().double(), output)
    batches = [{"values": x, key: y} for key in ("labels", "label", "y")]
    batches.append(UserDict(values=x, labels=y))  # what tokenizers return is one
    batches.append({"values": x, "mask": torch.ones_like(x), "labels": y})
    effects = [keywords.prepare(batch) for batch in batches]
    if output != "margin":
        plain = DeletionPredictor(sketch, Forward().double(), output)
        effects += [plain.prepare(batch) for batch in (x, [x], (x, y))] + [keywords.prepare({"values": x})]
    for effect in effects:
        torch.testing.assert_close(effect.baseline, expected.baseline)
        torch.testing.assert_close(effect.coefficients, expected.coefficients)


class Keywords(HuggingFace):
    """Takes whatever it is given, and needs ``values``."""

    def forward(self, **given):
        return super().forward(given["values"])["logits"]


def test_a_forward_of_any_keywords_is_given_all(run):
    """Oracle: the batch ``(x, y)``."""
    found = DeletionPredictor(run[0], Forward().double(), "logits").prepare(TEST)
    classes = type("Forward", (Keywords,), {})
    again = DeletionPredictor(run[0], classes().double(), "logits").prepare({"values": TEST[0], "rows": TEST[1]})
    torch.testing.assert_close(again.coefficients, found.coefficients)


class Unused(Forward):
    def forward(self, x):
        return self.net[2](torch.tanh(self.net[0](x)))


class Twice(Forward):
    def forward(self, x):
        return self.net(x) + self.net(x)


class Pair(Forward):
    def forward(self, x, target):
        return self.net(x)


class Deep(Forward):
    def forward(self, x):
        return self.net(x)[:, None, :].expand(-1, 2, -1)


class Text(Forward):
    def forward(self, x):
        return "logits"


X, Y = TEST


@pytest.mark.parametrize(
    ("make", "output", "batch", "message"),
    [
        (Classifier, "logits", TEST, "`output` calls `forward`, which the module does not define"),
        (Forward, "logits", (X, Y, Y), "`output` does not find the inputs in the batch .a tuple of Tensor, Tensor, T"),
        (Forward, "logits", ({"x": X}, Y), "`output` does not find the inputs"),
        (Forward, "logits", {"inputs": X, "y": Y}, r"`forward` with the batch's keys \['inputs'\], but it takes \['x'"),
        (Forward, "logits", {"x": X, "row": Y}, r"`forward` with the batch's keys \['row', 'x'\]"),
        (Forward, "logits", {"labels": Y}, "`forward` with the batch's keys"),
        (Text, "logits", TEST, "`forward` that returns a tensor.*returned str"),
        (Deep, "probabilities", TEST, r"`output='probabilities'` needs logits .*\(7, 2, 3\)"),
        (Deep, "margin", TEST, "`output='margin'` needs logits"),
        (Forward, "margin", X, "does not tell its targets"),
        (Forward, "margin", {"x": X}, r"a mapping with the keys \['x'\].*does not tell its targets"),
        (Forward, "margin", {"x": X, "y": Y, "label": Y}, "does not tell its targets"),
        (Forward, "margin", (X, Y + 1), r"`output='margin'` needs targets \(7,\) of classes 0 to 2"),
        (Forward, "margin", (X, Y - 1), "`output='margin'` needs targets"),
        (Forward, "margin", (X, Y + 0.5), "`output='margin'` needs targets"),
        (Forward, "margin", (X, F.one_hot(Y, CLASSES)), r"needs targets .*\(7, 3\)"),
        (Unused, "embedding:net", TEST, "`output='embedding:net'`: the submodule was called 0 times"),
        (Twice, "embedding:net", TEST, "was called 2 times"),
        (Forward, "logits", None, "`batches`: the output 'logits' needs a batch"),
        (Pair, "logits", TEST, r"calls `forward` with the inputs `x` of the batch alone, but it takes \(x, target\)"),
        (Forward, "parameter:net.0.bias", TEST, "`batches`: the output 'parameter:net.0.bias' needs no batch"),
    ],
)
def test_what_is_ambiguous_is_refused(run, make, output, batch, message):
    """Oracle: the error's words."""
    with pytest.raises(ConfigurationError, match=message):
        DeletionPredictor(run[0], make().double(), output).prepare(batch)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("accuracy", "`output` must be 'loss', 'logits', 'probabilities', 'margin'.*'accuracy'"),
        ("parameter:net.5.weight", r"no parameter 'net.5.weight', but \['net.0.bias'"),
        ("embedding:head", r"no submodule 'head', but \['net', 'net.0'"),
        (3, "`output` must be a name or a callable"),
    ],
)
def test_unknown_outputs_are_refused_at_once(run, output, message):
    """Oracle: the error's words."""
    with pytest.raises(ConfigurationError, match=message):
        DeletionPredictor(run[0], Forward(), output)


@pytest.mark.parametrize("output", ["loss", "logits", lambda module, batch: module.net[0](batch[0])])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataloader_is_its_batches_in_a_row(sharded, output, workers):
    """Oracle: one batch of all examples; the last of the dataloader's batches is incomplete."""
    predictor = DeletionPredictor(sharded, Forward().double(), output)
    whole = predictor.prepare(TEST)
    random_state = torch.get_rng_state()
    batches = DataLoader(TensorDataset(*TEST), batch_size=3, num_workers=workers)
    parts = predictor.prepare(batches)
    torch.testing.assert_close(parts.baseline, whole.baseline)
    torch.testing.assert_close(parts.coefficients, whole.coefficients)
    assert torch.equal(torch.get_rng_state(), random_state)


class Logged(Dataset):
    def __init__(self, events):
        self.events = events

    def __len__(self):
        return 6

    def __getitem__(self, i):
        self.events.append("read" if i % 2 == 0 else "")
        return TEST[0][i], TEST[1][i]


def test_one_shard_and_one_batch_at_a_time(sharded, monkeypatch):
    """Oracles: the order of events, and weak references to the shards that were read."""
    events, alive = [], weakref.WeakSet()
    shards = Sketch.shards

    def counted(self):
        iterator = shards(self)
        while True:
            gc.collect()
            assert not alive, "a shard is still in memory while the next is read"
            shard = next(iterator, None)
            if shard is None:
                return
            events.append("shard")
            for block in shard.scaled.values():
                alive.add(block)
            yield shard
            del block, shard

    monkeypatch.setattr(Sketch, "shards", counted)

    def output(module, batch):
        events.append("run")
        return module(batch[0])

    DeletionPredictor(sharded, Forward().double(), output).prepare(DataLoader(Logged(events), batch_size=2))
    of_one_shard = ["shard", *["read", "run"] * 3]
    assert [event for event in events if event] == of_one_shard * 5


def test_batches_are_converted_as_the_trainer_converts_them(run, sharded):
    """Oracle: the inputs in float64; the run was in ``64-true``."""
    x, y = TEST[0].float(), TEST[1]
    predictor = DeletionPredictor(sharded, Forward().double(), "logits")
    expected = predictor.prepare((x.double(), y))
    for batches in ((x, y), DataLoader(TensorDataset(x, y), batch_size=4)):
        torch.testing.assert_close(predictor.prepare(batches).coefficients, expected.coefficients)


class Noisy(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return TEST[0][i] + np.random.default_rng().normal(), TEST[1][i]


class Drops(Dataset):
    """Random by torch's own generator, which every pass begins from the same state."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return TEST[0][i] * torch.rand(()), TEST[1][i]


def test_augmentation_repeats_itself_where_it_can(sharded):
    """Oracle: the batches as they come from the same random state."""
    predictor = DeletionPredictor(sharded, Forward().double(), "logits")
    torch.manual_seed(3)
    found = predictor.prepare(DataLoader(Drops(), batch_size=2))
    x = torch.cat([x for x, _ in DataLoader(Drops(), batch_size=2)])
    torch.testing.assert_close(found.coefficients, predictor.prepare(x).coefficients)


@pytest.mark.parametrize(
    ("batches", "output", "message"),
    [
        (DataLoader(data(), shuffle=True), "logits", "`batches` is a DataLoader that shuffles.*shuffle=False"),
        (DataLoader(TensorDataset(X[:0])), "logits", "`batches` is an empty DataLoader"),
        (DataLoader(Noisy(), batch_size=2), "logits", "`batches` gives other examples when iterated again"),
        (
            DataLoader(TensorDataset(X), 4),
            lambda m, b: m(b[0])[:, : len(b[0]) - 2],
            r"`output` has the shapes \[\(1,\)",
        ),
        (DataLoader(TensorDataset(X, Y), 4), lambda m, b: m(b[0]).mean(0), "`output` must return .* examples .4."),
        (
            DataLoader(TensorDataset(X, Y), 4),
            lambda m, b: m(b[0]).repeat(5, 1),
            r"shape \(20, 3\): undo its flattening by `.unflatten\(0, \(4, -1\)\)`",
        ),
    ],
)
def test_dataloaders_that_can_not_be_streamed_are_refused(sharded, batches, output, message):
    """Oracle: the error's words."""
    with pytest.raises(ConfigurationError, match=message):
        DeletionPredictor(sharded, Forward().double(), output).prepare(batches)


def test_buffers_that_a_batch_changes_are_those_of_the_sketch_for_the_next(tmp_path):
    """Oracle: a batch of its own."""

    class Counting(Forward):
        def __init__(self):
            super().__init__(network())
            self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            if not self.training:
                self.seen += 1
            return self.net(x) * self.seen

    fit(Counting, [SketchCallback(tmp_path, PSI[None], 1)])
    predictor = DeletionPredictor(Sketch.load(tmp_path), Counting().double(), "logits")
    parts = predictor.prepare(DataLoader(TensorDataset(*TEST), batch_size=3))
    torch.testing.assert_close(parts.baseline, predictor.prepare(TEST).baseline)
