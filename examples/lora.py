"""Fine-tune a frozen transformer with LoRA, and ask what the adapters would be without some of the users.

50 million parameters are frozen, 18 thousand in the adapters are trained. A sketch needs coefficients for the latter
alone, so 64 directions cost little memory.

    python examples/lora.py [--out DIR]

Takes about a minute on two cores and nothing is downloaded: the backbone is built here with random parameters, where
you would load a pretrained one. Writes the sketch and a figure to DIR (``lora_output`` by default).
"""

import argparse
import hashlib
import logging
import resource
import sys
import time
import warnings
import zlib
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding, GPT2Config, GPT2ForSequenceClassification

from lightning_sketch import DeletionPredictor, Reweight, Sketch, SketchCallback, StableAdamW
from lightning_sketch.plotting import plot_predicted_against_retrained

matplotlib.use("Agg")

# The vocabulary of multilingual BERT, so that most parameters are where such models have them.
BACKBONE = {"vocab_size": 119_547, "n_embd": 256, "n_layer": 24, "n_head": 4}
USERS = 64  # each is a unit of deletion, and a direction of its own
REVIEWS = 5  # of each user
CONTRARY = [3, 17, 40]  # users who click the wrong star
BATCH = 16
WITHDRAWN = {"3": [3], "8": [8], "3, 17, 40": CONTRARY}
RETRAINED = ["3", "3, 17, 40"]

GOOD = ["great", "tasty", "lovely", "superb", "fresh", "crisp", "warm", "charming", "perfect", "delightful"]
BAD = ["awful", "bland", "rude", "stale", "soggy", "cold", "dirty", "bitter", "horrible", "greasy"]
PLAIN = ["the", "soup", "bread", "staff", "table", "menu", "coffee", "waiter", "evening", "music", "today", "again"]
PAD = 0


def tokenize(texts: list[str]) -> BatchEncoding:
    """Turn words into numbers by a hash; in your script this is a tokenizer."""
    rows = [[1 + zlib.crc32(word.encode()) % (BACKBONE["vocab_size"] - 1) for word in text.split()] for text in texts]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)
    return BatchEncoding({"input_ids": ids, "attention_mask": (ids != PAD).long()})


def collate(examples: list[tuple[str, int]]) -> BatchEncoding:
    """Make a batch of texts and labels."""
    texts, labels = zip(*examples, strict=True)
    batch = tokenize(list(texts))
    batch["labels"] = torch.tensor(labels)
    return batch


