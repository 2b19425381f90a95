"""Handle deletion requests: predict what a deletion costs, decide, unlearn or retrain, and leave a record.

    python examples/deletion_request.py                        shows it all: one training, three requests
    python examples/deletion_request.py train                  trains once, with a sketch
    python examples/deletion_request.py request 17 23          handles a request of users 17 and 23

Takes about half a minute on two cores. Everything goes to ``--out DIR`` (``deletion_request_output`` by default): the
sketch, one report (JSON and PNG) for each request, and the log ``requests.jsonl``, to which lines are only appended.

The sketch is of the first training, so what is predicted, and unlearned, is always the deletion of all users of all
requests so far.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from digits import BATCH, EPOCHS, TRAIN, DigitClassifier
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_sketch import DeletionPredictor, Reweight, Sketch, SketchCallback
from lightning_sketch.errors import LightningSketchError
from lightning_sketch.unlearning import AuditReport, SketchStep, audit

matplotlib.use("Agg")

# The business decides these: what is too little to act on, and how uncertain a prediction may be to act on it.
NEGLIGIBLE_LOSS = 0.02  # nats
NEGLIGIBLE_ACCURACY = 0.01  # 1 %
LARGEST_ERROR = 0.01  # nats, of the predicted mean loss
EXAMPLES = [["17"], ["23", "17"], ["88"]]  # what is shown without a command


class DigitsOfUsers(pl.LightningDataModule):
    """The digits, as uploaded by 40 users.

    Attributes:
        users: id of the user of every training image, strings ``(1437,)``: those of a database, in no order.
        ids: all ids.
        units: unit of every training image, ``(1437,)``: the place of its user in ``ids``.
    """

    def __init__(self) -> None:
        super().__init__()
        digits = load_digits()
        generator = np.random.default_rng(0)
        order = generator.permutation(len(digits.target))
        images, labels = torch.as_tensor(digits.data[order] / 16), torch.as_tensor(digits.target[order])
        self.train, self.test = TensorDataset(images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])
        known = ["17", "23", "88", *(str(i) for i in generator.permutation(np.arange(100, 1000))[:37])]
        self.users = np.array(known)[generator.integers(0, len(known), TRAIN)]
        hand = labels[:TRAIN].numpy()
        self.users[(hand == 5) & (generator.random(TRAIN) < 0.3)] = "23"  # whose special interest are fives
        self.users[(hand == 8) & (generator.random(TRAIN) < 0.95)] = "88"  # who drew nearly all eights
        self.ids, self.units = np.unique(self.users, return_inverse=True)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=BATCH, shuffle=True, drop_last=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.test), batch_size=256)

    def units_of(self, users: Iterable[str]) -> list[int]:
        """Return the units of some users."""
        return [int(np.flatnonzero(self.ids == user)[0]) for user in users]

    def images_of(self, users: Iterable[str], *, others: bool = False) -> DataLoader:
        """Return the training images of some users, or those of all others."""
        rows = np.flatnonzero(np.isin(self.users, list(users)) != others)
        return DataLoader(Subset(self.train, rows.tolist()), batch_size=256)


def fail(message: str) -> NoReturn:
    """End with one line on standard error, as a wrong call of the command does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def fit(data: DigitsOfUsers, callback: pl.Callback, progress: bool = False) -> DigitClassifier:
    """Train from the same seed, with one callback more."""
    pl.seed_everything(0, verbose=False)
    model = DigitClassifier()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        precision="64-true",
        accelerator="cpu",
        callbacks=[callback],
        enable_progress_bar=progress,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    return model


def train(out: Path, console: Console) -> None:
    """Train once, with a sketch."""
    if (out / "sketch").exists():
        fail(f"`{out}` holds a sketch already, which its log of requests is about: give another --out.")
    data = DigitsOfUsers()
    fit(data, SketchCallback(out / "sketch", design="basis+common", degree=3, units=data.units), progress=True)
    console.print(f"Trained on {TRAIN} images of {len(data.ids)} users; the sketch is in {out / 'sketch'}.")


def read_log(out: Path) -> list[dict[str, Any]]:
    """Return the entries of all requests so far."""
    path = out / "requests.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except json.JSONDecodeError as error:
        fail(f"`{path}` has a line that is not whole ({error}): its report is beside it; mend or remove the line.")


def append_to_log(out: Path, entry: dict[str, Any]) -> None:
    """Append one entry, and see it written."""
    with (out / "requests.jsonl").open("a") as log:
        log.write(json.dumps(entry) + "\n")
        log.flush()
        os.fsync(log.fileno())


