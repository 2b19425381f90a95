"""``lightning-sketch``: what the library answers, asked from a shell.

Exit codes: 0, the answer is good; 1, it is bad (a sketch is damaged or refused, a prediction failed); 2, it was asked
wrongly (a path that is not there, a class that cannot be imported, an unknown flag); 130, interrupted.
"""

import inspect
import json
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

import lightning_sketch
from lightning_sketch.cli.commands import Answer, info, merge, plan, plot, predict, rank, verify
from lightning_sketch.cli.errors import BAD, GOOD, INTERRUPTED, MISUSED, PIPE_CLOSED, CommandError, one_line
from lightning_sketch.cli.question import Question
from lightning_sketch.errors import ConfigurationError, LightningSketchError

COMMANDS: dict[str, Callable[..., Answer]] = {
    command.__name__: command for command in (info, verify, merge, predict, rank, plot, plan)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; prints the answer to stdout and an error, one line, to stderr.

    Args:
        argv: arguments; ``None`` takes those of the process.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _run(_parser().parse_args(argv))
    except ArgumentError as error:
        message, code = f"{error}; see `lightning-sketch --help`", MISUSED
    except CommandError as error:
        message, code = str(error), error.code
    except ConfigurationError as error:
        message, code = str(error), MISUSED
    except LightningSketchError as error:
        message, code = str(error), BAD
    except KeyboardInterrupt:
        message, code = "interrupted", INTERRUPTED
    except BrokenPipeError:  # whoever read us has gone, as `head` does; a later flush must not fail once more
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        message, code = f"{error}: check the path and who may read and write there", MISUSED
    _complain(message)  # here the traceback is gone, and with it what it kept on the screen
    return code


def _run(given: Any) -> int:
    values = vars(given[given.subcommand])
    as_json = values.pop("json")
    console = Console(stderr=True, quiet=as_json)
    command = COMMANDS[given.subcommand]
    with redirect_stdout(sys.stderr):  # what the user's classes print is no part of the answer
        if "question" in inspect.signature(command).parameters:
            names = inspect.signature(Question).parameters.keys() & values.keys()
            question = Question(console, **{name: values.pop(name) for name in names})
            document, shown = command(question, **values)
        else:
            document, shown = command(console, **values)
    error = document.get("error") if given.subcommand == "verify" else None
    if as_json:
        sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
    elif not error:
        table = Console(markup=False, highlight=False)
        with table.capture() as captured:
            table.print(shown)
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(captured.get().encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
    if error:
        _complain(error)
    return BAD if error else GOOD


def _parser() -> ArgumentParser:
    version = lightning_sketch.__version__
    parser = ArgumentParser(
        prog="lightning-sketch",
        description="Predict what a training run would have given without some of its data, from its sketch.",
        version=version,
        exit_on_error=False,
    )
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").partition("\n")[0]
        part = ArgumentParser(description=summary, exit_on_error=False)
        as_written: dict[str, Any] = {"as_group": False, "as_positional": True}
        if "question" in inspect.signature(command).parameters:
            part.add_class_arguments(Question, skip={"console"}, **as_written)
        part.add_function_arguments(command, skip={"console", "question", "parts", "per_example"}, **as_written)
        if command is merge:
            part.add_argument("parts", type=Path, nargs="+", help="directories of two or more sketches of one run.")
        if command is predict:
            part.add_argument("--per_example", action="store_true", help="with --json, every entry of the output too.")
        part.add_argument("--json", action="store_true", help="print one JSON document.")
        commands.add_subcommand(name, part, help=summary)
    return parser


def _complain(message: str) -> None:
    with suppress(BrokenPipeError):
        print(f"lightning-sketch: {one_line(message)}", file=sys.stderr)
