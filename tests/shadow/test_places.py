"""Whatever moves in a module is noticed, and what is copied side by side is what was copied."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_sketch.shadow import flat
from lightning_sketch.shadow.flat import Copies, known_same, known_same_and_finite, read_at_once
from lightning_sketch.shadow.places import Places


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.layers[3].weight
        self.register_buffer("center", None)
        self.count = None


def renamed(attributes: dict[str, Any], old: str, new: str) -> None:
    attributes[new] = attributes.pop(old)


MOVES: dict[str, Callable[[Model], Any]] = {
    "a buffer that was None": lambda m: setattr(m, "center", torch.zeros(2)),
    "a buffer reassigned": lambda m: setattr(m.layers[1], "running_mean", torch.ones(3)),
    "a parameter replaced": lambda m: setattr(m.layers[0], "bias", nn.Parameter(torch.ones(3))),
    "a parameter untied": lambda m: setattr(m.tied, "weight", nn.Parameter(torch.ones(3, 3))),
    "a parameter in a module without": lambda m: setattr(m.layers[2], "slope", nn.Parameter(torch.ones(1))),
    "a parameter of another name": lambda m: renamed(m.tied._parameters, "bias", "offset"),
    "a parameter moved to the next module": lambda m: renamed(m.layers[0]._parameters, "bias", "weight"),
    "a submodule": lambda m: setattr(m, "other", nn.Identity()),
    "a submodule of a leaf": lambda m: setattr(m.layers[2], "inner", nn.Identity()),
    "a submodule replaced": lambda m: m.layers.__setitem__(2, nn.Tanh()),
    "a submodule deleted": lambda m: m.layers.__delitem__(2),  # which makes a new dictionary
    "an attribute": lambda m: setattr(m.layers[2], "new", 1),
    "an attribute of another name": lambda m: renamed(m.__dict__, "count", "number"),
}


@pytest.mark.parametrize("what", MOVES)
def test_what_moves_is_found(what):
    """Oracle: torch's own walks through the module."""
    module = Model()
    before = Places(module)
    assert before.now() is before
    MOVES[what](module)
    places = before.now()
    assert places is not before
    assert places.modules == list(module.modules())
    for found, named in ((places.params, module.named_parameters()), (places.buffers, module.named_buffers())):
        assert [(name, id(t)) for name, t in found.items()] == [(name, id(t)) for name, t in named]
    assert [m.__dict__[key] for m, key in places.attributes] == places.values
    assert set(places.attributes) >= {(m, "training") for m in module.modules()}


def test_present_values_are_those_of_the_attributes():
    module = Model()
    places = Places(module)
    module.count = 3
    assert places.now() is places
    assert dict(zip(places.attributes, places.values, strict=True))[module, "count"] == 3


def test_sums_of_squares_are_those_of_each_tensor():
    """Oracle: numpy, tensor by tensor; of two dtypes, one tensor not contiguous, one empty, one too large to join."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(shape).astype(dtype)
        for name, shape, dtype in [
            ("a", (2, 3), np.float32),
            ("b", (4,), np.float64),
            ("c", (3, 5), np.float32),
            ("large", ((1 << 20) + 1,), np.float32),
            ("empty", (0, 2), np.float32),
            ("d", (), np.float64),
        ]
    }
    tensors = {name: torch.from_numpy(np.asarray(a)) for name, a in arrays.items()}
    tensors["c"] = tensors["c"].T.contiguous().T
    copies = Copies(tensors)
    assert all(torch.equal(copies.values[name], t) for name, t in tensors.items())
    assert copies.values["c"].stride() == tensors["c"].stride()
    assert all(copies.values[name].data_ptr() != t.data_ptr() for name, t in tensors.items() if t.numel())
    others = {name: 2 * t + 1 for name, t in tensors.items()}
    found = copies.squares(lambda a, b: [a - b, b], copies.join(list(others.values()))).numpy()
    expected = [[np.square(v, dtype=np.float64).sum() for v in (a + 1, a)] for a in arrays.values()]
    np.testing.assert_allclose(found.T, expected, rtol=1e-5, atol=1e-3)
    for like in (others, tensors):
        assert copies.like(list(like.values()))
        copies.overwrite(copies.join(list(like.values())))
        assert all(torch.equal(copies.values[name], t) for name, t in like.items())
    for changed in (torch.zeros(1, 3), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 2).T):
        assert not copies.like(list({**others, "a": changed}.values()))


@pytest.mark.parametrize("on_host", [True, False])
def test_numbers_are_read(on_host, monkeypatch):
    monkeypatch.setattr(flat, "_on_host", lambda t: on_host)
    tensors = [
        torch.tensor(0.1),
        torch.zeros(0, 2),
        torch.randn(2, 3).T,
        torch.randn(4).bfloat16(),
        torch.tensor([1 / 3]),
    ]
    tensors[-1] = tensors[-1].double()
    for read, t in zip(read_at_once(tensors), tensors, strict=True):
        assert read.dtype == np.float64
        np.testing.assert_array_equal(read, np.array(t.tolist()).reshape(t.shape))


def test_copies_of_copies_are_independent_and_side_by_side():
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4).double(), "c": torch.randn(3, 5).T, "d": torch.randn(())}
    copies = Copies(tensors)
    cloned = copies.clone()
    assert cloned.values["c"].stride() == tensors["c"].stride()
    for t in cloned.values.values():
        t.mul_(2)
    assert all(torch.equal(copies.values[name], t) for name, t in tensors.items())
    doubled = [2 * t for t in tensors.values()]
    assert known_same(cloned.joined, copies.join(doubled))
    assert not known_same(copies.joined, copies.join(doubled))


def test_what_is_known_to_be_the_same():
    some = [torch.tensor([0.0, 1.0]), torch.tensor([3])]
    assert known_same(some, [torch.tensor([-0.0, 1.0]), torch.tensor([3])])
    assert not known_same(some, [torch.tensor([0.0, 1.0]), torch.tensor([4])])
    assert not known_same([torch.tensor([math.nan])], [torch.tensor([math.nan])])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_known_to_be_the_same_and_finite(dtype):
    some = [torch.tensor([0.0, 1.0], dtype=dtype), torch.full((3,), torch.finfo(dtype).max, dtype=dtype)]
    assert known_same_and_finite(some, [t.clone() for t in some])
    assert not known_same_and_finite(some, [some[0], torch.zeros(3, dtype=dtype)])
    tiny = torch.tensor([torch.finfo(dtype).smallest_normal, 1.0], dtype=dtype)
    assert not known_same_and_finite(some, [tiny, some[1]])
    for number in (math.nan, math.inf, -math.inf):
        number = torch.tensor([0.0, number], dtype=dtype)
        assert not known_same_and_finite([number], [number.clone()])
