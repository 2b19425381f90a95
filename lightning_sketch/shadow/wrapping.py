"""Stand between the Trainer and the user's ``training_step``, and refuse Trainers that this cannot be right for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_sketch.errors import ConfigurationError

_MARK = "_lightning_sketch_wrapper"


def wrap_training_step(module: Any, around: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> Callable[..., Any]:
    """Make the Trainer call ``around(training_step, args)`` instead of ``training_step(*args)``; return the original.

    The random state is that of the step only inside this wrapper: hooks of the module and of other callbacks may draw
    before it.

    Raises:
        ConfigurationError: if another callback has done the same.
    """
    original: Callable[..., Any] = module.training_step
    if hasattr(original, _MARK):
        raise ConfigurationError(
            "`callbacks` holds more than one SketchCallback or Reweight, which all take the place of `training_step`: "
            "give each a Trainer of its own."
        )

    @functools.wraps(original)
    def training_step(*args: Any) -> Any:
        return around(original, args)

    setattr(training_step, _MARK, True)
    module.__dict__["training_step"] = training_step
    return original


def unwrap_training_step(module: Any, original: Callable[..., Any]) -> None:
    """Undo :func:`wrap_training_step`."""
    if getattr(original, "__self__", None) is module:
        module.__dict__.pop("training_step", None)
    else:  # the user had put a function of their own on the instance
        module.__dict__["training_step"] = original


def own_training_step(module: Any) -> Callable[..., Any]:
    """The user's ``training_step``, also where :func:`wrap_training_step` has taken its place."""
    step: Callable[..., Any] = module.training_step
    return step.__wrapped__ if hasattr(step, _MARK) else step  # type: ignore[attr-defined]


