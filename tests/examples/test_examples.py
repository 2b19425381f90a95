"""The examples of fine-tuning and of deletion requests, made smaller where they take long."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs ``main`` of an example module with the arguments of a command line."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["example.py", *arguments, "--out", str(tmp_path)])
        module.main()

    return run


@pytest.fixture
def requests(monkeypatch):
    """The example of deletion requests."""
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import deletion_request

    return deletion_request


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]


def refused(run, capsys, *arguments):
    """The one line of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_requests_add_up(requests, run, tmp_path, monkeypatch, capsys):
    """Oracle: what was asked for, and the bytes of the log before."""
    monkeypatch.setattr(requests, "EPOCHS", 1)
    assert "run the command `train` first" in refused(run, capsys, requests, "request", "17")
    run(requests, "train")
    assert "give another --out" in refused(run, capsys, requests, "train")
    run(requests, "request", "17")
    before = (tmp_path / "requests.jsonl").read_bytes()
    capsys.readouterr()
    assert "no such user: 5" in refused(run, capsys, requests, "request", "23", "5")
    assert (tmp_path / "requests.jsonl").read_bytes() == before
    run(requests, "request", "23", "17")
    run(requests, "request", "17")
    assert (tmp_path / "requests.jsonl").read_bytes().startswith(before)
    log = lines(tmp_path)
    assert [entry["users"] for entry in log] == [["17"], ["23", "17"], ["17"]]
    assert [entry["deleted_before"] for entry in log] == [[], ["17"], ["17", "23"]]
    assert log[2]["decision"] == "none"
    reports = [json.loads((tmp_path / entry["report"]).read_text()) for entry in log]
    assert reports[0]["prediction"] != reports[1]["prediction"] == reports[2]["prediction"]
    assert all((tmp_path / entry["report"]).with_suffix(".png").stat().st_size for entry in log)
    (tmp_path / "requests.jsonl").write_bytes(before + b'{"request": 2, "us')
    capsys.readouterr()
    assert "not whole" in refused(run, capsys, requests, "request", "23")


@pytest.mark.slow
def test_every_decision_is_shown(requests, run, tmp_path):
    """Oracle: the model retrained without the users."""
    run(requests)
    assert [entry["decision"] for entry in lines(tmp_path)] == ["negligible", "unlearn", "retrain"]
    data = requests.DigitsOfUsers()
    delete = data.units_of(["17", "23"])
    retrained = requests.fit(data, requests.Reweight(units=data.units, delete=delete))
    unlearned = requests.DigitClassifier().double()
    unlearned.load_state_dict(load_file(tmp_path / "request-0002.safetensors"))
    images, labels = data.test
    with torch.no_grad():
        wanted, found = (float(F.cross_entropy(model(images), labels)) for model in (retrained, unlearned))
    (report,) = (json.loads((tmp_path / "request-0002.json").read_text()),)
    assert abs(wanted - report["prediction"]["mean_loss"]["after"]) < 2 * report["prediction"]["mean_loss"]["error"]
    assert abs(found - wanted) < 0.1 * abs(wanted - report["prediction"]["mean_loss"]["before"])


@pytest.mark.slow
def test_adapters_of_a_small_backbone(run, tmp_path, monkeypatch, capsys):
    """Oracle: central differences of retraining, and the parameters that are trained."""
    pytest.importorskip("rich")
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import lora

    monkeypatch.setattr(
        lora,
        "BACKBONE",
        {"vocab_size": 300, "n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
    )
    monkeypatch.setattr(lora, "REVIEWS", 1)
    run(lora)
    assert "the same, bit for bit" in capsys.readouterr().out
    names = json.loads((tmp_path / "sketch" / "sketch.json").read_text())["coefficients"]["names"]
    assert len(names) == 2 * 2 + 1  # two matrices in each of two blocks, and the head
    assert all("lora" in name or "score" in name for name in names)
    assert (tmp_path / "predicted_against_retrained.png").stat().st_size
    reviews, users, test = lora.load_data()
    effect = lora.DeletionPredictor(lora.Sketch.load(tmp_path / "sketch"), lora.ReviewClassifier())
    p = effect.prepare(lora.DataLoader(test, batch_size=16, collate_fn=lora.collate)).delete([3])
    losses = []
    for h in (0.02, -0.02):
        model = lora.ReviewClassifier()
        lora.train(model, reviews, lora.Reweight(units=users, weights=[h * (u == 3) for u in range(64)]), False)
        losses.append(lora.test_losses(model, test))
    slope = (losses[0] - losses[1]) / 0.04
    assert (p.by_degree[0] - p.baseline - slope).norm() < 0.01 * slope.norm()
