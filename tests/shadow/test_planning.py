"""The plan of a pass: bytes of a step, directions that one pass carries, refusal before the memory is gone."""

import pytest
import torch
from helpers import Classifier, fit, loader, sketch

from lightning_sketch import Sketch
from lightning_sketch.errors import ConfigurationError
from lightning_sketch.shadow import planning
from lightning_sketch.shadow.planning import StepSize, check_memory, directions_per_pass

CPU = torch.device("cpu")
MIB = 1 << 20


def test_a_step_is_measured(tmp_path, monkeypatch):
    """Oracle: sizes counted by hand for inputs (4, 5), hidden (4, 6) and logits (4, 3) in float64."""
    seen = []
    original = planning.directions_per_pass
    monkeypatch.setattr(
        "lightning_sketch.callbacks.sketch.directions_per_pass",
        lambda size, *rest: seen.append(size) or original(size, *rest),
    )
    fit(Classifier, [sketch(tmp_path, 2)])
    size = seen[0]
    parameters = (5 * 6 + 6 + 6 * 3 + 3) * 8
    assert size.trained == parameters
    assert size.state_tensors == 1  # the momentum of SGD
    assert size.largest == 5 * 6 * 8  # the first weight
    # at least input, hidden activation and logits; at most each of them a few times
    assert (4 * 5 + 4 * 6 + 4 * 3) * 8 <= size.saved <= 3 * (4 * 5 + 4 * 6 + 4 * 3) * 8


def test_a_pass_on_the_cpu_stays_below_the_threshold_of_the_allocator():
    """Oracle: 32 MiB over the bytes of the largest tensor's coefficients."""
    size = StepSize(trained=10 * MIB, state_tensors=2, saved=20 * MIB, largest=2 * MIB)
    assert directions_per_pass(size, 2, 2, CPU) == 4
    assert directions_per_pass(size, 1, 1, CPU) == 16
    assert directions_per_pass(StepSize(1, 0, 1, 100 * MIB), 2, 2, CPU) == 1


def test_memory_is_refused_with_the_number_that_fits(monkeypatch):
    """Oracle: state (1 + 2) * 10 MiB a direction and degree, one pass of (20 + 20 + 8) MiB."""
    size = StepSize(trained=10 * MIB, state_tensors=2, saved=20 * MIB, largest=2 * MIB)
    monkeypatch.setattr(planning, "available_bytes", lambda device: 1048 * MIB)
    assert check_memory(size, {1: 15, 2: 0}, {1: 1, 2: 1}, 2, CPU) == 15 * 60 * MIB + 48 * 2 * MIB
    with pytest.raises(ConfigurationError, match=r"`directions`: 20 directions.*1.02 GiB are free: about 15 would fit"):
        check_memory(size, {1: 20, 2: 0}, {1: 1, 2: 1}, 2, CPU)


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
    monkeypatch.setattr("lightning_sketch.callbacks.sketch.directions_per_pass", lambda *_: 2)
    fit(Classifier, [sketch(tmp_path, 1, design="basis", units=[i % 5 for i in range(12)])])
    shards = list(Sketch.load(tmp_path / "sketch").shards())
    assert [len(s.indices) for s in shards] == [2, 2, 1]


def test_each_kind_of_directions_is_planned_with_its_own_pass(monkeypatch):
    """Oracle: 3 real and 2 complex directions are 7 measurements of 60 MiB, two complex ones the largest pass."""
    size = StepSize(trained=10 * MIB, state_tensors=2, saved=20 * MIB, largest=2 * MIB)
    monkeypatch.setattr(planning, "available_bytes", lambda device: 1 << 40)
    assert check_memory(size, {1: 3, 2: 2}, {1: 8, 2: 4}, 2, CPU) == 7 * 60 * MIB + 4 * 48 * 2 * MIB
