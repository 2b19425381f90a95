"""A pass that finds no memory is carried again in halves: same sketch, same run."""

import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, FEATURES, Classifier, fit, loader, sketch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_sketch import MemoryShortageError, Sketch, SketchCallback, StableAdamW
from lightning_sketch.jets.registry import find_rule
from lightning_sketch.jets.tensor import JetTensor, Lead, arrange, is_arranged
from lightning_sketch.shadow import update
from lightning_sketch.shadow.checks import Readings
from lightning_sketch.shadow.jets_of_run import RunJets

UNITS = [i % 4 for i in range(12)]
EPOCHS = 2  # of three optimizer steps
SPLIT = [2, 2, 2, 2, 1, 1]  # of four real ones, and of four and two complex ones
STRIDE = 13
Fits = Callable[[int, Lead], bool]


class Everything(Classifier):
    """Buffers that change in place and by reassignment, dropout, attributes, state that begins with the first step."""

    def __init__(self) -> None:
        layers = nn.Linear(FEATURES, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Tanh(), nn.Dropout(0.3)
        super().__init__(nn.Sequential(*layers, nn.Linear(6, CLASSES)))
        self.register_buffer("total", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("center", torch.zeros(CLASSES, dtype=torch.float64))
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(len(x))
        penalty = 1e-2 * (self.total.square().mean() + (self.net[4].bias - self.center).square().sum())
        logits = self.net(x)
        self.total.add_(self.net[0].weight.detach().sum(1))
        self.center = 0.9 * self.center + 0.1 * logits.detach().mean(0)
        return F.cross_entropy(logits, y) + penalty / len(self.seen)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02, eps=1e-2)


class Pictures(Classifier):
    """Convolutions in the memory order of images."""

    def __init__(self) -> None:
        convolution = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.GELU()
        net = nn.Sequential(nn.Linear(FEATURES, 18), nn.Unflatten(1, (2, 3, 3)), *convolution, nn.Flatten())
        super().__init__(nn.Sequential(net, nn.Linear(12, CLASSES)).to(memory_format=torch.channels_last))
        self.double()  # before the Trainer would: it restores optimizer state in the dtype that parameters have then

    def configure_optimizers(self) -> Any:
        return StableAdamW(self.parameters(), lr=0.02, eps=1e-3)


def callback(dirpath: Path, **changed: Any) -> SketchCallback:
    """Six complex and four real directions, four in a pass."""
    options = {"directions": 6, "degree": 2, "design": "sphere+basis", "units": UNITS, "directions_per_pass": 4}
    return SketchCallback(dirpath / "sketch", **{**options, **changed})


def run(callbacks: list[pl.Callback], make: Callable[[], pl.LightningModule] = Everything, **options: Any) -> list[Any]:
    """Train; return whatever must not depend on the callback."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "epochs": EPOCHS, **options}
    module, trainer = fit(make, callbacks, loader(batch_size=2), **options)
    kept = module.state_dict(), trainer.optimizers[0].state_dict(), getattr(module, "seen", None), torch.get_rng_state()
    return [module.training, sorted(module.__dict__), *torch.utils._pytree.tree_leaves(kept)]


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def scaled(dirpath: Path) -> dict[tuple[str, int], Tensor]:
    """Coefficients by name and direction, ``(R, P, *S)``."""
    return {
        (name, int(row)): block[:, :, k]
        for shard in Sketch.load(dirpath / "sketch").shards()
        for name, block in shard.scaled.items()
        for k, row in enumerate(shard.indices)
    }


def assert_close(dirpath: Path, reference: Path, tolerance: float = 1e-12) -> None:
    ours, theirs = scaled(dirpath), scaled(reference)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        for mine, other in zip(ours[key], value, strict=True):
            assert float((mine - other).abs().max()) <= tolerance * float(other.abs().max()), key


def sizes(dirpath: Path) -> list[int]:
    return [len(shard.indices) for shard in Sketch.load(dirpath / "sketch").shards()]


class Shortage:
    """Raises in operators of a pass, after their result is written, unless ``fits`` says that there is memory.

    Args:
        fits: called with optimizer step and ``(R, P, K)``.
        operator: beginning of the name of the operator where it is asked; ``"reserve"`` for what comes before the
            update; everything before the update if empty.
        nth: at which call of that operator in a pass.
    """

    def __init__(self, patches: pytest.MonkeyPatch, fits: Fits, operator: str = "", nth: int = 1) -> None:
        self.raised = 0
        self.calls = 0  # in this pass
        self.passes: list[tuple[int, Lead]] = []
        self.alive: list[int] = []  # how many results of failed passes there were when the next began
        self._results: list[weakref.ref[Tensor]] = []
        self._fits = fits
        self._in_update = self._failed = False
        advance, reserve = RunJets.advance, update.reserve

        def watched_advance(jets: RunJets, *args: Any) -> Any:
            if self._failed:
                self.alive.append(self.results_alive())
            self._results, self.calls = [], 0
            self._in_update = self._failed = False
            self.passes.append((args[-2], jets.lead))
            return advance(jets, *args)

        def rule_of(op: Any) -> Callable[..., Any]:
            def watched_rule(*args: Any, **kwargs: Any) -> Any:
                result = find_rule(op)(*args, **kwargs)
                if type(result) is JetTensor:
                    self._results.append(weakref.ref(result))
                if str(op).startswith(operator) and (operator or not self._in_update):
                    self.calls += 1
                    if not operator or self.calls == nth:
                        self._ask(self.passes[-1][1])
                return result

            return watched_rule

        def watched_reserve(snapshot: Any, params: Any, blocks: Any, lead: Lead) -> None:
            reserve(snapshot, params, blocks, lead)
            self._in_update = True
            if operator == "reserve":
                self._ask(lead)

        patches.setattr(RunJets, "advance", watched_advance)
        patches.setattr(JetTensor, "rule_of", staticmethod(rule_of))
        patches.setattr(update, "reserve", watched_reserve)

    def results_alive(self) -> int:
        """How many results of the last pass there still are."""
        return sum(r() is not None for r in self._results)

    def _ask(self, lead: Lead) -> None:
        if not self._fits(self.passes[-1][0], lead):
            self.raised += 1
            self._failed = True
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    """The run without the callback."""
    return run([])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sketch of the run that has memory."""
    dirpath = tmp_path_factory.mktemp("whole")
    run([callback(dirpath)])
    assert sizes(dirpath) == [4, 4, 2]
    return dirpath


PHASES = {
    "forward": ("aten.tanh.", 1),
    "running statistics, second micro-batch": ("aten.native_batch_norm.", 2),
    "buffer in place, second micro-batch": ("aten.add_.", 2),
    "backward, second micro-batch": ("aten.tanh_backward.", 2),
    "before the update": ("reserve", 1),
}


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_halves_give_the_same_sketch(
    phase: str, step: int, plain: list[Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the run that has memory; and for the user's run that without the callback, to the last bit."""
    operator, nth = PHASES[phase]
    shortage = Shortage(monkeypatch, lambda now, lead: now < step or lead[2] <= 2, operator, nth)
    with pytest.warns(UserWarning, match=rf"4 directions through optimizer step {step}.*`directions_per_pass=2`"):
        assert_same(run([callback(tmp_path, every_n_train_steps=2)]), plain)
    assert shortage.raised == 1  # of the four real ones; all complex ones need as much
    assert sizes(tmp_path) == SPLIT
    assert_close(tmp_path, whole)
    Sketch.load(tmp_path / "sketch").verify()


def test_halves_are_blocks_of_that_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: blocks of one direction from the start; as many numbers of a step are read."""
    asked: list[int] = []
    read = Readings.read

    def counted_read(readings: Readings) -> None:
        asked.append(readings.mark())
        read(readings)

    monkeypatch.setattr(Readings, "read", counted_read)
    run([callback(tmp_path / "one", directions_per_pass=1)])
    reads = len(asked)
    Shortage(monkeypatch, lambda now, lead: lead[2] == 1, "aten.tanh_backward.", 2)
    with pytest.warns(UserWarning, match="`directions_per_pass=1`"):
        run([callback(tmp_path / "halved", directions_per_pass=3)])
    assert sizes(tmp_path / "halved") == [1] * 10
    assert_close(tmp_path / "halved", tmp_path / "one", tolerance=0)
    assert asked[:reads] == asked[reads:]


def test_blocks_that_need_as_much_are_split_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shortage = Shortage(monkeypatch, lambda now, lead: now < 1 or lead[1] * lead[2] <= 4, "aten.tanh.")
    with pytest.warns(UserWarning, match="4 directions through optimizer step 1") as caught:
        run([callback(tmp_path, design="sphere", directions=12)], epochs=1)
    assert shortage.raised == 1
    assert sum("does not suffice" in str(w.message) for w in caught) == 1
    assert [lead[2] for now, lead in shortage.passes if now == 1] == [4, *[2] * 6]


class Frozen(Everything):
    """The first layer leaves the optimizer after an epoch and is changed in place from then on."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            del self.trainer.optimizers[0].param_groups[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch == 1:
            with torch.no_grad():
                self.net[0].weight.mul_(0.99).add_(self.net[0].bias[:, None], alpha=0.01)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        groups = [self.net[1:].parameters(), self.net[0].parameters()]
        return torch.optim.Adam([{"params": list(g)} for g in groups], lr=0.02, eps=1e-2)

    def on_fit_end(self) -> None:
        self.trainer.optimizers[0].add_param_group({"params": list(self.net[0].parameters())})


@pytest.mark.parametrize("make", [Everything, Frozen])
def test_a_step_may_be_repeated_wherever_it_failed(
    make: type[Everything], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the run that has memory, to the last bit; nothing is split, passes fail at one operator after another."""
    failed: Counter[tuple[int, Any]] = Counter()

    def fits(step: int, lead: tuple[int, int, int]) -> bool:
        if step % 3 or shortage.calls != 1 + STRIDE * failed[step, lead]:
            return True
        failed[step, lead] += 1
        return False

    expected = run([callback(tmp_path / "whole")], make)
    shortage = Shortage(monkeypatch, fits)
    monkeypatch.setattr(SketchCallback, "_halve", lambda *_: None)
    assert_same(run([callback(tmp_path / "failing")], make), expected)
    assert_close(tmp_path / "failing", tmp_path / "whole", tolerance=0)
    assert len(failed) == 2 * 3
    assert all(count > 100 // STRIDE for count in failed.values())


@pytest.mark.parametrize("phase", ["forward", "before the update"])
def test_the_failed_pass_is_freed(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: weak references to all results of the failed pass, asked for when the next one begins.

    Of a backward pass that fails on the CPU, autograd's queue keeps what was waiting until the next one.
    """
    shortage = Shortage(monkeypatch, lambda now, lead: lead[2] <= 2, *PHASES[phase])
    with pytest.warns(UserWarning, match="does not suffice"):
        run([callback(tmp_path)], Circular, epochs=1)
    assert shortage.raised == 1
    assert shortage.alive == [0]


class Circular(Everything):
    """Leaves what only the garbage collector frees."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        circle: list[Any] = [loss]
        circle.append(circle)
        return loss


LOST = {
    "one direction": ("aten.tanh.", 2, r"one direction through optimizer step 2: choose a lower `degree`"),
    "in the update": ("aten.addcdiv_.", 3, r"while the Taylor coefficients were changed at optimizer step 2.*`degree`"),
}


@pytest.mark.parametrize("case", LOST)
def test_the_run_goes_on_without_a_sketch(
    case: str, plain: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the run without the callback, to the last bit."""
    operator, nth, words = LOST[case]
    shortage = Shortage(monkeypatch, lambda now, lead: now < 2, operator, nth)
    alive: list[int] = []
    seen = Seen(lambda: alive.append(shortage.results_alive()))
    with pytest.warns(UserWarning, match=rf"{words}.*Training goes on; the sketch is not written"):
        assert_same(run([callback(tmp_path, directions_per_pass=1), seen]), plain)
    assert shortage.raised == 1
    assert alive[6:] == [0] * 6
    assert not (tmp_path / "sketch/sketch.json").exists()


class Seen(pl.Callback):
    """Does something before every batch."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action

    def on_train_batch_start(self, *args: Any) -> None:
        self.action()


@pytest.mark.parametrize("case", LOST)
def test_stopping_is_a_choice(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, nth, words = LOST[case]
    Shortage(monkeypatch, lambda now, lead: now < 2, operator, nth)
    with pytest.raises(MemoryShortageError, match=words):
        run([callback(tmp_path, directions_per_pass=1, on_instability="stop")])


def test_what_is_read_at_the_end_of_a_step_may_fail(
    plain: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rescaling makes new coefficients; oracle: the run without the callback."""

    def rescale(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RunJets, "_rescale", rescale)
    with pytest.warns(UserWarning, match=r"while the Taylor coefficients were changed at optimizer step 0.*goes on"):
        assert_same(run([callback(tmp_path)]), plain)


def test_a_run_is_resumed_after_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the run that was never interrupted, to the last bit."""
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    options: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": tmp_path, "epochs": 3}
    with monkeypatch.context() as patches:
        Shortage(patches, lambda now, lead: now < 1 or lead[2] <= 2, "aten.gelu_backward.", 2)
        with pytest.warns(UserWarning, match="does not suffice"):
            run([callback(tmp_path / "whole"), saving], Pictures, **options)
    run([callback(tmp_path / "resumed")], Pictures, epochs=3, checkpoint=tmp_path / "epoch=0.ckpt")
    assert sizes(tmp_path / "resumed") == SPLIT
    assert_close(tmp_path / "resumed", tmp_path / "whole", tolerance=0)


def test_images_keep_their_memory_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the run that has memory."""
    run([callback(tmp_path / "whole")], Pictures)
    Shortage(monkeypatch, lambda now, lead: now < 2 or lead[2] <= 2, "aten.gelu_backward.", 2)
    with pytest.warns(UserWarning, match="does not suffice"):
        run([callback(tmp_path / "halved")], Pictures)
    assert_close(tmp_path / "halved", tmp_path / "whole")


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("degree", [1, 2])
def test_split(degree: int, parts: int) -> None:
    """Oracle: rows of the whole."""
    generator = torch.Generator().manual_seed(0)
    psi = np.random.default_rng(0).normal(size=(5, 7)) * 2.0 ** np.arange(5)[:, None] * (1j if parts == 2 else 1)
    jets = RunJets(np.arange(3, 8), psi, degree, torch.float64, torch.device("cpu"), ranks=2)
    primals = {
        "image": torch.zeros(4, 3, 2, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last),
        "volume": torch.zeros(2, 3, 4, 5, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d),
        "transposed": torch.zeros(3, 4, dtype=torch.float64).t(),
        "plain": torch.zeros(3, 4, dtype=torch.float64),
        "number": torch.zeros((), dtype=torch.float64),
    }

    def blocks() -> dict[str, Tensor]:
        random = {n: torch.randn(*jets.lead, *p.shape, generator=generator).double() for n, p in primals.items()}
        return {name: arrange(block, primals[name]) for name, block in random.items()}

    jets.params, jets.buffers = {**blocks(), "none": None}, [blocks(), blocks()]
    jets.state = {(name, key): block for key in ("first", "second") for name, block in blocks().items()}
    jets._carried = frozenset({"net.center"})
    everything = [dict(mine) for mine in jets._tracked()]
    units = torch.tensor([2, -1, 6])
    weights = jets.weights(units).coefficients
    exponents = jets.exponents
    halves = jets.split()
    assert not any(jets._tracked())
    for half, rows in zip(halves, (slice(0, 2), slice(2, 5)), strict=True):
        count = rows.stop - rows.start
        assert half.lead == (degree, parts, count)
        assert half.indices.tolist() == list(range(3, 8))[rows]
        assert np.array_equal(half.exponents, exponents[rows])
        assert half._carried == {"net.center"}
        assert torch.equal(half.weights(units).coefficients, weights[:, :, rows])
        for mine, theirs in zip(half._tracked(), everything, strict=True):
            assert mine.keys() == theirs.keys()
            for name, block in theirs.items():
                if block is None:
                    assert mine[name] is None
                    continue
                primal = primals[name if isinstance(name, str) else name[0]]
                assert torch.equal(mine[name], block[:, :, rows])
                assert is_arranged(mine[name], primal)
                assert mine[name].untyped_storage().nbytes() == degree * parts * count * primal.numel() * 8


@pytest.mark.parametrize(
    ("make", "states"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), 1),
        (lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True), 3),
        (lambda p: StableAdamW(p, lr=0.01, eps=1e-3), 2),
    ],
    ids=["SGD", "momentum", "amsgrad", "stable"],
)
def test_the_reserve_is_enough(
    make: Callable[[Any], torch.optim.Optimizer], states: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what torch's profiler sees allocated in the update, of the first step and of the second."""

    class Wide(Classifier):
        def __init__(self) -> None:
            layers = nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, CLASSES)
            super().__init__(nn.Sequential(*layers))

        def configure_optimizers(self) -> Any:
            return make(self.parameters())

    found: list[tuple[int, int]] = []
    step = update.step

    def measured(snapshot: Any, params: Any, gradients: Any, blocks: Any, lead: Any, clip: Any) -> Any:
        needed = update.needed_bytes(snapshot, params, blocks, lead)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            after = step(snapshot, params, gradients, blocks, lead, clip)
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        taken = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
        found.append((needed, int(taken.max(initial=0))))
        return after

    monkeypatch.setattr(update, "step", measured)
    module, _ = fit(
        Wide, [sketch(tmp_path, 2, 2, design="sphere")], epochs=1, limit_train_batches=2, gradient_clip_val=0.1
    )
    largest, trained = (8 * size * 8 for size in (64 * 64, sum(p.numel() for p in module.parameters())))
    (first, _), (second, _) = found
    assert states * trained <= first - second < (states + 1) * trained  # and the coefficients of biases
    for needed, taken in found:
        assert largest <= taken <= needed <= taken + 8 * largest


def test_readings_go_back() -> None:
    """What a failed pass has asked for is not read."""
    readings, read = Readings(), []
    readings.ask(lambda values: read.append(float(values)), torch.ones(()))
    mark = readings.mark()
    readings.ask(lambda values: read.append(float(values)), torch.zeros(()))
    readings.go_back(mark)
    readings.ask(lambda values: read.append(float(values)), torch.tensor(2.0))
    readings.read()
    assert read == [1.0, 2.0]
