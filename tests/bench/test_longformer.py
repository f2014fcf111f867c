"""The suite of Longformer: every variant runs, outputs are compared, records say what a reader needs."""

from __future__ import annotations

import json

import pytest
import torch

from hasten.bench import longformer as suite
from hasten.cli import app
from hasten.errors import ArgumentError

TINY = {"hidden_size": 32, "num_heads": 4, "window": 8}


@pytest.fixture
def here(monkeypatch):
    """Measure in this process: another would import transformers again, which takes seconds."""
    monkeypatch.setattr(
        suite, "_apart", lambda variant, problem, options: suite.measure(variant, problem, "cpu", options.repeats, 0)
    )


@pytest.mark.parametrize("layers", [0, 2])
def test_every_variant_is_measured_and_ours_agrees(here, layers):
    problem = suite.Problem(seqlen=64, layers=layers, **TINY)
    made, told = [], []
    suite.run(suite.Options(problems=[problem], repeats=2), made.extend, told.append)
    assert (
        [row["variant"] for row in made] == ["hasten", "huggingface", "full"] == [line.split(":")[0] for line in told]
    )
    for row in made:
        assert row["kind"] == "longformer"
        assert row["forward_ms"] > 0
        assert row["n"] == 2
        assert {"commit", "torch", "threads", "command", "seqlen", "window"} <= set(row)
        json.dumps(row)
    assert made[0]["digest"] == pytest.approx(made[1]["digest"], rel=1e-5)
    text = suite.table(made)
    assert len(text.splitlines()) == 4
    assert " x as fast" in text


def test_outputs_that_differ_end_the_run(here, monkeypatch):
    real = suite.measure
    monkeypatch.setattr(suite, "measure", lambda name, *rest: real(name, *rest) | {"digest": float(len(name))})
    with pytest.raises(RuntimeError, match="outputs differ"):
        suite.run(suite.Options(problems=[suite.Problem(seqlen=64, **TINY)], repeats=1), print, print)


def test_memory_that_runs_out_is_a_record(here, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(suite, "_step", fail)
    made = []
    suite.run(suite.Options(problems=[suite.Problem(seqlen=64, **TINY)]), made.extend, print)
    assert {row["error"] for row in made} == {"out of memory"}
    assert "out of memory" in suite.table(made)


def test_an_unknown_variant_is_named():
    with pytest.raises(ArgumentError, match="variants: expected some of hasten, huggingface, full, got fast"):
        suite.run(suite.Options(problems=[], variants=("fast",)), print, print)


@pytest.mark.slow
def test_the_verb_measures_in_processes_of_their_own(capsys):
    with pytest.raises(SystemExit) as caught:
        app.main(["bench", "longformer", "--seqlen", "128", "--window", "32", "--repeats", "1", "--device", "cpu"])
    assert not caught.value.code
    assert "huggingface" in capsys.readouterr().out


@pytest.mark.slow
def test_a_layer_at_4096_tokens_is_twice_as_fast_in_half_the_memory():
    problem = suite.Problem(seqlen=4096)
    made = []
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # then the time of the CPU is that of the work, whatever else runs here
    suite.run(suite.Options(problems=[problem], variants=("hasten", "huggingface"), repeats=2), made.extend, print)
    torch.set_num_threads(num_threads)
    ours, theirs = made
    assert ours["cpu_ms"] < theirs["cpu_ms"] / 2
    assert ours["peak_mib"] < theirs["peak_mib"] / 2
