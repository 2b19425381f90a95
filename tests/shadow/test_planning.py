"""The plan of a pass: bytes of a step, directions that one pass carries, refusal before the memory is gone."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers import Classifier, fit, loader, scaled, sketch

from lightning_sketch import Sketch
from lightning_sketch.errors import ConfigurationError
from lightning_sketch.shadow import planning
from lightning_sketch.shadow.planning import StepSize, check_memory, directions_per_pass
from lightning_sketch.shadow.ranks import Ranks

CPU = torch.device("cpu")
MIB = 1 << 20


def measured(make, tmp_path, monkeypatch, **options):
    seen = []
    monkeypatch.setattr(
        "lightning_sketch.callbacks._carrying.directions_per_pass", lambda size, *_: seen.append(size) or 1
    )
    fit(make, [sketch(tmp_path, 2)], **options)
    return seen[0]


def test_a_step_is_measured(tmp_path, monkeypatch):
    """Oracle: sizes counted by hand for inputs (4, 5), hidden (4, 6) and logits (4, 3) in float64."""
    size = measured(Classifier, tmp_path, monkeypatch)
    parameters = (5 * 6 + 6 + 6 * 3 + 3) * 8
    assert size.trained == parameters
    assert size.state_tensors == 1  # the momentum of SGD
    assert size.largest == 5 * 6 * 8  # the gradient of the first weight
    # all gradients and the gradient of the last hidden layer, at most each activation a few times
    assert parameters + 4 * 6 * 8 <= size.peak <= parameters + 4 * (4 * 6 + 4 * 3) * 8


class Deep(Classifier):
    """Layers whose activations are all kept for the backward pass."""

    def __init__(self, layers):
        super().__init__()
        hidden = [m for _ in range(layers) for m in (torch.nn.Linear(16, 16), torch.nn.Tanh())]
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 16), *hidden, torch.nn.Linear(16, 3))


def test_what_the_backward_pass_needs_is_held_at_a_time(tmp_path, monkeypatch):
    """Oracle: every layer more keeps one activation (64, 16) more, or its gradients (16, 16) and (16,)."""
    sizes = {n: measured(lambda n=n: Deep(n), tmp_path, monkeypatch, train=loader(64, 64)) for n in (10, 20)}
    activation = 64 * 16 * 8
    assert sizes[20].peak - sizes[10].peak == pytest.approx(10 * activation, rel=0.02)


class DeepInFloat(Deep):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].float(), batch[1]), batch_idx)


def test_half_precision_is_planned_as_float32(tmp_path, monkeypatch):
    """Oracle: every layer more keeps an activation (256, 16) and the cast of its weights (16, 16), 4 bytes a number."""
    few, many = (
        measured(lambda n=n: DeepInFloat(n), tmp_path, monkeypatch, train=loader(256, 256), **scaled(1.0))
        for n in (10, 20)
    )
    assert many.peak - few.peak == pytest.approx(10 * (256 + 16) * 16 * 4, rel=0.02)


def test_gradients_of_earlier_micro_batches_are_held(tmp_path, monkeypatch):
    """Oracle: the bytes of the parameters."""
    one = measured(Classifier, tmp_path, monkeypatch)
    two = measured(Classifier, tmp_path, monkeypatch, accumulate_grad_batches=2)
    assert two.peak == one.peak + one.trained


def test_a_pass_on_the_cpu_stays_below_the_threshold_of_the_allocator():
    """Oracle: 32 MiB over the bytes of the largest tensor's coefficients."""
    size = StepSize(trained=10 * MIB, state_tensors=2, peak=20 * MIB, largest=2 * MIB)
    assert directions_per_pass(size, 2, 2, CPU) == 4
    assert directions_per_pass(size, 1, 1, CPU) == 16
    assert directions_per_pass(StepSize(1, 0, 1, 100 * MIB), 2, 2, CPU) == 1


