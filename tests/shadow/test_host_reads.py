"""A step of the callback waits for the device once, whatever the model, the optimizer and the number of passes."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, fit, sketch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import Sketch
from lightning_sketch.callbacks import _carrying as callback_module
from lightning_sketch.errors import FidelityError
from lightning_sketch.jets import JetTensor, registry
from lightning_sketch.optim import StableAdamW
from lightning_sketch.shadow import flat, update

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.item.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class HostReads(TorchDispatchMode):
    """Counts what would wait for a GPU, had the tensors of the run been on one.

    In a float64 run float32 numbers are the step counts of optimizers, which live on the CPU anyway.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, JetTensor) for t in types):
            with self:  # what the rule calls comes here in turn
                return JetTensor.__torch_dispatch__(func, types, args, kwargs)
        by_mask = func in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or (func in READS and args[0].dtype != torch.float32):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def note_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count what makes a Python value of a tensor without calling an operator, where the tensor is on the CPU."""

    def watch(name: str, copies: Callable[..., bool]) -> None:
        original = getattr(Tensor, name)

        def watched(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            for mode in _get_current_dispatch_mode_stack():
                if isinstance(mode, HostReads) and self.dtype == torch.float64 and copies(*args, **kwargs):
                    mode.found[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, watched)

    watch("cpu", lambda: True)
    watch("tolist", lambda: True)
    watch("to", lambda *args, **kwargs: "cpu" in [a for a in (*args, *kwargs.values()) if isinstance(a, str)])


class Block(pl.LightningModule):
    """A transformer layer by hand, so that nothing takes a fast path."""

    optimizer = staticmethod(lambda params: StableAdamW(params, lr=1e-2))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.mix = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.head = nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)
        x = x + self.mix(heads.transpose(1, 2).flatten(-2))
        return self.head(x + self.mlp(self.second(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (tokens,) = batch
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class During(pl.Callback):
    """Has a mode active during the third, fourth and fifth step."""

    def __init__(self, mode: HostReads) -> None:
        self.mode = mode

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 * trainer.accumulate_grad_batches:
            self.mode.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == 5 * trainer.accumulate_grad_batches:
            self.mode.__exit__(None, None, None)


OPTIMIZERS = {
    "StableAdamW": lambda params: StableAdamW(params, lr=1e-2),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, eps=1e-3),
}


@pytest.mark.parametrize("options", [{"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_reads_from_the_device_once(optimizer, options, tmp_path, monkeypatch):
    """Oracle: operators that read, counted in the run with the callback, less those of the run without."""
    monkeypatch.setattr(Block, "optimizer", staticmethod(OPTIMIZERS[optimizer]))
    monkeypatch.setattr(registry, "_capturing", lambda: True)  # kinks are looked for in the first calls only
    monkeypatch.setattr(flat, "_on_host", lambda t: False)  # as where the tensors are not on the CPU
    note_copies(monkeypatch)
    tokens = torch.randint(0, 7, (24, 6), generator=torch.Generator().manual_seed(0))
    found = {}
    for callbacks in ([], [sketch(tmp_path, 3, 2, design="sphere", directions_per_pass=1)]):
        mode = HostReads()
        fit(Block, [*callbacks, During(mode)], DataLoader(TensorDataset(tokens), batch_size=2), epochs=1, **options)
        found[len(callbacks)] = mode.found
    assert found[1] - found[0] == Counter({"cpu": 3}), "one for each of three steps"


class Counted(Classifier):
    """Its optimizer counts steps in tensors of its state; a parameter without dimensions has moments like a count."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]) * self.scale, batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-2, fused=True)


@pytest.mark.parametrize("offset", [0, 1])
def test_counts_on_the_device_are_read_with_everything_else(offset, tmp_path, monkeypatch):
    """Oracle: the number of the step, and the sketch of the run without; a wrong count would be noticed."""
    fit(Counted, [sketch(tmp_path / "plain", degree=2)])
    monkeypatch.setattr(update, "_is_count_on_device", lambda value: isinstance(value, Tensor) and value.ndim == 0)
    asked: list[Any] = []

    def ask_counts(*args: Any) -> Any:
        asked.append(update.ask_counts(*args))
        return Shifted(asked[-1]) if offset else asked[-1]

    class Shifted(dict):
        def __init__(self, counts: Any) -> None:
            self.counts = counts

        def get(self, place: Any, default: Any) -> Any:
            return self.counts[place] + offset if place in self.counts else default

    monkeypatch.setattr(callback_module, "ask_counts", ask_counts)
    with pytest.raises(FidelityError, match="is not what the optimizer class gives") if offset else nullcontext():
        fit(Counted, [sketch(tmp_path / "asked", degree=2)])
    for step, counts in enumerate(asked[:1] if offset else asked):
        assert {key for _, key in counts} == {"step"}
        assert len(counts) == 4
        assert set(map(float, counts.values())) == {step + 1.0}
    if not offset:
        (a,), (b,) = (Sketch.load(tmp_path / name / "sketch").shards() for name in ("plain", "asked"))
        assert all(torch.equal(a.scaled[name], b.scaled[name]) for name in a.scaled)
