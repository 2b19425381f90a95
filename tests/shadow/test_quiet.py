"""Running a training step again leaves no trace, and starts from where the step started."""

import copy
import pickle
import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, Classifier, data, fit
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.shadow.places import Places
from lightning_sketch.shadow.quiet import ModuleState, quiet
from lightning_sketch.shadow.random_state import RandomState

BATCH = data(4).tensors


class World(torch.utils.data.Dataset):
    """What a module may refer to, and nobody should copy at every step."""

    def __init__(self) -> None:
        self.rows = [0]


class AverageMeter:
    """A helper as users write them."""

    def __init__(self) -> None:
        self.total, self.values = 0.0, []

    def update(self, value: float) -> None:
        self.total += value
        self.values.append(value)


class Busy(Classifier):
    """Leaves a trace wherever a training step can."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, CLASSES)).double()
        self.count, self.phase = 0, "start"
        self.outputs: list[Any] = []
        self.table: dict[str, Any] = {"rows": [], "deep": {"set": set()}}
        self.pair = ([], {})
        self.seen = set()
        self.recent = deque(maxlen=2)
        self.counts, self.groups, self.ordered = Counter(), defaultdict(list), OrderedDict()
        self.histogram = np.zeros(CLASSES)
        self.meter = AverageMeter()
        self.generator = torch.Generator().manual_seed(0)
        self.numpy_generator = np.random.default_rng(0)
        self.python_generator = random.Random(0)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.collection = MetricCollection({"a": MeanMetric(), "b": MeanMetric()})
        self.plain = {"mean": MeanMetric(), "confusion": MulticlassConfusionMatrix(CLASSES)}
        self.nested = {"train": [MeanMetric()]}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.count += 1
        self.phase = "went on"
        self.new = "attribute"
        self.training_flag = self.net[1].training
        draws = np.random.rand(), random.random(), float(torch.rand(())), float(self.numpy_generator.random())
        scale = 1 + 0.1 * (sum(draws) + self.python_generator.random())
        scale += 0.1 * float(torch.rand((), generator=self.generator))
        logits = self.net(x * scale)
        loss = F.cross_entropy(logits, y) / self.count
        value = loss.item()
        for held in (self.outputs, self.table["rows"], self.recent, self.pair[0], self.groups["g"]):
            held.append(value)
        self.table["deep"]["set"].add(value)
        self.pair[1][self.count] = value
        self.seen.add(self.count)
        self.counts["steps"] += 1
        self.ordered[self.count] = value
        self.histogram[int(y[0])] += 1
        self.meter.update(value)
        self.accuracy(logits, y)
        self.collection(loss)
        self.plain["mean"].update(loss)
        self.plain["confusion"](logits, y)
        self.nested["train"][0].update(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy, "a": self.collection["a"]})
        if self.logger is not None:
            self.logger.log_metrics({"direct": value}, step=self.count)
            self.logger.experiment.log_metrics({"experiment": value}, step=self.count)
        self.net[1].eval()
        return loss


def everything(module: Busy) -> Any:
    """All that the step changes, in a comparable form."""
    metrics = [module.accuracy, *module.collection.values(), *module.plain.values(), *module.nested["train"]]
    return copy.deepcopy(
        {
            "attributes": {
                k: getattr(module, k) for k in ("count", "phase", "outputs", "table", "pair", "seen", "recent")
            },
            "more": (module.counts, module.groups, module.ordered, module.histogram.tolist(), vars(module.meter)),
            "has new": "new" in module.__dict__,
            "keys": set(module.__dict__) | {k for m in metrics for k in m.__dict__},
            "state": {k: v.tolist() for k, v in module.state_dict().items()},
            "metrics": [{k: v.tolist() for k, v in m.metric_state.items()} for m in metrics],
            "updates": [m.update_count for m in metrics],
            "training": [m.training for m in module.modules()],
            "random": (torch.rand(2).tolist(), np.random.rand(), random.random()),
            "own": (module.numpy_generator.random(), module.python_generator.random()),
            "torch own": torch.rand(2, generator=module.generator).tolist(),
        }
    )


def buffers_kept(module: nn.Module) -> Any:
    return {name: b.clone() for name, b in module.named_buffers()}


def run_again(module: Any, module_state: ModuleState, random_state: RandomState) -> float:
    """The step from its beginning; buffers are given by the caller, as in a replay."""
    kept = buffers_kept(module)
    with quiet(Places(module), torch.device("cpu")) as start:
        start(random_state, module_state)
        loss = module.training_step(BATCH, 0).item()
    for name, b in module.named_buffers():
        b.copy_(kept[name])
    return loss


def test_a_second_run_leaves_no_trace_and_gives_the_same_loss():
    """Oracle: a module that ran its step once, and that loss; the step anneals by an attribute it counts itself."""
    results = []
    for repeats in (0, 3):
        pl.seed_everything(3, verbose=False)
        module = Busy()
        module.training_step(BATCH, 0)
        module.train()
        random_state, module_state = RandomState.capture(torch.device("cpu")), ModuleState(Places(module))
        kept = buffers_kept(module)
        loss = module.training_step(BATCH, 0).item()
        after = buffers_kept(module)
        for _ in range(repeats):
            for name, b in module.named_buffers():
                b.copy_(kept[name])
            assert run_again(module, module_state, random_state) == loss
        for name, b in module.named_buffers():
            b.copy_(after[name])
        results.append(everything(module))
    assert results[0] == results[1]


class Raises(Busy):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        super().training_step(batch, batch_idx)
        raise RuntimeError("the user's")


def test_an_exception_leaves_no_trace():
    """Oracle: a module that did not run."""
    results = []
    for run in (False, True):
        pl.seed_everything(3, verbose=False)
        module = Raises()
        if run:
            with pytest.raises(RuntimeError, match="the user's"):
                run_again(module, ModuleState(Places(module)), RandomState.capture(torch.device("cpu")))
            for b in module.buffers():
                b.zero_()
        else:
            for b in module.buffers():
                b.zero_()
        results.append(everything(module))
    assert results[0] == results[1]


def test_nothing_is_logged(tmp_path):
    """Oracle: the rows, metrics and metric states of a run without re-runs."""

    class Twice(pl.Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            run_again(pl_module, ModuleState(Places(pl_module)), RandomState.capture(torch.device("cpu")))

    rows = []
    for i, callbacks in enumerate(([], [Twice()])):
        logger = CSVLogger(tmp_path, version=i)
        module, trainer = fit(Busy, callbacks, logger=logger, log_every_n_steps=1)
        rows.append(((tmp_path / f"lightning_logs/version_{i}/metrics.csv").read_text(), trainer.callback_metrics))
        rows[-1] += (everything(module), len(trainer.loggers))
    assert rows[0][0].count("\n") > 6
    assert rows[0] == rows[1]


def test_datasets_are_not_copied():
    """Oracle: what a run does to a dataset stays."""

    class Refers(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.dataset = World()

    module = Refers()
    state = ModuleState(Places(module))
    module.dataset.rows.append(1)
    state.restore()
    assert module.dataset.rows == [0, 1]


def test_attributes_deleted_by_a_run_come_back():
    """Oracle: the module before."""

    class Deletes(Busy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            del self.phase
            self.instead = 1
            return torch.zeros(())

    module = Deletes()
    keys = list(module.__dict__)
    run_again(module, ModuleState(Places(module)), RandomState.capture(torch.device("cpu")))
    assert sorted(module.__dict__) == sorted(keys)
    assert module.phase == "start"


@pytest.mark.parametrize("where", ["plain", "net.plain", "held"])
def test_a_tensor_changed_in_place_must_be_a_buffer(where):
    module = Classifier()
    module.plain = module.net.plain = torch.zeros(2)
    module.held = {"deep": [torch.zeros(2)]}
    target = {"plain": module.plain, "net.plain": module.net.plain, "held": module.held["deep"][0]}[where]
    del module.plain, module.net.plain
    if where == "plain":
        module.plain = target
    elif where == "net.plain":
        module.net.plain = target
    state = ModuleState(Places(module))
    state.refuse_changed_tensors()
    target += 1
    with pytest.raises(ConfigurationError, match=f"`{where}`.*in place.*register_buffer"):
        state.refuse_changed_tensors()


def test_parameters_and_buffers_that_a_run_registers_are_taken_away():
    """Oracle: the module before; most modules have neither, and those are not copied."""

    class Registers(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.empty.register_buffer("mean", torch.zeros(2))
            self.empty.weight = nn.Parameter(torch.zeros(2))
            del self.full.mean
            return torch.zeros(())

    module = Registers()
    module.empty, module.full = nn.Identity(), nn.Identity()
    module.full.register_buffer("mean", torch.zeros(2))
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    run_again(module, ModuleState(Places(module)), RandomState.capture(torch.device("cpu")))
    assert [name for name, _ in (*module.named_parameters(), *module.named_buffers())] == names


@pytest.mark.parametrize("order", ["", "a", "b", "ab", "ba", "aba", "bab", "abb"])
def test_states_with_other_buffers_are_taken_up_in_any_order(order):
    """Oracle: the names and tensors of the module when the states were remembered, and before."""
    module = Classifier()
    states = {"a": ModuleState(Places(module))}
    module.register_buffer("later", torch.zeros(2))
    places = Places(module)
    states["b"] = ModuleState(places)
    before = dict(module.state_dict(keep_vars=True))
    random_state = RandomState.capture(torch.device("cpu"))
    with quiet(places, torch.device("cpu")) as start:
        for name in order:
            start(random_state, states[name])
            assert ("later" in dict(module.named_buffers())) == (name == "b")
    after = module.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is t for name, t in before.items())


@pytest.mark.parametrize("drawn", range(4))
@pytest.mark.parametrize("bits", [np.random.MT19937, np.random.PCG64])
def test_random_numbers_go_on_from_a_state(bits, drawn):
    """Oracle: the generators' own copies of their states; normals come in pairs, the second is kept for later."""

    def states() -> dict[str, Any]:
        return {"numpy": np.random.get_state(legacy=False), "python": random.getstate()}

    def draw() -> tuple[Any, ...]:
        return np.random.randn(701), np.random.rand(), [random.gauss(0, 1) for _ in range(701)], torch.rand(3)

    mine = np.random.get_bit_generator()
    np.random.set_bit_generator(bits(0))
    try:
        for _ in range(drawn):
            np.random.randn(), random.gauss(0, 1)
        before = states()
        expected = before["numpy"]
        state = pickle.loads(pickle.dumps(RandomState.capture(torch.device("cpu"))))
        assert same(states(), before)
        draws = draw()
        state.restore()
        assert same(states(), before)
        assert all(map(np.array_equal, draws, draw()))
        np.random.set_state(expected)
        np.testing.assert_array_equal(np.random.randn(701), draws[0])
    finally:
        np.random.set_bit_generator(mine)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(
        same(v, b[k]) if isinstance(v, dict) else v == b[k] if isinstance(v, tuple) else np.array_equal(v, b[k])
        for k, v in a.items()
    )
