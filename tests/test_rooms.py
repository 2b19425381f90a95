"""The shape of the package: which room may import which, and what is public."""

import ast
from pathlib import Path

import pytest

import lightning_sketch
import lightning_sketch.influence
import lightning_sketch.jets
import lightning_sketch.metrics
import lightning_sketch.prediction
import lightning_sketch.unlearning

PACKAGE = Path(lightning_sketch.__file__).parent
# Data flows down: a module imports only from rooms above its own.
ROOMS = [
    "errors",
    "jets",
    "directions",
    "features",
    "optim",
    "shadow",
    "sketch",
    "prediction",
    "influence",
    "metrics",
    "unlearning",
    "plotting",
    "callbacks",
    "__init__",
    "cli",
    "__main__",
]
KNOW_LIGHTNING = {"shadow", "callbacks", "cli"}
ONLY_CLI = {"rich", "jsonargparse"}


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "sketch" if first.startswith("_sketch") else first


def imports(path: Path) -> list[str]:
    """Names of modules imported at the top level of a file."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_only_from_rooms_above(path):
    """Oracle: the list of rooms."""
    for name in imports(path):
        top, *rest = name.split(".")
        assert top != "lightning" or room(path) in KNOW_LIGHTNING, f"{path.name} must not know Lightning"
        assert top not in ONLY_CLI or room(path) == "cli", f"{path.name} must not know {top}"
        if top == "lightning_sketch" and rest:
            other = "sketch" if rest[0].startswith("_sketch") else rest[0]
            assert ROOMS.index(other) <= ROOMS.index(room(path)), f"{path.name} imports {name} from below"


@pytest.mark.parametrize(
    "module",
    [
        lightning_sketch,
        lightning_sketch.jets,
        lightning_sketch.prediction,
        lightning_sketch.influence,
        lightning_sketch.metrics,
        lightning_sketch.unlearning,
    ],
)
def test_public_names_exist_and_are_documented(module):
    """Oracle: ``__all__``."""
    for name in module.__all__:
        assert getattr(module, name).__doc__, f"{module.__name__}.{name} has no docstring"
