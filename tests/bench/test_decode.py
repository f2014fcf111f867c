"""The decode suite on a CPU: records, checks, ratios and the table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hasten.bench import decode
from hasten.bench.timing import Plan
from hasten.errors import ArgumentError

QUICK = Plan(budget_ms=1.0, rounds=1, rest_ms=0.0, min_count=1)


def measured(peers=("sdpa_math",), shared=0):
    problems = decode.grid("gqa,mqa", "2", "64", head_dim=16, shared=shared, dtype=torch.float32)
    options = decode.Options(problems=problems, device=torch.device("cpu"), peers=peers, timing=QUICK)
    made, told = [], []
    decode.run(options, made.extend, told.append)
    return made, told


def test_every_variant_gives_a_record_that_can_be_judged(monkeypatch):
    monkeypatch.setattr(decode, "measure_read", lambda device: 10.0)
    made, told = measured()
    assert [record["implementation"] for record in made[:3]] == ["hasten_paged", "hasten_rows", "sdpa_math"]
    for record in made:
        assert record["kind"] == "decode" and record["status"] == "ok" and record["error"] < 1e-5
        assert record["gbps"] > 0 and record["share_of_read"] > 0 and record["commit"] is not None
    assert made[2]["vs_best_peer"] == 1.0
    assert len(told) == 3 and decode.table(made).count("\n") == 3


def test_a_wrong_variant_is_not_timed(monkeypatch):
    monkeypatch.setattr(decode, "measure_read", lambda device: 10.0)
    wrong = decode.Variant("wrong", lambda problem, given: given.q[-1] * 0.0)
    broken = decode.Variant("broken", lambda problem, given: given.nothing)
    monkeypatch.setattr(decode, "ours", lambda problem, options: [wrong, broken])
    made, _ = measured(peers=())
    assert [record["status"] for record in made[:2]] == ["wrong", "failed"] and "us" not in made[0]
    assert "nothing" in made[1]["reason"]


def test_a_shared_prefix_counts_once():
    (problem,) = decode.grid("mqa", "4", "32", head_dim=16, shared=64, dtype=torch.float32)
    assert problem.context == 96 and problem.kv_bytes == 2 * (64 + 4 * 32) * 16 * 4
    given = decode.inputs(problem, torch.device("cpu"), 0, needs_rows=True)
    assert (given.paged.block_table[:, :4] == given.paged.block_table[0, :4]).all()
    assert len(set(given.paged.block_table[:, 4:].flatten().tolist())) == 8
    want = decode.expected(problem, given)
    for variant in decode.ours(problem, decode.Options(problems=[], device=torch.device("cpu"))):
        assert torch.allclose(variant.call(problem, given).reshape(want.shape).double(), want, atol=1e-5)


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(decode, "measure_read", lambda device: 10.0)
    options = decode.Options(
        problems=decode.grid("mha", "1", "64"), device=torch.device("cpu"), most_bytes=1 << 10, timing=QUICK
    )
    told = []
    decode.run(options, lambda some: pytest.fail("nothing is measured"), told.append)
    assert "left out" in told[-1]


def test_names_are_checked():
    with pytest.raises(ArgumentError, match="heads: expected some of mha"):
        decode.grid("mla", "1", "64")
    with pytest.raises(ArgumentError, match="peers: expected some of sdpa_cudnn"):
        decode.peer("flashinfer")


def test_reading_is_measured():
    assert decode.measure_read(torch.device("cpu")) > 0


def test_problems_say_what_they_are():
    problem = replace(decode.grid("gqa", "1", "64")[0], shared=16)
    assert str(problem) == "gqa ctx=64 B=1 D=128 shared=16"
