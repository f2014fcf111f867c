"""`hasten train` and `hasten uptrain` end to end on tiny models: talk, report, resumption, errors in one line."""

from __future__ import annotations

import json

import pytest

from hasten.cli import app, train_progress
from hasten.train import Finished, Started, Stepped
from tests.train import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("cli"), num_key_value_heads=4)


@pytest.fixture
def run(capsys, folder):
    def call(verb, *words, model=folder / "model"):
        usual = ("--data", folder / "data", "--seqlen", 16, "--batch", 4, "--log-every", 2, "--device", "cpu")
        held_out = ("--eval-data", folder / "held-out.txt", "--lr", 0.01)
        with pytest.raises(SystemExit) as exit_info:
            app.main([verb, str(model), *map(str, (*usual, *held_out, *words))])
        return exit_info.value.code or 0, *capsys.readouterr()

    return call


def test_train_talks_on_stderr_and_reports_on_stdout(run, folder):
    code, out, talk = run("train", "--out", folder / "run", "--steps", 6, "--save-every", 3)
    assert code == 0
    first, second = out.splitlines()
    assert first.startswith("6 steps in 0:00:0") and first.endswith("model in " + str(folder / "run" / "model"))
    assert second.startswith("held-out loss ") and " before, " in second
    lines = talk.splitlines()
    assert " M parameters · " in lines[0] and lines[1].startswith("fp32 · attention: hasten · loss: linear")
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split(" · ")[0] for line in steps] == ["step 2", "step 4", "step 6"]
    assert all(" tokens/s · MFU — · 0:00:0" in line and line.endswith(" left") for line in steps)
    assert sum(line.startswith("saved ") for line in lines) == 2


def test_the_same_command_resumes_and_another_is_refused(run, folder):
    words = ("--out", folder / "again", "--schedule-steps", 6, "--json")
    code, out, _ = run("train", *words, "--steps", 2)
    assert code == 0 and json.loads(out)["step"] == 2
    code, out, talk = run("train", *words, "--steps", 4)
    assert code == 0 and "resumed after step 2" in talk and json.loads(out)["step"] == 4
    code, out, talk = run("train", *words, "--steps", 4, "--seed", 1)
    assert code == 2 and out == ""
    assert talk.startswith("error: ") and "data.seed was 0, is 1" in talk and talk.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (("--steps", 0), "error: steps: expected at least 1, got 0"),
        (("--warmup", 2000), "error: warmup: expected 0 to 1000 steps, got 2000"),
        (("--precision", "fp8"), "error: precision: expected one of auto, fp32"),
        (("--micro-batch", 3), "error: batch: expected a multiple of micro-batch times processes"),
        (("--seqlen", 4096), "error: data: expected more than 4096 tokens"),
        (("--tensorboard", "--steps", 1), "error: tensorboard: expected an installed tensorboard"),
    ],
    ids=str,
)
def test_errors_are_one_line(run, tmp_path, words, message):
    code, out, talk = run("train", "--out", tmp_path / "run", *words)
    assert (code, out) == (2, "")
    if "--seqlen" in words:
        message = "error: seqlen: expected at most the model's 64 positions, got 4096"
    assert message in talk and "Traceback" not in talk


def test_uptrain_converts_trains_on_and_reports(run, folder):
    words = ("--out", folder / "up", "--original-steps", 100, "--kv-heads", 2, "--min-lr-ratio", 0.5, "--json")
    code, out, _ = run("uptrain", *words)
    assert code == 0
    report = json.loads(out)
    assert (report["steps"], report["fraction"]) == (5, 0.05)
    assert report["original_kv_bytes"] == 2 * report["kv_bytes"] == 2 * 2 * 4 * 8 * 2
    assert report["after"] < report["before"] and report["original_loss"] > 0
    rates = [json.loads(line) for line in (folder / "up" / "log.jsonl").read_text().splitlines()]
    assert {line["lr"] for line in rates if line["kind"] == "stepped"} == {0.005}
    again = json.loads(run("uptrain", *words)[1])
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    text = run("uptrain", *words[:-1])[1]
    assert (
        "5 steps, 5.0% of the original's" in text and "KV cache, bytes a token in 16 bits: 256 before, 128 now" in text
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (("--original-steps", 0), "original-steps: expected at least 1, got 0"),
        (("--original-steps", 10, "--fraction", 0), "fraction: expected above 0, at most 1, got 0.0"),
        (("--original-steps", 10, "--kv-heads", 3), "num_kv_heads: expected a divisor of 4"),
        (("--original-steps", 10, "--min-lr-ratio", 0), "schedule: expected a rate above 0 where the original stopped"),
    ],
    ids=str,
)
def test_uptraining_that_cannot_be_is_named(run, tmp_path, words, message):
    code, out, talk = run("uptrain", "--out", tmp_path / "run", *words)
    assert (code, out) == (2, "") and f"error: {message}" in talk


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with train_progress.Display() as display:
        file = display.console.file = __import__("io").StringIO()
        started = {"num_parameters": 10, "num_tokens": 9, "rows_per_epoch": 3, "processes": 2, "device": "cuda:0"}
        display.listen(Started(step=2, steps=4, precision="bf16", attention="hasten", loss="x", **started))
        speed = {"tokens_per_s": 1234.0, "step_s": 0.1, "left_s": 61.0, "mfu": 0.512, "mfu_palm": 0.6}
        display.listen(Stepped(step=3, loss=2.5, lr=0.1, grad_norm=1.0, **speed))
    assert "resumed after step 2" in file.getvalue() and "2 processes" in file.getvalue()
    assert "loss 2.5000 · 1,234 tokens/s · MFU 51.2% · 0:01:01 left" in file.getvalue()


def test_an_interrupted_run_says_how_to_go_on():
    end = Finished(step=3, is_whole=False, loss=1.0, eval_first=None, eval_last=None, seconds=1.0, model=None)
    assert train_progress.summary(end) == ["stopped after step 3, and saved; the same command goes on from there"]
    assert train_progress.perplexity(30.0) == "e^30.0"
