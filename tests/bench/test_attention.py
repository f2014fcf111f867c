"""The suite as a whole: what a record holds, and what becomes of a peer that is wrong, breaks or cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from hasten.bench import attention as suite
from hasten.bench import ceilings, records
from hasten.bench.bound import Bound
from hasten.bench.peers import Peer, find_peers
from hasten.bench.problems import Pattern, Problem
from hasten.bench.timing import HostClock, Plan
from hasten.errors import UnsupportedError
from hasten.ops.cost import Rates

CPU = torch.device("cpu")
RATES = Rates(1e11, 1e10)
PROBLEM = Problem(
    batch=1, seqlen=48, num_heads=2, num_kv_heads=1, head_dim=16, pattern=Pattern(right=0), dtype=torch.float32
)
QUICK = Plan(budget_ms=1, rounds=2, rest_ms=0, min_count=2)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "_MATRIX", {"cpu": 64})
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(ceilings, "_PLAN", {"cpu": QUICK})


def peer(name: str, run: Callable[..., Tensor]) -> Peer:
    def bind(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
        return Bound(partial(run, q, k, v), (q, k, v), heads_first=False)

    return Peer(name, lambda problem, device: None, bind)


def options(*extra: Peer, **changes) -> suite.Options:
    usual = [*find_peers(["sdpa_math"], CPU, ["reference"]), *extra]
    return suite.Options(problems=[PROBLEM], peers=usual, device=CPU, plan=QUICK, **changes)


def by_name(made: list[records.Record], phase: str) -> dict[str, records.Record]:
    return {record["implementation"]: record for record in made if record["phase"] == phase}


def test_a_run_gives_complete_records():
    made, told = [], []
    suite.run(options(commit="abc"), made.extend, told.append)
    assert [record["kind"] for record in made] == ["ceiling"] * 2 + ["attention"] * 4
    place = ("run", "time", "device", "torch", "commit", "command", "matmul_tflops", "copy_gbps", "python")
    case = ("batch", "seqlen", "num_heads", "num_kv_heads", "head_dim", "mask", "dtype", "phase", "implementation")
    result = ("status", "median_ms", "p10_ms", "p90_ms", "n", "host_us", "tflops", "share_of_ceiling", "error")
    for record in made[2:]:
        assert set(place + case + result + ("vs_best_peer", "first_call_s")) <= set(record)
        assert record["status"] == "ok"
        assert record["commit"] == "abc"
        assert record["n"] >= 2
        json.loads(records.to_line(record))
    assert len({record["run"] for record in made}) == 1
    assert len(told) == 3
    assert "reference" in told[1]


def test_ratios_are_to_the_fastest_peer_and_rates_follow_from_the_median():
    made = suite.measure_problem(PROBLEM, options(), RATES)
    for phase in suite.PHASES:
        ours, theirs = (by_name(made, phase)[name] for name in ("hasten_reference", "sdpa_math"))
        assert ours["vs_best_peer"] == pytest.approx(theirs["median_ms"] / ours["median_ms"], rel=1e-3, abs=1e-4)
        assert theirs["vs_best_peer"] is None  # there is no other peer
        seconds = ours["median_ms"] / 1e3
        assert ours["tflops"] == pytest.approx(PROBLEM.flops(phase) / seconds / 1e12, rel=1e-3)
        least = max(PROBLEM.flops(phase) / 1e11, PROBLEM.hbm_bytes(phase) / 1e10)
        assert ours["share_of_ceiling"] == pytest.approx(least / seconds, abs=1e-4)


def test_a_wrong_peer_is_called_wrong_and_has_no_time():
    def without_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.expand_as(q), v.expand_as(q)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    made = suite.measure_problem(PROBLEM, options(peer("maskless", without_mask)), RATES)
    for phase in suite.PHASES:
        record = by_name(made, phase)["maskless"]
        assert record["status"] == "wrong"
        assert "median_ms" not in record
        assert max(record["error"].values()) > 0.1


def broken(error: Exception) -> Callable[..., Tensor]:
    def run(*tensors: Tensor) -> Tensor:
        raise error

    return run


@pytest.mark.parametrize(
    "error, status",
    [
        (RuntimeError("No available kernel. Aborting execution."), "unsupported"),
        (UnsupportedError("portable", "head_dim 16", "leave it out"), "unsupported"),
        (torch.OutOfMemoryError("tried to allocate"), "out of memory"),
        (ZeroDivisionError("two\nlines"), "failed"),
    ],
    ids=["no-kernel", "ours-refuses", "memory", "bug"],
)
def test_a_peer_that_breaks_is_a_record_and_the_others_go_on(error, status):
    made = suite.measure_problem(PROBLEM, options(peer("broken", broken(error))), RATES)
    for phase in suite.PHASES:
        found = by_name(made, phase)
        assert found["broken"]["status"] == status
        assert "\n" not in found["broken"].get("reason", "")
        assert found["sdpa_math"]["status"] == "ok"


def test_a_peer_that_refuses_is_not_called():
    never = peer("refusing", broken(AssertionError("was called")))
    refusing = replace(never, refuses=lambda problem, device: "too wide")
    record = by_name(suite.measure_problem(PROBLEM, options(refusing), RATES), "forward")["refusing"]
    assert (record["status"], record["reason"]) == ("unsupported", "too wide")


def test_the_forward_records_no_gradients_and_the_backward_is_the_backward_alone():
    modes = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        modes.append((torch.is_grad_enabled(), q.requires_grad))
        return (q * k * v).float()

    watched = peer("watched", run)
    inputs = [PROBLEM.tensors(CPU, 0)]
    want = suite.check.expected(PROBLEM, *inputs[0])
    suite.prepare(watched, PROBLEM, "forward", inputs, want)
    assert set(modes) == {(False, False)}
    modes.clear()
    suite.prepare(watched, PROBLEM, "backward", inputs, want)
    assert modes == [(True, True)]  # once, to make the graph; the calls that are timed do not come here


def test_no_problem_begins_after_the_budget():
    made, told = [], []
    both = replace(options(), problems=[PROBLEM, PROBLEM], budget_s=0.0)
    suite.run(both, made.extend, told.append)
    assert [record["kind"] for record in made] == ["ceiling"] * 2
    assert told[-1] == "0 s are over: 2 problems were not measured"


def test_quicker_plans_measure_less():
    usual = Plan()
    quick = suite.quicker(usual)
    assert quick.budget_ms < usual.budget_ms
    assert quick.rounds < usual.rounds


def test_the_ceiling_is_the_best_call():
    rates, timings = ceilings.measure_ceilings(CPU, torch.float32, HostClock())
    assert rates.flops_per_s == pytest.approx(2 * 64**3 / (min(timings["matmul"].times_ms) / 1e3))
    assert rates.bytes_per_s == pytest.approx(2 * (1 << 16) / (min(timings["copy"].times_ms) / 1e3))
