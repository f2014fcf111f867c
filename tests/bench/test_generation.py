"""The generation suite on a tiny model: complete records, tokens compared, bytes by the book."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

from hasten.bench import generation
from hasten.bench.generation import SHAPES, USUAL, Options, Traffic, build
from hasten.errors import ArgumentError

CPU = torch.device("cpu")


def options(**changes) -> Options:
    usual = {"model": "tiny", "sizes": [(3, 20, 6)], "variants": USUAL, "repeats": 1}
    return Options(**(usual | {"dtype": torch.float32, "device": CPU} | changes))


class FixedClock:
    """Every run of all tokens takes 0.6 s, every run of one 0.1 s."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = itertools.cycle(seconds)

    def wall_s(self, work):
        work()
        return next(self.seconds)


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    monkeypatch.setattr(generation, "measure_read", lambda device: 10.0)
    monkeypatch.setattr(generation, "clock_for", lambda device: FixedClock(0.6, 0.1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
def test_every_variant_gives_the_same_tokens_and_a_complete_record():
    made, told = [], []
    generation.run(options(), made.extend, told.append)
    assert [record["implementation"] for record in made] == list(USUAL)
    for record in made:
        assert record["kind"] == "generation" and record["status"] == "ok", record
        assert record["tokens_equal"] == record["first_tokens_equal"] == 1.0
        assert (record["ms_per_step"], record["decode_tokens_per_s"], record["tokens_per_s"]) == (100.0, 30.0, 30.0)
        assert (record["total_s"], record["first_s"], record["n"]) == (0.6, 0.1, 1)
        bytes_step = (record["weight_gb"] + record["kv_gb"]) * 1e9
        assert record["share_of_read"] == pytest.approx(bytes_step / record["ms_per_step"] / 1e7, rel=1e-2, abs=1e-4)
        assert {"device", "commit", "command", "read_gbps", "transformers"} <= set(record)
    assert made[-1]["no_graphs"] == "cuda_graphs is off" and len(told) == 1 + len(USUAL)
    lines = generation.table(made).splitlines()
    assert lines[0].count("|") == 2 + len(USUAL) and lines[2].startswith("| tiny 3x20+6 | ")


def test_a_run_that_is_too_short_has_no_time(monkeypatch):
    monkeypatch.setattr(generation, "clock_for", lambda device: FixedClock(0.1, 0.2))
    made = []
    generation.run(options(variants=["transformers"]), made.extend, lambda line: None)
    assert made[0]["status"] == "too short to time" and "ms_per_step" not in made[0]


def test_another_model_is_wrong_and_a_failure_is_told(monkeypatch):
    real, calls = generation._of_engine, []

    def engines(model, ids, *rest):
        calls.append(ids)
        if len(calls) > 1:
            raise RuntimeError("no kernel\nfor this")
        return real(model, ids.flip(1), *rest)

    monkeypatch.setattr(generation, "_of_engine", engines)
    made = []
    generation.run(options(variants=["transformers", "hasten", "hasten-eager"]), made.extend, lambda line: None)
    assert [record["status"] for record in made] == ["ok", "wrong", "failed"]
    assert made[2]["reason"] == "no kernel for this"
    assert "failed: no kernel for this" in generation.table(made) and "| wrong |" in generation.table(made)


def test_bytes_of_a_step_are_those_that_must_be_read():
    model = build("tiny", torch.float32, CPU)
    embedding = 512 * 64 * 4
    weights = sum(weight.nbytes for weight in model.parameters())
    assert Traffic.of(model, 100, 4) == Traffic(weights - embedding, 2 * 100 * 2 * 2 * 16 * 4)
    config = transformers.MistralConfig(sliding_window=8, **{**SHAPES["tiny"]().to_dict(), "model_type": "mistral"})
    config.tie_word_embeddings = True
    tied = transformers.MistralForCausalLM(config).eval()
    assert Traffic.of(tied, 100, 2) == Traffic(
        sum(weight.nbytes for weight in tied.parameters()), 2 * 8 * 2 * 2 * 16 * 2
    )


def test_shapes_have_the_size_of_their_name():
    sizes = {"llama-3.1-8b": 8.03e9, "llama-1b": 1.236e9, "qwen3-0.6b": 0.596e9}
    for name, count in sizes.items():
        model = build(name, torch.bfloat16, torch.device("meta"))
        assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(count, rel=0.01)


def test_wrong_options_are_one_clear_line():
    with pytest.raises(ArgumentError, match=r"variants: expected some of transformers, .*, got vllm"):
        options(variants=["vllm"])
    with pytest.raises(ArgumentError, match="new: expected at least 2 tokens, got 1"):
        options(sizes=[(1, 5, 1)])