def predict(sketch: Sketch, model: DigitClassifier, data: DigitsOfUsers, units: list[int]) -> dict[str, Any]:
    """Return the predicted effect of a deletion on accuracy and mean loss of the test images."""
    test = data.test_dataloader()
    metrics = MetricCollection({"accuracy": MulticlassAccuracy(10, average="micro")})
    found = DeletionPredictor(sketch, model, output="logits").evaluate(test, metrics, delete=units)
    losses = DeletionPredictor(sketch, model).prepare(test)
    loss = losses.reduce().delete(units)

    def effect(before: Any, after: Any, stderr: Any, truncation: Any) -> dict[str, float]:
        """Numbers of one metric; the error is one standard error, the orders left out included."""
        error = torch.hypot(stderr, truncation)
        return {"before": float(before), "after": float(after), "change": float(after - before), "error": float(error)}

    parts = (found.baseline, found.counterfactual, found.stderr, found.truncation)
    return {
        "accuracy": effect(*(part["accuracy"] for part in parts)),
        "mean_loss": effect(loss.baseline, loss.value, loss.stderr, loss.truncation),
        "reliable": bool(loss.reliable),
    }


def decide(prediction: dict[str, Any]) -> tuple[str, str]:
    """Return ``"negligible"``, ``"unlearn"`` or ``"retrain"``, and why."""
    loss, accuracy = prediction["mean_loss"], prediction["accuracy"]
    if not prediction["reliable"]:
        return "retrain", "the prediction is not reliable for so large a deletion"
    if loss["error"] > LARGEST_ERROR:
        return "retrain", f"the predicted mean loss is uncertain by {loss['error']:.3f} nats, {LARGEST_ERROR} allowed"
    largest = {name: abs(of["change"]) + 2 * of["error"] for name, of in (("loss", loss), ("accuracy", accuracy))}
    if largest["loss"] < NEGLIGIBLE_LOSS and largest["accuracy"] < NEGLIGIBLE_ACCURACY:
        return "negligible", f"mean loss changes by less than {NEGLIGIBLE_LOSS} nats, accuracy by less than 1 %"
    return "unlearn", f"mean loss changes by {loss['change']:+.4f} nats and accuracy by {accuracy['change']:+.2%}"


def carry_out(
    decision: str, sketch: Sketch, model: DigitClassifier, data: DigitsOfUsers, users: list[str]
) -> tuple[DigitClassifier, AuditReport]:
    """Unlearn, or retrain without them; return the new model and its audit."""
    units, forget, retain = data.units_of(users), data.images_of(users), data.images_of(users, others=True)
    sets = {"forget": forget, "retain": retain, "test": data.test_dataloader()}
    if decision == "retrain":
        retrained = fit(data, Reweight(units=data.units, delete=units))
        return retrained, audit(model, retrained, **sets, reference=retrained)
    unlearned = SketchStep(sketch, units).unlearn(model, forget, retain, progress=False).module
    predictor = DeletionPredictor(sketch, model, output="logits")
    return unlearned, audit(model, unlearned, **sets, predictor=predictor, delete=units)


def draw(path: Path, title: str, prediction: dict[str, Any], found: AuditReport | None) -> None:
    """Draw the predicted effect beside what counts as negligible, and the audit if there is one."""
    figure, panels = plt.subplots(1, 3 if found else 2, figsize=(12 if found else 8, 4), layout="constrained")
    limits = {"mean_loss": NEGLIGIBLE_LOSS, "accuracy": NEGLIGIBLE_ACCURACY}
    for panel, (name, limit) in zip(panels, limits.items(), strict=False):
        effect = prediction[name]
        panel.axhspan(effect["before"] - limit, effect["before"] + limit, color="0.9", label="negligible")
        panel.axhline(effect["before"], color="0.4", linewidth=1, label="before")
        panel.errorbar(0, effect["after"], 2 * effect["error"], fmt="o", color="0.1", capsize=4, label="predicted")
        panel.set_xticks([])
        panel.set_ylabel(f"test {name.replace('_', ' ')}" + (" (nats)" if name == "mean_loss" else ""))
    panels[0].legend(framealpha=1)
    if found:
        found.plot(panels[2])
    figure.suptitle(title)
    with path.open("xb") as file:
        figure.savefig(file, dpi=100)
    plt.close(figure)


