"""Every error that this package raises on purpose; all derive from :class:`LightningSketchError`."""


class LightningSketchError(Exception):
    """Base of every error that ``lightning_sketch`` raises on purpose."""


class ConfigurationError(LightningSketchError, ValueError):
    """An argument, or the user's training setup, cannot be right; the message names it and the remedy."""


class UnsupportedOperatorError(LightningSketchError, NotImplementedError):
    """An operator of the user's model has no Taylor rule; the message names it, the module, and how to add a rule."""


class FidelityError(LightningSketchError, RuntimeError):
    """The tracked run is not the user's run (different loss, gradient, update, or a value that is not finite)."""


class InstabilityError(FidelityError):
    """The loss or the Taylor coefficients are not finite any more: a sketch cannot go on from there."""


class MemoryShortageError(LightningSketchError, MemoryError):
    """The coefficients do not fit into the device's memory any more: a sketch cannot go on from there."""


class SketchError(LightningSketchError, RuntimeError):
    """A sketch on disk is missing, torn, altered, of another format version, or does not fit the module."""


def check_count(name: str, value: object) -> None:
    """Refuse what is not a positive integer.

    Raises:
        ConfigurationError: naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"`{name}` is {value!r}: give a positive integer.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is none of some words.

    Raises:
        ConfigurationError: naming them.
    """
    if value not in choices:
        raise ConfigurationError(f"`{name}` is {value!r}: give one of {', '.join(map(repr, choices))}.")
