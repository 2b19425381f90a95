"""The commands: each returns a document for programs and a table for people."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table

import lightning_sketch
from lightning_sketch import plotting
from lightning_sketch.cli.errors import CommandError, one_line
from lightning_sketch.cli.question import Question, open_sketch
from lightning_sketch.cli.tables import (
    LEVEL,
    entry_label,
    listed,
    plan_document,
    prediction_cells,
    prediction_document,
    ranked_cells,
    ranked_documents,
)
from lightning_sketch.errors import SketchError
from lightning_sketch.prediction import Effect
from lightning_sketch.prediction.stability import StabilityProfile, profile_of_sizes, stability_profile
from lightning_sketch.sketch import Sketch

SHOWN = 10  # examples in a table

Answer = tuple[dict[str, Any], RenderableType]


def info(console: Console, dirpath: Path) -> Answer:
    """Say what a sketch holds, without reading its tensors.

    Args:
        console: where progress is shown.
        dirpath: directory of the sketch.
    """
    return _described(open_sketch(dirpath))


def verify(console: Console, dirpath: Path) -> Answer:
    """Read every file of a sketch and compare it with its recorded SHA-256.

    Args:
        console: where progress is shown.
        dirpath: directory of the sketch.
    """
    document: dict[str, Any] = {"dirpath": str(dirpath), "intact": True, "error": None}
    try:
        with console.status("hashing"):
            sketch = open_sketch(dirpath)
            sketch.verify()
    except SketchError as error:
        return {**document, "intact": False, "error": one_line(str(error))}, ""
    return document, f"{dirpath} is intact: {len(sketch.metadata['files'])} files, {sketch.num_bytes:,} bytes."


def merge(console: Console, out: Path, parts: Sequence[Path]) -> Answer:
    """Join sketches of one run along different directions.

    Args:
        console: where progress is shown.
        out: directory of the result, which must not hold a sketch.
        parts: directories of two or more sketches, which are left as they are.
    """
    if (out / "sketch.json").exists():
        raise CommandError(f"`{out}`, the directory of the result, holds a sketch: give a new directory first.")
    sketches = [open_sketch(part) for part in parts]
    with console.status("copying"):
        return _described(Sketch.merge(sketches, out))


def predict(question: Question, *, delete: str, per_example: bool = False) -> Answer:
    """Predict an output of the model had units not been trained on.

    Args:
        question: what is predicted.
        delete: units to delete: `3,17`, or `@file` that lists them.
        per_example: give the prediction of every entry of the output to programs, too.
    """
    units = question.units(delete)
    effect = question.effect()
    mean, p = effect.reduce().delete(units=units), effect.delete(units=units)
    document = {
        **question.about(),
        "delete": units,
        "shape": list(p.change.shape),
        "mean": prediction_document(mean),
        "per_example": prediction_document(p) if per_example else None,
    }
    table = Table("example", "before", "after", "change", f"{LEVEL:.0%} interval")
    table.title = f"{question.output} without {listed('unit', units)}"
    entries = np.argsort(-p.change.abs().numpy().reshape(-1), kind="stable")[:SHOWN]
    chosen = [np.unravel_index(entry, p.change.shape) for entry in entries] if p.change.ndim else []
    if chosen:
        table.add_row(f"mean of {p.change.numel()}", *prediction_cells(mean, ()), end_section=True)
    for index in chosen or [()]:
        table.add_row(entry_label(index), *prediction_cells(p, index))
    verdict = "reliable"
    if not mean.reliable:
        remedy = "retrain" if effect.degree > 1 else "sketch at degree 2 or more, or retrain"
        verdict = f"not reliable (too large a deletion, too low a degree or too few directions): {remedy}"
    note = f"± is one standard error, the orders left out included. The prediction of the mean is {verdict}."
    return document, Group(table, note)


def rank(question: Question, *, k: int = 10, of: str = "mean") -> Answer:
    """Find the units whose deletion alone raises or lowers an output most.

    Args:
        question: what is predicted.
        k: how many units of either kind; all, if there are fewer.
        of: mean of the output, each for a ranking of every entry of the output, or the number of one example.
    """
    if k < 1:
        raise CommandError(f"`--k` is {k}: give how many units, at least 1.")
    if of not in ("mean", "each") and not of.isdecimal():
        raise CommandError(f"`--of` is {of!r}: give mean, each, or the number of an example.")
    effect = question.effect()
    k = min(k, effect.num_units)
    ranking = _of(effect, of).rank(k, "each" if of == "each" else "mean")
    entries = list(np.ndindex(*ranking.raising.units.shape[1:]))
    rankings: list[dict[str, Any]] = [
        {
            "entry": list(entry) if of == "each" else None,
            "raising": ranked_documents(ranking.raising, entry),
            "lowering": ranked_documents(ranking.lowering, entry),
        }
        for entry in entries
    ]
    if of == "each":
        table = Table("example", "raised most by deleting", "lowered most by deleting", title=question.output)
        for found in rankings:
            ends = (", ".join(str(row["unit"]) for row in found[end]) for end in ("raising", "lowering"))
            table.add_row(entry_label(found["entry"]), *ends)
    else:
        table = Table("unit", "highest change", "unit", "lowest change")
        table.title = f"{question.output} ({of if of == 'mean' else f'example {of}'}) when a unit is deleted"
        for rows in zip(rankings[0]["raising"], rankings[0]["lowering"], strict=True):
            table.add_row(*(cell for row in rows for cell in ranked_cells(row)))
    return {**question.about(), "k": k, "of": of, "rankings": rankings}, table


def plot(
    question: Question,
    *,
    out: Path,
    delete: str | None = None,
    kind: Literal["changes", "ray", "ranking", "profile"] | None = None,
) -> Answer:
    """Draw a figure of a sketch or of a prediction; needs matplotlib.

    Args:
        question: what is predicted.
        out: file that is written, .png, .pdf or .svg.
        delete: units to delete, for changes and ray: `3,17`, or `@file` that lists them.
        kind: with `--delete`, changes of all examples (the default) or ray, the mean output while the units lose their
            weight; without, profile (the default), the sizes of the derivatives by order, of the output or, without
            `--module`, of the parameters; or ranking of units.
    """
    if not out.parent.is_dir():
        raise CommandError(f"`--out {out}`: the directory `{out.parent}` is not there, make it first.")
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise CommandError(f"`--out {out}` is of no known type: give a file that ends in .png, .pdf or .svg.")
    kind = kind or ("profile" if delete is None else "changes")
    if (delete is not None) is not (kind in ("changes", "ray")):
        raise CommandError(f"`--kind {kind}`: give `--delete` for changes and ray, and only there.")
    units = [] if delete is None else question.units(delete)
    if kind == "profile":
        figure, _ = plotting.plot_stability_profile(_profile(question))
    elif kind == "ranking":
        figure, _ = question.effect().rank(min(10, question.sketch.num_units)).plot()
    elif kind == "ray":
        figure, _ = question.effect().plot_ray(units)
    else:
        figure, _ = question.effect().delete(units=units).plot()
    figure.savefig(out)
    return {**question.about(), "kind": kind, "out": str(out)}, f"{kind} is drawn in {out}"


def plan(
    console: Console,
    n_units: int,
    *,
    error: float = 0.1,
    failure_probability: float | None = None,
    deletion_size: int = 1,
) -> Answer:
    """Say how many directions of which design a sketch needs, and what it costs.

    Args:
        console: where progress is shown.
        n_units: number of units.
        error: relative error wanted of a predicted change, between 0 and 1.
        failure_probability: with which random directions may miss it.
        deletion_size: units per deletion.
    """
    best = lightning_sketch.plan(
        n_units, error=error, failure_probability=failure_probability, deletion_size=deletion_size
    )
    table = Table("design", "directions", "degree", "plain steps per step", "expected error")
    table.title = f"Plans for a relative error of {error:.1%}, cheapest first"
    for column in table.columns[1:]:
        column.justify = "right"
    for each in best.alternatives:
        style = "bold" if each.design == best.design else ""
        name = f"{each.design} *" if style else each.design
        numbers = (f"{each.directions:,}", f"{each.degree}", f"{each.cost:,.0f}", f"{each.expected_error:.1%}")
        table.add_row(name, *numbers, style=style)
    met = "meets it at the least cost" if best.meets_target else "comes nearest; none meets it"
    asked = {"n_units": n_units, "failure_probability": failure_probability, "deletion_size": deletion_size}
    found = {"best": plan_document(best), "alternatives": [plan_document(each) for each in best.alternatives]}
    return {**asked, "error": error, **found}, Group(table, f"* {met}.")


def _of(effect: Effect, of: str) -> Effect:
    """The effect on one example, the mean of its entries; or the effect itself."""
    if not of.isdecimal():
        return effect
    if not effect.baseline.ndim or int(of) >= len(effect.baseline):
        raise CommandError(f"`--of` is {of}: the output has the shape {tuple(effect.baseline.shape)}.")
    weights = torch.zeros_like(effect.baseline)
    weights[int(of)] = 1 / max(1, weights[int(of)].numel())
    return effect.reduce(weights)


def _profile(question: Question) -> StabilityProfile:
    """Of the output, or without a module of all parameters together."""
    if question.module is not None:
        return stability_profile(question.effect().coefficients, question.sketch.directions)
    sketch = question.sketch
    sizes = np.full((sketch.degree, sketch.num_directions), -np.inf)
    orders = np.arange(1, sketch.degree + 1)[:, None]
    for shard in sketch.shards():
        for block in shard.scaled.values():
            norms = block.double().movedim(2, 1).flatten(2).norm(dim=2).log2().numpy() - orders * shard.exponents
            sizes[:, shard.indices] = np.logaddexp2(2 * sizes[:, shard.indices], 2 * norms) / 2
    return profile_of_sizes(sizes, sketch.directions)


def _described(sketch: Sketch) -> Answer:
    metadata = sketch.metadata
    tensors = metadata["primal"]["tensors"]
    document = {
        "dirpath": str(sketch.dirpath),
        "num_units": sketch.num_units,
        "num_examples": sketch.num_examples,
        "num_directions": sketch.num_directions,
        "design": metadata["directions"]["recipe"]["design"],
        "degree": sketch.degree,
        "dtype": str(sketch.dtype).removeprefix("torch."),
        "steps": sketch.steps,
        "optimizer": sketch.optimizer,
        "loss": sketch.loss,
        "normalization": sketch.normalization,
        "num_tensors": len(tensors),
        "num_entries": sum(math.prod(tensor["shape"]) for tensor in tensors.values()),
        "num_bytes": sketch.num_bytes,
        "format_version": metadata["format_version"],
        "versions": metadata["versions"],
    }
    table = Table(show_header=False)
    for name, value in document.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(name, f"{text:,}" if isinstance(text, int) else str(text))
    return document, table