def test_a_pass_on_a_gpu_leaves_room_for_the_coefficients_that_are_kept(monkeypatch):
    """Oracle: half of (1,000 - 480) MiB, (30 + 6) MiB a real direction of degree 1."""
    monkeypatch.setattr(planning, "available_bytes", lambda device: 1000 * MIB)
    size = StepSize(trained=10 * MIB, state_tensors=2, peak=30 * MIB, largest=2 * MIB)
    assert directions_per_pass(size, 1, 1, torch.device("cuda")) == 13
    assert directions_per_pass(size, 1, 1, torch.device("cuda"), size.state(16, 1)) == 7


def test_the_plan_is_what_is_kept_and_the_largest_pass(monkeypatch):
    """Oracle: plain copies of 110 + 30 MiB, 60 MiB kept a measurement, a pass of 72 MiB a measurement, with holes."""
    monkeypatch.setattr(planning, "available_bytes", lambda device: 1 << 40)
    size = StepSize(trained=10 * MIB, state_tensors=2, peak=30 * MIB, largest=2 * MIB)
    for counts, per_pass, measurements, directions in [
        ({1: 15, 2: 0}, {1: 1, 2: 1}, 15, 1),
        ({1: 3, 2: 2}, {1: 8, 2: 4}, 7, 2 * 2),  # each kind has its own pass; two complex ones are the larger
        ({1: 3, 2: 2}, {1: 1, 2: 1}, 7, 2),
    ]:
        expected = (140 + 60 * measurements + 1.7 * 72 * directions) * MIB
        assert check_memory(size, counts, per_pass, 2, CPU) == pytest.approx(expected, abs=1)
    with_units = check_memory(size, {1: 3, 2: 2}, {1: 1, 2: 1}, 2, CPU, 1000)
    assert with_units == pytest.approx((140 + 60 * 7 + 1.7 * 72 * 2) * MIB + 7 * 1000 * 8, abs=1)
    # the update holds gradients and copies of them: 20 + 6 MiB
    small = StepSize(trained=10 * MIB, state_tensors=2, peak=5 * MIB, largest=2 * MIB)
    assert check_memory(small, {2: 1}, {2: 1}, 1, CPU) == pytest.approx((115 + 60 + 1.7 * 52) * MIB, abs=1)


@pytest.mark.parametrize("counts", [{1: 200, 2: 0}, {1: 0, 2: 200}, {1: 130, 2: 70}])
@pytest.mark.parametrize("per_pass", [1, 7, 1000])
@pytest.mark.parametrize("free", [100, 700, 2048])
def test_the_number_that_fits_is_that_of_the_plan(monkeypatch, counts, per_pass, free):
    """Oracle: the plan itself, asked with that number of directions and with one more."""
    monkeypatch.setattr(planning, "available_bytes", lambda device: free * MIB)
    size = StepSize(trained=10 * MIB, state_tensors=2, peak=30 * MIB, largest=2 * MIB)
    passes = {1: per_pass, 2: per_pass}
    with pytest.raises(ConfigurationError, match=r"`directions`: 200 directions") as refusal:
        check_memory(size, counts, passes, 2, CPU)
    fit = int(re.search(r"(\d+) would fit", str(refusal.value))[1])

    def in_proportion(total):
        real = total * counts[1] // 200
        return {1: real, 2: total - real}

    assert fit < 200
    if fit:
        assert check_memory(size, in_proportion(fit), passes, 2, CPU) <= free * MIB
    with pytest.raises(ConfigurationError):
        check_memory(size, in_proportion(fit + 1), passes, 2, CPU)


def test_processes_share_what_is_free(monkeypatch):
    """Oracle: one process, with its part of what is free."""
    size = StepSize(trained=10 * MIB, state_tensors=2, peak=30 * MIB, largest=2 * MIB)
    told = []
    for free, processes in ((700, 1), (2100, 3)):
        monkeypatch.setattr(planning, "available_bytes", lambda device, free=free: free * MIB)
        with pytest.raises(ConfigurationError) as refusal:
            check_memory(size, {1: 200}, {1: 7}, 2, CPU, 0, processes)
        told.append(str(refusal.value))
    assert told[0] == told[1].replace(" for each of the 3 processes here", "")
    assert told[0] != told[1]
    monkeypatch.setattr(planning, "available_bytes", lambda device: 2000 * MIB)
    assert directions_per_pass(size, 1, 1, torch.device("cuda"), 480 * MIB, 2) == 7  # half of 520 MiB, 36 MiB each


