"""Where the file of names lies that microgpt is trained on."""

import os
import random
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def names_path() -> Path:
    """Return ``LIGHTNING_SKETCH_NAMES`` or ``../shared/names.txt``; skip the test where neither is a file."""
    path = Path(os.environ.get("LIGHTNING_SKETCH_NAMES") or PROJECT_ROOT.parent / "shared" / "names.txt")
    if not path.is_file():
        pytest.skip(f"no names file at {path}: set LIGHTNING_SKETCH_NAMES to a text file of names, one a line")
    return path


def training_names(limit: int) -> list[str]:
    """Return the first ``limit`` names, shuffled with ``random.Random(42)``; skip the test without the file."""
    names = names_path().read_text(encoding="utf-8").split()[:limit]
    random.Random(42).shuffle(names)
    return names
