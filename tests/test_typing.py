"""The package is typed for its users."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_strictly_typed_script_of_a_user_passes(tmp_path):
    """Oracle: mypy --strict, outside the checkout and without its settings."""
    script = (Path(__file__).parent / "typed_user.py").read_text()
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
