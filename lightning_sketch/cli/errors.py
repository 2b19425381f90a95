"""What a command says instead of an answer, and the exit code that goes with it."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_sketch.errors import LightningSketchError

GOOD, BAD, MISUSED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141


class CommandError(Exception):
    """A command has no answer: what is wrong, with the remedy, and the exit code."""

    def __init__(self, message: str, code: int = MISUSED) -> None:
        super().__init__(message)
        self.code = code


def one_line(text: str) -> str:
    """Join the lines of a text."""
    return " ".join(text.split())


@contextmanager
def one_line_errors(what: str, remedy: str, code: int = MISUSED) -> Iterator[None]:
    """Say in one line what the user's code raised, and where."""
    try:
        yield
    except LightningSketchError as error:
        raise CommandError(str(error), code) from error
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__}: {str(error)[:500]} ({place.filename}:{place.lineno})"
        raise CommandError(f"{what}, {found}: {remedy}", code) from error
