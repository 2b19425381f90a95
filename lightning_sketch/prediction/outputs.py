"""What can be predicted by name, and how inputs and targets are found in a batch."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch.errors import ConfigurationError

Output = Callable[[Any, Any], Tensor]

# Keys under which a batch that is a mapping holds its targets, which `forward` is not given
TARGET_KEYS = ("labels", "label", "y")
PARAMETER, EMBEDDING = "parameter:", "embedding:"
# What a Module and a LightningModule inherit as `forward`: they only raise
_PLACEHOLDERS = ("_forward_unimplemented", "LightningModule.forward")
_REMEDY = "pass a callable(module, batch) -> tensor as `output`"


def logits(module: Any, batch: Any) -> Tensor:
    """Return what the module's ``forward`` gives for the inputs of a batch, or its entry ``"logits"``.

    The inputs are ``x`` of a batch ``x``, ``(x,)`` or ``(x, y)``, given as the one positional argument; or all entries
    of a mapping but those under :data:`TARGET_KEYS`, given as keywords.

    Raises:
        ConfigurationError: if the batch does not tell its inputs, or ``forward`` is not defined, takes other arguments
            or returns something else.
    """
    if getattr(module.forward, "__qualname__", "") in _PLACEHOLDERS:
        raise ConfigurationError(
            f"`output` calls `forward`, which the module does not define: define it, or {_REMEDY}."
        )
    if isinstance(batch, Mapping):
        given = {str(key): value for key, value in batch.items() if key not in TARGET_KEYS}
        _check_keywords(module, given)
        result = module(**given)
    else:
        inputs = _positional(batch)
        _check_positional(module)
        result = module(inputs)
    if isinstance(result, Mapping) and "logits" in result:
        result = result["logits"]
    if not isinstance(result, Tensor):
        raise ConfigurationError(
            f"`output` needs a `forward` that returns a tensor, or a mapping with the key 'logits', but it returned "
            f"{type(result).__name__}: {_REMEDY}."
        )
    return result


def probabilities(module: Any, batch: Any) -> Tensor:
    """Return the softmax of logits ``(B, C)``, or the sigmoid of single ones, ``(B,)`` or ``(B, 1)``.

    Raises:
        ConfigurationError: for logits of another shape, where it is not clear which dimension holds the classes.
    """
    values = _classifying(logits(module, batch), "probabilities")
    return values.sigmoid() if values.ndim == 1 or values.shape[1] == 1 else values.softmax(dim=1)


def margin(module: Any, batch: Any) -> Tensor:
    """Return ``log(p / (1 - p))`` of each example's own class, ``(B,)``.

    That is the own logit minus the logsumexp of the others (Park et al., *TRAK*, arXiv 2303.14186, section 3), and the
    logit or its negative where there is a single one.

    Raises:
        ConfigurationError: for logits or targets of another shape, or targets that are not classes.
    """
    values = _classifying(logits(module, batch), "margin")
    single = values.ndim == 1 or values.shape[1] == 1
    classes = 2 if single else values.shape[1]
    targets = targets_of(batch)
    if single and targets.shape == values.shape:
        targets = targets.reshape(len(values))
    whole = targets.long()
    if targets.shape != values.shape[:1] or bool(((whole != targets) | (whole < 0) | (whole >= classes)).any()):
        raise ConfigurationError(
            f"`output='margin'` needs targets ({len(values)},) of classes 0 to {classes - 1} but found "
            f"{targets.dtype} of shape {tuple(targets.shape)}: leave examples without a class out, or {_REMEDY}."
        )
    if single:
        return values.reshape(-1) * (2 * whole - 1)
    own = torch.nn.functional.one_hot(whole, classes).bool()
    others = values[~own].reshape(len(values), classes - 1)
    return values[own] - others.logsumexp(dim=1)


def embedding(name: str) -> Output:
    """Return the output that is what the submodule ``name`` returns during ``forward``.

    The output raises :class:`ConfigurationError` if the submodule is not called exactly once, or returns no tensor.
    """

    def output(module: Any, batch: Any) -> Tensor:
        seen: list[Any] = []
        handle = module.get_submodule(name).register_forward_hook(lambda _module, _args, result: seen.append(result))
        try:
            logits(module, batch)
        finally:
            handle.remove()
        if len(seen) != 1 or not isinstance(seen[0], Tensor):
            found = f"was called {len(seen)} times" if len(seen) != 1 else f"returned {type(seen[0]).__name__}"
            raise ConfigurationError(f"`output='{EMBEDDING}{name}'`: the submodule {found}: {_REMEDY}.")
        return seen[0]

    return output


NAMED: dict[str, Output] = {"logits": logits, "probabilities": probabilities, "margin": margin}


def named_output(name: str, module: nn.Module) -> Output:
    """Return the function of module and batch that an output's name stands for; not those of losses and parameters.

    Raises:
        ConfigurationError: an unknown name.
    """
    if name in NAMED:
        return NAMED[name]
    if name.startswith(EMBEDDING):
        submodule, known = name.removeprefix(EMBEDDING), [path for path, _ in module.named_modules() if path]
        if submodule not in known:
            raise ConfigurationError(f"`output={name!r}`: the module has no submodule {submodule!r}, but {known}.")
        return embedding(submodule)
    names = ", ".join(repr(n) for n in ("loss", *NAMED, f"{EMBEDDING}SUBMODULE", f"{PARAMETER}NAME"))
    raise ConfigurationError(f"`output` must be {names} or a callable(module, batch) -> tensor but is {name!r}.")


def targets_of(batch: Any) -> Tensor:
    """Return the targets of a batch: ``y`` of ``(x, y)``, or a mapping's one entry under :data:`TARGET_KEYS`.

    Raises:
        ConfigurationError: if there are none, or several.
    """
    found: list[Any] = []
    if isinstance(batch, Mapping):
        found = [batch[key] for key in TARGET_KEYS if key in batch]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        found = [batch[1]]
    if len(found) != 1 or not isinstance(found[0], Tensor):
        raise ConfigurationError(
            f"the batch ({_describe(batch)}) does not tell its targets: give (x, y) or a mapping with one of "
            f"{', '.join(TARGET_KEYS)}, pass `targets=callable(batch)` where it is taken, or a callable as `output`."
        )
    return found[0]


def _positional(batch: Any) -> Tensor:
    inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) in (1, 2) else batch
    if not isinstance(inputs, Tensor):
        raise ConfigurationError(
            f"`output` does not find the inputs in the batch ({_describe(batch)}): give x, (x, y) with x a tensor, or "
            f"a mapping of keywords, or {_REMEDY}."
        )
    return inputs


def _check_positional(module: Any) -> None:
    """Refuse a ``forward`` that does not take the inputs alone."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(None)
    except TypeError:
        raise ConfigurationError(
            f"`output` calls `forward` with the inputs `x` of the batch alone, but it takes {signature}: {_REMEDY}."
        ) from None


def _check_keywords(module: Any, given: Mapping[str, Any]) -> None:
    """Refuse keys of a batch that ``forward`` does not take."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
    if not required <= given.keys() <= accepted:
        raise ConfigurationError(
            f"`output` calls `forward` with the batch's keys {sorted(given)}, but it takes {sorted(accepted)}: "
            f"{_REMEDY}."
        )


def _classifying(values: Tensor, name: str) -> Tensor:
    if values.ndim not in (1, 2):
        raise ConfigurationError(
            f"`output={name!r}` needs logits (B, C), (B,) or (B, 1) but `forward` returned shape "
            f"{tuple(values.shape)}, where it is not clear which dimension holds the classes: {_REMEDY}."
        )
    return values


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with the keys {sorted(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
    return f"a {type(batch).__name__}"
