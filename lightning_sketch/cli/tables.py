"""Answers as JSON has them, and as cells of tables."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_sketch.prediction import Plan, Prediction, RankedUnits

LEVEL = 0.95  # of intervals


def plan_document(each: Plan) -> dict[str, Any]:
    """One row of a plan."""
    fields = ("design", "directions", "degree", "expected_error", "cost", "meets_target")
    return {name: getattr(each, name) for name in fields}


def prediction_document(p: Prediction) -> dict[str, Any]:
    """A prediction, its arrays as nested lists."""
    fields = ("baseline", "value", "change", "stderr", "truncation")
    numbers = {name: _plain(getattr(p, name)) for name in fields}
    return {**numbers, "interval": [_plain(bound) for bound in p.interval(LEVEL)], "reliable": bool(p.reliable)}


def ranked_documents(part: RankedUnits, entry: tuple[int, ...]) -> list[dict[str, Any]]:
    """One end of the ranking of one entry of the output."""
    fields = ("units", "change", "stderr", "truncation")
    columns = [_plain(getattr(part, name)[(slice(None), *entry)]) for name in fields]
    return [dict(zip(("unit", *fields[1:]), row, strict=True)) for row in zip(*columns, strict=True)]


def _plain(values: Tensor) -> Any:
    """Numbers as JSON has them, in which there is no infinity."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(v) for v in value]
        return value if math.isfinite(value) else None

    return finite(values.tolist())


def prediction_cells(p: Prediction, index: Any) -> list[str]:
    """Before, after, change and interval of one entry of the output."""
    before, after, change, stderr, truncation, low, high = (
        float(t[index]) for t in (p.baseline, p.value, p.change, p.stderr, p.truncation, *p.interval(LEVEL))
    )
    return [f"{before:.4g}", f"{after:.4g}", _change(change, stderr, truncation), f"{low:.4g} to {high:.4g}"]


def ranked_cells(row: dict[str, Any]) -> list[str]:
    """A unit and what its deletion changes."""
    return [str(row["unit"]), _change(row["change"], row["stderr"], row["truncation"])]


def _change(change: float, stderr: float | None, truncation: float | None) -> str:
    """A change and its standard error, the orders left out included."""
    error = math.inf if stderr is None or truncation is None else math.hypot(stderr, truncation)
    return f"{change:+.4g} ± {error:.2g}"


def entry_label(index: Sequence[Any]) -> str:
    """The place of an entry in the output."""
    return ", ".join(str(int(i)) for i in index)


def listed(noun: str, units: list[int]) -> str:
    """``units 3, 17``, shortened where there are many."""
    shown = ", ".join(map(str, units[:8]))
    return f"{noun}{'s' * (len(units) > 1)} {shown}" + (f" and {len(units) - 8} more" if len(units) > 8 else "")
