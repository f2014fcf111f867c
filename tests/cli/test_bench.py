"""`hasten bench` from end to end on a CPU, with the oracle as our implementation so that it holds everywhere."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from hasten.bench import ceilings, suites
from hasten.bench.problems import Pattern, Problem
from hasten.bench.timing import Plan
from hasten.cli import app
from hasten.cli.measuring import find_device
from hasten.errors import ArgumentError

SMALL = ("--tokens", "64", "--width", "32", "--head-dim", "16", "--seqlen", "32", "--device", "cpu", "--quick")
OURS = ("--implementation", "reference", "--peers", "sdpa_math")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "_MATRIX", {"cpu": 64})
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(ceilings, "_PLAN", {"cpu": Plan(budget_ms=1, rounds=1, rest_ms=0)})


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        app.main(arguments)
    code = exit_info.value.code
    return code if isinstance(code, int) else 0


def test_attention_prints_a_table_and_keeps_records(tmp_path, capsys):
    path, picture = tmp_path / "x.jsonl", tmp_path / "x.png"
    files = ("--out", str(path), "--plot", str(picture))
    assert run("bench", "attention", *SMALL, *OURS, *files, "--commit", "abc") == 0
    out, err = capsys.readouterr()
    assert "Attention forward" in out
    assert "Attention backward" in out
    assert "D=16 causal N=32 B=2 H=2" in out
    assert "[2/2] full b2 s32 h2 d16 fp32 backward:" in err
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(kept) == 2 + 2 * 2 * 2
    assert {record["commit"] for record in kept} == {"abc"}
    assert picture.stat().st_size > 0


def test_json_is_all_that_stdout_gets(capsys):
    words = ("--window", "4,0", "--longformer", "4,2", "--forward", "--json")
    assert run("bench", "attention", *SMALL, *OURS, *words) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cases = [(record["mask"], record["phase"]) for record in made if record["kind"] == "attention"]
    assert cases == [("window:4,0", "forward")] * 2 + [("longformer:4,2", "forward")] * 2


def test_every_mask_can_be_asked_for(capsys):
    masks = ("blocks:50", "documents:9", "packed:9")
    words = ("--batch", "1", "--forward", "--json", *(word for mask in masks for word in ("--mask", mask)))
    assert run("bench", "attention", *SMALL, *OURS, *words) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    attention = [record for record in made if record["kind"] == "attention"]
    assert [record["mask"] for record in attention] == [mask for mask in masks for _ in range(2)]
    assert {record["status"] for record in attention} == {"ok"}


def test_rows_of_a_suite_are_measured_within_a_budget(monkeypatch, capsys):
    def tiny(dtype: torch.dtype) -> dict[str, list[Problem]]:
        sizes = {"batch": 1, "num_heads": 2, "num_kv_heads": 2, "dtype": dtype}
        rows = {"dense": ("full", 32, 16), "window": ("window:3,0", 32, 16), "longformer": ("longformer:4,2", 64, 8)}
        return {
            name: [Problem(**sizes, pattern=Pattern.parse(text), seqlen=seqlen, head_dim=head_dim)]
            for name, (text, seqlen, head_dim) in rows.items()
        }

    monkeypatch.setattr(suites, "SUITES", {"hopper": tiny})
    words = ("bench", "attention", "--suite", "hopper", "--device", "cpu", "--quick", *OURS[:2])
    peers = ("--peers", "sdpa_math,hf_longformer", "--deterministic")
    assert run(*words, *peers, "--rows", "longformer,window") == 0
    out, err = capsys.readouterr()
    assert "[2/2] window:3,0 b1 s32 h2 d16 fp32 backward: reference" in err
    assert "hf_longformer" in out
    assert "hasten_reference+deterministic" in out
    assert "Attention backward, ours / peer, geometric means" in out
    assert "Attention forward, us of host a call / s of first call" in out
    assert run(*words, *peers, "--seqlen", "32", "--budget", "0") == 0
    assert "0 s are over: 2 problems were not measured" in capsys.readouterr().err


def test_a_table_is_made_from_the_file_alone(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    assert run("bench", "attention", *SMALL, *OURS, "--causal", "--forward", "--out", str(path)) == 0
    capsys.readouterr()
    assert run("bench", "table", str(path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("**Attention forward, GFLOP/s, fp32,")
    assert lines[2] == "|  | hasten_reference | sdpa_math | ours / best peer, of ceiling |"
    assert lines[4].startswith("| D=16 causal N=32 B=2 H=2 |")
    assert run("bench", "plot", str(path), "--out", str(tmp_path / "y.png")) == 0
    assert (tmp_path / "y.png").stat().st_size > 0


def test_training_compares_attentions(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    words = ("--attention", "eager,sdpa", "--shape", "1x16", "--steps", "1", "--device", "cpu", "--out", str(path))
    assert run("bench", "training", *words) == 0
    out, err = capsys.readouterr()
    assert "tiny 1x16" in out
    assert "tiny 1x16 sdpa:" in err
    assert [json.loads(line)["implementation"] for line in path.read_text().splitlines()] == ["eager", "sdpa"]


@pytest.mark.parametrize(
    "words, error",
    [
        (("attention", "--seqlen", "many"), "error: seqlen: expected sizes such as"),
        (("attention", "--window", "3"), "error: mask: expected causal, full"),
        (("attention", "--mask", "blocks:0"), "error: mask: expected causal, full"),
        (("attention", "--suite", "ampere"), "error: suite: expected one of hopper, got 'ampere'"),
        (("attention", "--rows", "widow"), "error: rows: expected some of dense"),
        (("attention", "--suite", "hopper", "--causal"), "error: suite: expected no masks and sizes beside it"),
        (("attention", "--suite", "hopper", "--seqlen", "17"), "error: suite: expected rows of those sizes"),
        (("attention", "--dtype", "int8"), "error: dtype: expected one of bf16"),
        (("attention", "--peers", "fast"), "error: peers: expected auto, all"),
        (("attention", "--device", "toaster"), "error: device: expected cuda or cpu, got 'toaster'"),
        (("training", "--shape", "8"), "error: shape: expected BATCHxLENGTH"),
        (("training", "--model", "gpt5"), "error: model: expected some of"),
        (("table", "no-such.jsonl"), "error: file: expected a file of records, got no file no-such.jsonl"),
    ],
)
def test_bad_input_is_one_line(words, error, capsys):
    assert run("bench", *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(error)
    assert len(err.splitlines()) == 1


def test_only_training_loads_transformers():
    program = (
        "import sys, hasten.cli.bench, hasten.cli.doctor, hasten.cli.explain; print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False\n"


def test_a_gpu_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert find_device(None).type == "cpu"
    with pytest.raises(ArgumentError, match="device: expected a device of this machine, got 'cuda'"):
        find_device("cuda")