class ReviewClassifier(pl.LightningModule):
    """A frozen GPT-2 with LoRA adapters in its last two blocks and a new head; nothing in it knows of the sketch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # stands for the download of one and the same checkpoint
        config = GPT2Config(**BACKBONE, num_labels=2, pad_token_id=PAD)
        adapters = LoraConfig(
            task_type="SEQ_CLS",  # the head is trained, too
            target_modules=["c_attn"],
            layers_to_transform=[config.n_layer - 2, config.n_layer - 1],
            layers_pattern="h",
            fan_in_fan_out=True,
        )
        self.model = get_peft_model(GPT2ForSequenceClassification(config), adapters)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch).logits

    def training_step(self, batch: BatchEncoding, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return StableAdamW(trained, lr=1e-2, eps=1e-3, weight_decay=0.0)


def write_reviews(count: int, seed: int) -> list[tuple[str, int]]:
    """Return short texts and whether they are good (1) or bad (0)."""
    generator = np.random.default_rng(seed)
    reviews = []
    for _ in range(count):
        label = int(generator.integers(2))
        words = [*generator.choice(PLAIN, generator.integers(3, 6)), *generator.choice((BAD, GOOD)[label], 3)]
        reviews.append((" ".join(generator.permutation(words)), label))
    return reviews


def load_data() -> tuple[list[tuple[str, int]], np.ndarray, list[tuple[str, int]]]:
    """Return training reviews, the user of each, and test reviews."""
    reviews = write_reviews(USERS * REVIEWS, seed=0)
    users = np.arange(len(reviews)) % USERS
    train = [(text, 1 - label if u in CONTRARY else label) for (text, label), u in zip(reviews, users, strict=True)]
    return train, users, write_reviews(80, seed=1)


def train(model: ReviewClassifier, reviews: list[tuple[str, int]], callback: pl.Callback, progress: bool) -> float:
    """Fine-tune from the same seed, with one callback more; return the seconds."""
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        enable_progress_bar=progress,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(model, DataLoader(reviews, batch_size=BATCH, shuffle=True, collate_fn=collate))
    return time.perf_counter() - started


def test_losses(model: ReviewClassifier, reviews: list[tuple[str, int]]) -> Tensor:
    """Return the loss of every test review."""
    batch = collate(reviews)
    labels = batch.pop("labels")
    model.eval()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(**batch), labels, reduction="none")


def fingerprint(model: nn.Module) -> str:
    """Return a checksum of all frozen parameters, bit by bit."""
    digest = hashlib.sha256()
    for p in model.parameters():
        if not p.requires_grad:
            digest.update(p.detach().numpy())
    return digest.hexdigest()


def peak_memory() -> int:
    """Return the bytes that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Fine-tune once with the sketch, predict three deletions, retrain for two of them, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("lora_output"), help="where sketch and figure go")
    out = parser.parse_args().out
    warnings.filterwarnings("ignore", module=r"lightning\.|transformers\.")
    console = Console(width=120)
    reviews, users, test = load_data()
    test_loader = DataLoader(test, batch_size=BATCH, collate_fn=collate)

    console.print("[bold]1. One fine-tuning, with the sketch carried along[/bold]")
    model = ReviewClassifier()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    console.print(f"  {frozen:,} parameters are frozen, {trained:,} are trained", highlight=False)
    before, memory_before = fingerprint(model), peak_memory()
    callback = SketchCallback(out / "sketch", np.eye(USERS), degree=2, units=users)
    sketch_seconds = train(model, reviews, callback, progress=True)
    memory = peak_memory() - memory_before
    sketch = Sketch.load(out / "sketch")
    baseline = test_losses(model, test)
    same = fingerprint(model) == before
    console.print(f"  the frozen parameters are {'the same, bit for bit' if same else 'CHANGED'}", highlight=False)

    console.print("\n[bold]2. Predict deletions from the sketch alone[/bold]")
    console.print(f"  {sketch!r}", highlight=False, soft_wrap=True)
    started = time.perf_counter()
    effect = DeletionPredictor(sketch, ReviewClassifier()).prepare(test_loader)
    predictions = {name: effect.delete(units=units) for name, units in WITHDRAWN.items()}
    console.print(
        f"  {time.perf_counter() - started:.1f} s for {len(WITHDRAWN)} deletions and {len(test)} test reviews"
    )

    console.print("\n[bold]3. Fine-tune again without them, to compare[/bold]")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the Trainer has said it all once
    retrained = {}
    for name in RETRAINED:
        console.print(f"  retraining without users {name} ...")
        again = ReviewClassifier()
        retrain_seconds = train(again, reviews, Reweight(units=users, delete=WITHDRAWN[name]), progress=False)
        retrained[name] = test_losses(again, test) - baseline

    table = Table(title="\nTest loss (nats) when users are deleted")
    for heading in ("deleted users", "test review", "before", "predicted change", "retrained"):
        justify = "left" if heading in ("deleted users", "test review") else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for name, p in predictions.items():
        true = retrained.get(name)
        # The mean of correlated errors is at most the mean error.
        error = torch.hypot(p.stderr, p.truncation)
        truth = None if true is None else true.mean()
        rows = [(f"mean of all {len(test)}", baseline.mean(), p.change.mean(), error.mean(), truth)]
        for i in p.change.abs().topk(2).indices.tolist():
            rows.append((test[i][0], baseline[i], p.change[i], error[i], None if true is None else true[i]))
        for position, (text, of_run, change, deviation, truth) in enumerate(rows):
            cells = (f"{of_run:.4f}", f"{change:+.4f} ± {deviation:.4f}", "" if truth is None else f"{truth:+.4f}")
            last = position == len(rows) - 1
            table.add_row(name if position == 0 else "", text, *cells, end_section=last)
    console.print(table)
    console.print(
        "± is one standard error, the orders left out included. Users 3, 17 and 40 label the wrong way round."
    )
    for name, true in retrained.items():
        error = 100 * (predictions[name].change - true).norm() / true.norm()
        doubt = "" if predictions[name].reliable else "; the prediction says of itself that it is not reliable"
        console.print(f"  without {name}: relative error {error:.1f} % over all {len(test)} reviews{doubt}")

    tensors = 3  # the parameters, and two moments of the optimizer
    coefficients = tensors * 4 * trained * USERS * sketch.degree
    of_frozen = tensors * 4 * frozen * USERS * sketch.degree
    console.print(
        f"\nMemory: {memory_before / 2**20:.0f} MiB before training, {memory / 2**20:.0f} MiB more at its peak, where "
        f"the callback had planned for {callback.planned_bytes / 2**20:.0f} at most. Coefficients are "
        f"{coefficients / 2**20:.0f} MiB of these: had the backbone any, they would be {of_frozen / 2**30:.0f} GiB.\n"
        f"Time: {sketch_seconds:.0f} s with the sketch, {retrain_seconds:.1f} s without: as "
        f"{sketch_seconds / retrain_seconds:.0f} plain trainings, where the callback had announced 320 at most. It "
        f"overtakes retraining after as many questions.\n"
        f"Figure: {out / 'predicted_against_retrained.png'}",
        highlight=False,
        soft_wrap=True,
    )

    figure, panels = plt.subplots(1, len(retrained), figsize=(9, 4), layout="constrained")
    for panel, (name, true) in zip(panels, retrained.items(), strict=True):
        p = predictions[name]
        plot_predicted_against_retrained(p.change, true, p.stderr, ax=panel, label="degree 2")
        plot_predicted_against_retrained(p.by_degree[0] - baseline, true, ax=panel, label="first order alone")
        panel.set_title(f"deleted users: {name}")
        panel.set_xlabel("change of test loss after retraining (nats)")
        panel.set_ylabel("predicted change (nats)")
    figure.savefig(out / "predicted_against_retrained.png", dpi=100)


if __name__ == "__main__":
    main()