def arguments_of(training_step: Callable[..., Any], batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What the Trainer would call it with; ``batch_idx`` may be left out of its signature."""
    return (batch, batch_idx)[: len(inspect.signature(training_step).parameters)]


def check_trainer(trainer: Any, module: Any, who: str) -> None:
    """Refuse, all at once, what makes a re-run of the training step wrong.

    Raises:
        ConfigurationError: naming every unsupported part of the setup, and the remedy.
    """
    if any(c.__module__.partition(".")[0] == "pytorch_lightning" for c in type(trainer).__mro__):
        raise ConfigurationError(
            f"{who} is a callback of `lightning.pytorch`, but the Trainer is of the package `pytorch_lightning`, whose "
            "classes are others: write `import lightning.pytorch as pl` instead of `import pytorch_lightning as pl`."
        )
    problems = []
    if not module.automatic_optimization:
        problems.append("manual optimization (set `automatic_optimization = True`)")
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        problems.append(
            f"strategy {type(strategy).__name__}, which spreads parameters or optimizer state over processes, so that "
            "none can run the step again (use `strategy='ddp'`)"
        )
    elif not isinstance(strategy, SingleDeviceStrategy) and type(strategy) is not DDPStrategy:  # TPUs derive from it
        problems.append(f"strategy {type(strategy).__name__} (use `strategy='ddp'`, or `devices=1`)")
    elif isinstance(strategy, DDPStrategy) and (strategy._ddp_comm_hook or strategy._ddp_comm_state):
        problems.append("a DDP communication hook, which does not send the mean of the gradients (leave it out)")
    if trainer.world_size > 1 and (
        strategy._layer_sync or any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())
    ):
        problems.append(
            "SyncBatchNorm, whose statistics are of the batches of all processes (use BatchNorm with "
            "`sync_batchnorm=False`, or GroupNorm)"
        )
    if trainer.precision not in ("32-true", "64-true", "16-mixed", "bf16-mixed"):
        problems.append(f"precision {trainer.precision!r} (use '32-true', '64-true', 'bf16-mixed' or '16-mixed')")
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        problems.append("`training_step(dataloader_iter)` (take `batch` instead)")
    scripted = next((name for name, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        problems.append(f"the TorchScript module `{scripted}` (use the module that was scripted, or `torch.compile`)")
    if problems:
        raise ConfigurationError(f"{who} does not support: {'; '.join(problems)}.")


def refuse_averaging(trainer: Any, who: str) -> None:
    """Refuse callbacks that put averaged parameters in the place of the trained ones.

    Raises:
        ConfigurationError: naming them.
    """
    averaging = [c for c in trainer.callbacks if isinstance(c, (StochasticWeightAveraging, WeightAveraging))]
    if averaging:
        raise ConfigurationError(
            f"{who} follows the trained parameters and does not support {type(averaging[0]).__name__}, which replaces "
            "them by averages: remove it from `callbacks`."
        )


_PIECEWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Threshold,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip


def piecewise_linear(module: nn.Module) -> list[str]:
    """Name the submodules that have kinks, such as ``net.1 (ReLU)``; an encoder layer's activation is a function."""
    found = [f"`{name}` ({type(m).__name__})" for name, m in module.named_modules() if isinstance(m, _PIECEWISE)]
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return found + [
        f"`{name}` ({type(m).__name__} with its default ReLU)"
        for name, m in module.named_modules()
        if isinstance(m, layers) and m.activation is nn.functional.relu
    ]


def check_start(trainer: Any, who: str, remedy: str = "") -> None:
    """Refuse runs whose beginning was not seen; ``remedy`` is another one than to train from the beginning.

    Raises:
        ConfigurationError: if optimizer steps were taken before.
    """
    if trainer.global_step > 0:
        raise ConfigurationError(
            f"{who} must see training from its first step, but this run starts at step {trainer.global_step}: {remedy}"
            "train from the beginning, without `ckpt_path`, with a new Trainer."
        )


def check_optimizers(optimizers: list[Optimizer], module: Any, who: str, scaler: Any = None) -> Optimizer:
    """Return the one optimizer.

    Raises:
        ConfigurationError: if there are none or several, it is spread over processes, it evaluates the loss more than
            once a step, it does the work of the loss ``scaler``, or it holds parameters that are not the module's.
    """
    if len(optimizers) != 1:
        raise ConfigurationError(
            f"{who} supports one optimizer, but `configure_optimizers` returned {len(optimizers)}: use parameter "
            "groups of one."
        )
    if any(c.__module__.startswith("torch.distributed") for c in type(optimizers[0]).__mro__):
        raise ConfigurationError(
            f"{who} does not support {type(optimizers[0]).__name__}, which spreads its state over processes: use a "
            "plain optimizer."
        )
    if isinstance(optimizers[0], LBFGS):
        raise ConfigurationError(
            f"{who} does not support LBFGS, whose steps evaluate the loss many times: use StableAdamW or SGD."
        )
    if scaler is not None and getattr(optimizers[0], "_step_supports_amp_scaling", False):
        raise ConfigurationError(
            f"{who} with precision '16-mixed' does not support {type(optimizers[0]).__name__} with `fused=True`, which "
            "unscales gradients and skips steps inside its kernel: use `fused=False`."
        )
    held = [p for group in optimizers[0].param_groups for p in group["params"]]
    if not held:  # what Lightning puts in the place of none
        raise ConfigurationError(f"{who} needs an optimizer, but `configure_optimizers` returned none.")
    own = {id(p) for p in module.parameters()}
    for p in held:
        if id(p) not in own:
            raise ConfigurationError(
                f"{who} needs an optimizer of the module's parameters, but `configure_optimizers` gave "
                f"{type(optimizers[0]).__name__} a tensor of shape {tuple(p.shape)} that is not one: register it there."
            )
    return optimizers[0]


def count_examples(trainer: Any, units: Any) -> int:
    """Return the length of the train dataset, or of ``units`` where the dataset has none.

    Raises:
        ConfigurationError: if neither tells.
    """
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        if units is None:
            raise ConfigurationError(
                f"`units` must be given, since the train dataset (a {type(dataset).__name__}) has no length: "
                "one unit per example that `ids` can name."
            ) from None
        return len(units)
