"""The experiments of the paper, in ``examples/paper``."""

import subprocess
import sys

import numpy as np
import pytest
from oracles.names import PROJECT_ROOT, names_path

sys.path.insert(0, str(PROJECT_ROOT / "examples" / "paper"))
from experiment import prepare

# Gunn's code (github.com/SamSpo1/microgpt-sketch, generate_fig2.py), % of the true change, as it rounds.
PUBLISHED_ERRORS = ["47", "24", "9.5", "2.9", "0.1", "1.2"]


@pytest.mark.slow
def test_errors_of_the_taylor_series_are_those_of_the_published_code(tmp_path):
    """Oracle: the published scalar implementation, on the same names and initial weights."""
    run = prepare(names_path().read_text(encoding="utf-8").split(), False, tmp_path)
    effect = run.effect(run.sketch(run.deleted[None], 6))
    before, after = run.retrain([0.0, 1.0])
    series = effect.delete(weights=run.deleted).by_degree.numpy()
    assert float(effect.baseline) == pytest.approx(before, rel=1e-10)
    errors = 100 * np.abs(series - after) / abs(after - before)
    rounded = [f"{e:.{len(p.partition('.')[2])}f}" for e, p in zip(errors, PUBLISHED_ERRORS, strict=True)]
    assert rounded == PUBLISHED_ERRORS


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["figure1", "figure2", "figure3"])
def test_quick_figures_are_made_without_a_file_of_names(figure, tmp_path):
    """Oracle: the figure on disk, and that no number is missing."""
    command = [
        sys.executable,
        str(PROJECT_ROOT / "examples" / "paper" / f"{figure}.py"),
        "--quick",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (tmp_path / f"{figure}.png").stat().st_size > 1000
    assert "nan" not in done.stdout
    assert "| 1 |" in done.stdout