def request(out: Path, asked: list[str], console: Console) -> None:
    """Handle one request."""
    if not (out / "sketch").exists():
        fail(f"there is no sketch in `{out}`: run the command `train` first.")
    data, sketch, log = DigitsOfUsers(), Sketch.load(out / "sketch"), read_log(out)
    if not np.array_equal(sketch.units, data.units):
        fail(f"the training data are not those of the sketch in `{out}`: run the command `train` with another --out.")
    asked = list(dict.fromkeys(asked))
    unknown = [user for user in asked if user not in data.ids]
    if unknown:
        fail(f"no such user: {', '.join(unknown)}. Nothing was deleted.")
    number = 1 + len(list(out.glob("request-*.json")))
    console.print(f"\n[bold]Request {number}: users {', '.join(asked)}[/bold]", highlight=False)
    earlier = list(dict.fromkeys(user for entry in log for user in entry["users"]))
    repeated = [user for user in asked if user in earlier]
    users = list(dict.fromkeys([*earlier, *asked]))
    if repeated:
        console.print(f"  deleted by an earlier request: {', '.join(repeated)}", highlight=False)
    console.print(f"  deleted so far, with this request: {', '.join(users)}", highlight=False)

    model = DigitClassifier().double()
    model.load_state_dict(sketch.primal)
    prediction = predict(sketch, model, data, data.units_of(users))
    decision, reason = decide(prediction)
    module, found = None, None
    if len(repeated) == len(asked):
        decision, reason = "none", "all of these users were deleted by earlier requests"
    elif decision == "negligible" and any(entry["model"] for entry in log):
        decision, reason = "unlearn", f"{reason}, but an earlier request has changed the model"
    if decision in ("unlearn", "retrain"):
        module, found = carry_out(decision, sketch, model, data, users)
        if not found.passed and decision == "unlearn":
            decision, reason = "retrain", f"unlearning did not pass the audit ({found.verdict}: {found.reason})"
            module, found = carry_out(decision, sketch, model, data, users)

    name = f"request-{number:04d}"
    entry = {
        "request": number,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "users": asked,
        "deleted_before": earlier,
        "decision": decision,
        "reason": reason,
        "report": f"{name}.json",
        "model": f"{name}.safetensors" if module else None,
    }
    report = {**entry, "prediction": prediction, "audit": found.to_dict() if found else None}
    with (out / f"{name}.json").open("x") as file:  # never over another
        file.write(json.dumps(report, indent=2))
    draw(out / f"{name}.png", f"Request {number}: {decision}", prediction, found)
    if module:
        save_file({key: t.contiguous() for key, t in module.state_dict().items()}, out / f"{name}.safetensors")
    append_to_log(out, entry)

    table = Table()
    for heading in ("test images", "before", "without these users", "change", "new model"):
        table.add_column(heading, justify="left" if heading == "test images" else "right")
    for metric, audited in (("accuracy", "test_accuracy"), ("mean_loss", "test_loss")):
        of = prediction[metric]
        reached = f"{found.values['unlearned'][audited].value:.4f}" if found else ""
        after, change = f"{of['after']:.4f} ± {of['error']:.4f}", f"{of['change']:+.4f}"
        table.add_row(metric.replace("_", " "), f"{of['before']:.4f}", after, change, reached)
    console.print(table)
    console.print(f"  decision: [bold]{decision}[/bold], since {reason}", highlight=False, soft_wrap=True)
    if found:
        console.print(f"  audit: {found.verdict} against the {found.reference} model", highlight=False)
    console.print(f"  report: {out / name}.json and .png", highlight=False)


def show(out: Path, console: Console) -> None:
    """Train, and handle three requests."""
    train(out, console)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the Trainer has said it all once
    for users in EXAMPLES:
        request(out, users, console)
    console.print(f"\nThe log, {out / 'requests.jsonl'}:", highlight=False)
    for entry in read_log(out):
        console.print(f"  {json.dumps({key: entry[key] for key in ('request', 'users', 'decision')})}", highlight=False)


def main() -> None:
    """Read the command."""
    where: dict[str, Any] = {"type": Path, "help": "where everything goes"}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=Path("deletion_request_output"), **where)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", default=argparse.SUPPRESS, **where)  # may stand before or after the command
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("train", parents=[common], help="train once, with a sketch")
    handle = commands.add_parser("request", parents=[common], help="handle a deletion request")
    handle.add_argument("users", nargs="+", help="ids of the users to delete")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"lightning\.")
    console = Console(width=110)
    try:
        if given.command == "train":
            train(given.out, console)
        elif given.command == "request":
            logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
            request(given.out, given.users, console)
        else:
            show(given.out, console)
    except LightningSketchError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