def test_processes_of_a_host_share_its_memory():
    """Oracle: by hand; two hosts of three processes on CPUs, of two on GPUs of their own."""
    cpus, gpus = [CPU] * 3, [torch.device("cuda", i) for i in range(2)]
    for devices, rank, sharing in ((cpus, 4, 3), (gpus, 1, 1), (None, 0, 1)):
        strategy = SimpleNamespace(root_device=CPU if devices is None else devices[rank % len(devices)])
        if devices is not None:
            strategy.parallel_devices = devices
        size = 1 if devices is None else 2 * len(devices)
        ranks = Ranks.of(SimpleNamespace(strategy=strategy, world_size=size, global_rank=rank))
        assert (ranks.size, ranks.rank, ranks.on_device) == (size, rank, sharing)


def test_a_run_with_the_number_that_fits_starts(tmp_path, monkeypatch):
    """Oracle: the run itself, with the number that a refusal names and with one more."""
    monkeypatch.setattr(planning, "available_bytes", lambda device: 50_000)
    with pytest.raises(ConfigurationError) as refusal:
        fit(Classifier, [sketch(tmp_path, 40, 2)], epochs=1)
    number = int(re.search(r"(\d+) would fit", str(refusal.value))[1])
    assert 0 < number < 40
    with pytest.raises(ConfigurationError, match=f" {number} would fit"):
        fit(Classifier, [sketch(tmp_path, number + 1, 2)], epochs=1)
    fit(Classifier, [sketch(tmp_path, number, 2)], epochs=1)
    assert Sketch.load(tmp_path / "sketch").num_directions == number


def test_smaller_passes_are_the_remedy_where_they_suffice(monkeypatch):
    """Oracle: 200 directions keep 12,000 MiB, one pass of them all takes as much again."""
    size = StepSize(trained=10 * MIB, state_tensors=2, peak=30 * MIB, largest=2 * MIB)
    monkeypatch.setattr(planning, "available_bytes", lambda device: 13000 * MIB)
    with pytest.raises(ConfigurationError, match="or use a smaller `directions_per_pass`, a lower `degree`"):
        check_memory(size, {1: 200}, {1: 200}, 1, CPU)
    monkeypatch.setattr(planning, "available_bytes", lambda device: 4000 * MIB)
    with pytest.raises(ConfigurationError, match="or use a lower `degree`"):
        check_memory(size, {1: 200}, {1: 200}, 1, CPU)


def test_files_that_the_kernel_caches_are_free(tmp_path):
    """Oracle: limit - used + cached files, written down by hand."""
    for name, content in {
        "memory.max": "1000\n",
        "memory.current": "900\n",
        "memory.stat": "anon 300\ninactive_file 400\nactive_file 50\nshmem 150\n",
    }.items():
        (tmp_path / name).write_text(content)
    assert planning._available_in_group(tmp_path) == 1000 - 900 + 450
    (tmp_path / "memory.max").write_text("max\n")
    assert planning._available_in_group(tmp_path) is None
    assert planning._available_in_group(tmp_path / "none") is None


def test_a_run_that_cannot_fit_is_refused_before_its_first_step(tmp_path, monkeypatch):
    """Oracle: the parameters, which no step has changed."""
    monkeypatch.setattr(planning, "available_bytes", lambda device: 100)
    torch.manual_seed(1)
    module = Classifier()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ConfigurationError, match=r"`directions`.*GiB are free"):
        fit(lambda: module, [sketch(tmp_path, 2)], loader())
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(module.parameters(), before, strict=True))


def test_passes_are_split_by_the_plan(tmp_path, monkeypatch):
    """Oracle: five real directions, two a pass."""
    monkeypatch.setattr("lightning_sketch.callbacks._carrying.directions_per_pass", lambda *_: 2)
    fit(Classifier, [sketch(tmp_path, 1, design="basis", units=[i % 5 for i in range(12)])])
    shards = list(Sketch.load(tmp_path / "sketch").shards())
    assert [len(s.indices) for s in shards] == [2, 2, 1]
