"""PyTorch's own databases of operators and modules, run on jets and judged by the oracle: right, wrong or refused."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_sketch.errors import LightningSketchError
from lightning_sketch.jets import JetTensor

from .oracle import Curve, Function, InconclusiveError, difference, make_curve


class Verdict(NamedTuple):
    """One of ``wrong, inconclusive, refused, right, skipped`` (worst first), and why."""

    kind: str
    why: str = ""


KINDS = ("wrong", "inconclusive", "refused", "right", "skipped")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    return min(verdicts, key=lambda v: KINDS.index(v.kind), default=Verdict("skipped", "no samples"))


def report(title: str, verdicts: dict[str, Verdict]) -> str:
    """Counts, and the names of all that is not right."""
    counts = Counter(v.kind for v in verdicts.values())
    lines = [f"{title}: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)]
    lines += [f"  {v.kind}: {name} ({v.why})" for name, v in verdicts.items() if v.kind != "right"]
    return "\n".join(lines)


def judge(function: Function, curves: list[Curve], tolerance: float = 1e-6) -> Verdict:
    """Classify; where a sample lies on a kink the points are moved a little, and the curves with them."""
    try:
        plain = function([c.point.clone() for c in curves])
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return Verdict("skipped", f"plain torch raises: {str(error)[:60]}")
    if any(y.is_complex() for y in plain):
        return Verdict("skipped", "complex")
    generator = torch.Generator().manual_seed(1)
    verdict = Verdict("skipped")
    for attempt in range(8):
        try:
            message = difference(function, curves, tolerance)
            return Verdict("wrong", message) if message else Verdict("right")
        except LightningSketchError as error:
            return Verdict("refused", str(error).split("`")[1] if "`" in str(error) else str(error))
        except InconclusiveError as error:
            verdict = Verdict("inconclusive", str(error))
        except Exception as error:
            if attempt:  # the moved point may be invalid
                return verdict
            return Verdict("wrong", f"raw {type(error).__name__}: {str(error)[:150]}")
        curves = [Curve(_moved(c.point, generator), c.coefficients) for c in curves]
    return verdict


def _moved(point: Tensor, generator: torch.Generator) -> Tensor:
    """Slightly nearer to zero, which keeps probabilities, cosines and the like in their domains, and not at zero."""
    return 0.97 * point + 0.02 * torch.rand(point.shape, generator=generator, dtype=point.dtype)


def spread(samples: list[Any], count: int) -> list[Any]:
    """``count`` of the samples, evenly."""
    n = len(samples)
    return [samples[i] for i in sorted({round(j * (n - 1) / max(count - 1, 1)) for j in range(count)})] if n else []


def judge_operator(info: Any, degree: int, count: int = 4, backward: bool = False) -> Verdict:
    """Judge some samples of an entry of ``op_db``, or those and their gradients."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(itertools.islice(info.sample_inputs("cpu", torch.float64, requires_grad=backward), 40))
        # among millions of entries some are nearer to a kink than the oracle sees
        largest = 5_000 if backward else 50_000
        samples = [s for s in samples if _size(s) <= largest] or samples
        return worst(_judge_sample(info.op, s, degree, backward) for s in spread(samples, count))


TOLERANCES = ("atol", "rtol")  # tensors, but no differentiable arguments


def _size(sample: Any) -> int:
    return sum(
        x.numel() for x in pytree.tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(x, Tensor)
    )


def _floating(leaves: list[Any]) -> list[int]:
    return [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dtype == torch.float64]


def _judge_sample(op: Callable[..., Any], sample: Any, degree: int, backward: bool) -> Verdict:
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    varying = [i for i in _floating(leaves) if not any(leaves[i] is sample.kwargs.get(name) for name in TOLERANCES)]
    if not varying or any(isinstance(x, Tensor) and (x.is_complex() or x.layout != torch.strided) for x in leaves):
        return Verdict("skipped", "no real dense input")
    generator = torch.Generator().manual_seed(0)
    curves = [make_curve(leaves[i].detach(), degree, 1, 1, generator) for i in varying]
    differentiable = [leaves[i].requires_grad for i in varying]

    def function(xs: list[Tensor]) -> list[Tensor]:
        new = list(leaves)
        for i, x in zip(varying, xs, strict=True):
            new[i] = x
        first, args, kwargs = pytree.tree_unflatten(new, spec)
        torch.manual_seed(0)
        return [in_reals(y) for y in pytree.tree_leaves(op(first, *args, **kwargs)) if isinstance(y, Tensor)]

    if backward:
        return judge(with_gradients(function, differentiable, []), curves, 1e-4)
    return judge(function, curves)


def in_reals(y: Tensor) -> Tensor:
    """A complex tensor as its parts, which is what the oracle compares."""
    return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y


def with_gradients(
    run: Callable[[list[Tensor]], list[Tensor]], differentiable: list[bool], written: list[int]
) -> Function:
    """``run`` together with the gradients of a quadratic function of its outputs, and the inputs it writes into."""

    def function(xs: list[Tensor]) -> list[Tensor]:
        xs = [x.detach().clone().requires_grad_(d) for x, d in zip(xs, differentiable, strict=True)]
        torch.manual_seed(0)
        outputs = run(xs)
        generator = torch.Generator().manual_seed(1)
        loss: Any = 0.0
        for y in outputs:
            if y.requires_grad:
                cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
                loss = loss + (y * cotangent).sum() + 0.1 * (y * y).sum()
        wanted = [x for x in xs if x.requires_grad]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True) if isinstance(loss, Tensor) else ()
        return [*outputs, *(g for g in grads if g is not None), *(xs[i] for i in written)]

    return function


def module_case(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Function, list[Tensor]]:
    """Forward and backward of a module as a function of its parameters, floating buffers and floating inputs."""
    parameters = dict(module.named_parameters())
    buffers = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
    others = {name: b for name, b in module.named_buffers() if not b.is_floating_point()}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    varying = _floating(leaves)
    names = [*parameters, *buffers]
    points = [p.detach().clone() for p in (*parameters.values(), *buffers.values(), *(leaves[i] for i in varying))]
    differentiable = [p.requires_grad for p in parameters.values()] + [False] * len(buffers)
    differentiable += [leaves[i].requires_grad for i in varying]

    def run(xs: list[Tensor]) -> list[Tensor]:
        new = list(leaves)
        for i, x in zip(varying, xs[len(names) :], strict=True):
            new[i] = x
        state = dict(zip(names, xs[: len(names)], strict=True)) | {n: b.clone() for n, b in others.items()}
        a, k = pytree.tree_unflatten(new, spec)
        result = torch.func.functional_call(module, state, a, k)
        return [y for y in pytree.tree_leaves(result) if isinstance(y, Tensor)]

    written = list(range(len(parameters), len(names)))
    return with_gradients(run, differentiable, written), points


def judge_module(info: Any, training: bool, degree: int, count: int = 4) -> Verdict:
    """Judge some samples of an entry of ``module_db``, forward and backward."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
        )
        usable = [s for s in samples if s.forward_input is not None]
        return worst(_judge_module_sample(info, s, training, degree) for s in spread(usable, count))


def _judge_module_sample(info: Any, sample: Any, training: bool, degree: int) -> Verdict:
    args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
    module = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs).double()
    module.train(training)
    if any(isinstance(p, torch.nn.parameter.UninitializedTensorMixin) for p in _state(module)):
        module(*args, **kwargs)
    if any(isinstance(x, Tensor) and x.is_complex() for x in pytree.tree_leaves((args, kwargs))):
        return Verdict("skipped", "complex")
    function, points = module_case(module, args, kwargs)
    generator = torch.Generator().manual_seed(0)
    return judge(function, [make_curve(p, degree, 1, 1, generator) for p in points], 1e-4)


def _state(module: torch.nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def run_on_meta(function: Callable[..., Any], leaves: list[Any], spec: Any, varies: bool) -> list[Tensor]:
    """Outputs and gradients of ``function`` on tensors without data, which can neither be read back nor mixed."""

    def on_meta(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        y = torch.empty_like(x, device="meta", requires_grad=x.requires_grad)
        if not varies or x.dtype != torch.float64:
            return y
        return JetTensor(y.detach(), y.detach().new_empty(2, 2, 1, *y.shape), requires_grad=x.requires_grad)

    inputs = [on_meta(x) for x in leaves]
    result = pytree.tree_leaves(function(*pytree.tree_unflatten(inputs, spec)))
    outputs = [in_reals(y) for y in result if isinstance(y, Tensor)]
    losses = [(y * y).sum() for y in outputs if y.requires_grad]
    if losses:
        wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        grads = torch.autograd.grad(sum(losses), wanted, allow_unused=True)
        outputs += [g for g in grads if g is not None]
    return outputs


def judge_on_meta(function: Callable[..., Any], arguments: Any) -> Verdict:
    """Whether the rules read nothing back, and make every tensor where its operands are."""
    leaves, spec = pytree.tree_flatten(arguments)
    if any(isinstance(x, Tensor) and (x.is_complex() or x.layout != torch.strided) for x in leaves):
        return Verdict("skipped", "complex or sparse")
    try:
        plain = run_on_meta(function, leaves, spec, varies=False)
    except Exception as error:
        return Verdict("skipped", f"plain torch: {error}")
    if any(y.device.type != "meta" for y in plain):
        return Verdict("skipped", "plain torch: another device")
    try:
        outputs = run_on_meta(function, leaves, spec, varies=True)
    except LightningSketchError as error:
        return Verdict("refused", str(error))
    except Exception as error:
        return Verdict("wrong", f"{type(error).__name__}: {str(error)[:150]}")
    for y in outputs:
        parts = [y.detach().primal, y.detach().coefficients] if isinstance(y, JetTensor) else [y]
        if any(x.device.type != "meta" for x in parts):
            return Verdict("wrong", "a tensor on another device")
    return Verdict("right")


def operators_on_meta(info: Any, count: int) -> Verdict:
    """Judge some samples of an entry of ``op_db``."""
    torch.manual_seed(0)
    samples = list(itertools.islice(info.sample_inputs("cpu", torch.float64, requires_grad=True), 12))
    return worst(
        judge_on_meta(lambda x, a, k: info.op(x, *a, **k), (s.input, tuple(s.args), s.kwargs))
        for s in spread(samples, count)
    )


def modules_on_meta(info: Any, training: bool, count: int) -> Verdict:
    """Judge some samples of an entry of ``module_db``."""
    torch.manual_seed(0)
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
    verdicts = []
    for s in spread([s for s in samples if s.forward_input is not None], count):
        module = info.module_cls(*s.constructor_input.args, **s.constructor_input.kwargs).double().train(training)
        if not any(isinstance(p, torch.nn.parameter.UninitializedTensorMixin) for p in _state(module)):
            state = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
            call = functools.partial(torch.func.functional_call, module)
            verdicts.append(judge_on_meta(call, (state, s.forward_input.args, s.forward_input.kwargs)))
    return worst(verdicts)
