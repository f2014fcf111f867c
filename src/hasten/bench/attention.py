"""The attention suite: every problem of a grid, forward and backward, ours beside every peer that takes it.

Each variant runs once to compile, is checked against the definition, and only then timed, in turns with the
others. A peer that is wrong is reported as wrong and not timed. Called by `hasten bench attention`.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten.bench import check, records
from hasten.bench.bound import Bound
from hasten.bench.ceilings import measure_ceilings
from hasten.bench.peers import Peer
from hasten.bench.problems import Problem
from hasten.bench.records import Record
from hasten.bench.timing import Plan, Timing, Work, clock_for, measure, num_input_sets
from hasten.errors import HastenError
from hasten.ops import cost

PHASES = ("forward", "backward")
_NO_KERNEL = ("No available kernel", "No viable backend", "not supported", "only supports")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure and how. `budget_s`: when to begin no further problem, in seconds from the start.

    `commit`: of the sources, where git is not there to say.
    """

    problems: Sequence[Problem]
    peers: Sequence[Peer]
    device: torch.device
    phases: Sequence[str] = PHASES
    plan: Plan = field(default_factory=Plan)
    budget_s: float | None = None
    commit: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A variant that ran once: how it went, and the work to time if it went well."""

    status: str
    facts: Record = field(default_factory=dict)
    work: Work | None = None


def run(options: Options, emit: Callable[[list[Record]], None], tell: Callable[[str], None]) -> None:
    """Measure all problems; `emit` gets the records of each when it is done, `tell` a line of progress."""
    start = time.monotonic()
    place = records.environment(options.device, options.commit)
    rates, timings = measure_ceilings(options.device, options.problems[0].dtype, clock_for(options.device))
    place |= records.ceiling_fields(rates)
    emit([{"kind": "ceiling", **place, "implementation": name, **timings[name].fields()} for name in timings])
    tell(f"{place['device']}: matrix product {place['matmul_tflops']} TFLOP/s, copy {place['copy_gbps']} GB/s")
    for number, problem in enumerate(options.problems, 1):
        if options.budget_s is not None and time.monotonic() - start > options.budget_s:
            tell(f"{options.budget_s:g} s are over: {len(options.problems) - number + 1} problems were not measured")
            break
        for peer in options.peers:
            peer.begin()
        made = [{"kind": "attention", **place, **record} for record in measure_problem(problem, options, rates)]
        emit(made)
        for phase in options.phases:
            tell(f"[{number}/{len(options.problems)}] {problem} {phase}: {_summary(made, phase)}")


def measure_problem(problem: Problem, options: Options, rates: cost.Rates) -> list[Record]:
    """Records of one problem without the place: one for each phase and variant, measured or not."""
    count = num_input_sets(options.device, 3 * problem.sizes.q_bytes)
    inputs = [problem.tensors(options.device, seed) for seed in range(count)]
    want = check.expected(problem, *inputs[0])
    made: list[Record] = []
    for phase in options.phases:
        prepared = {peer.name: prepare(peer, problem, phase, inputs, want) for peer in options.peers}
        works = {name: variant.work for name, variant in prepared.items() if variant.work is not None}
        timings = measure(clock_for(options.device), works, options.plan)
        ours = {peer.name for peer in options.peers if peer.is_ours}
        for name, variant in prepared.items():
            record = {
                **problem.fields(),
                "phase": phase,
                "implementation": name,
                "status": variant.status,
                **variant.facts,
            }
            if name in timings:
                record |= timings[name].fields() | figures(problem, phase, timings[name], rates)
                record["vs_best_peer"] = _ratio_to_best(name, timings, ours)
            made.append(record)
        prepared.clear()
        works.clear()
        _release(options.device)
    return made


def prepare(peer: Peer, problem: Problem, phase: str, inputs: Sequence[Inputs], want: check.Expected) -> Prepared:
    """Bind a peer to its inputs, run it for the first time, check it."""
    device = inputs[0][0].device
    reason = peer.refuses(problem, device)
    if reason is not None:
        return Prepared("unsupported", {"reason": reason})
    bind = _backward if phase == "backward" else _forward
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA explains its refusals in warnings; the status says it
            return bind(peer, problem, inputs, want)
    except torch.OutOfMemoryError:
        _release(device)
        return Prepared("out of memory")
    except HastenError as error:
        return Prepared("unsupported", {"reason": str(error)})
    except Exception as error:  # noqa: BLE001 - whatever a peer breaks with is a result of the comparison
        text = " ".join(str(error).split())[:300] or type(error).__name__
        is_refusal = any(words in text for words in _NO_KERNEL)
        return Prepared("unsupported" if is_refusal else "failed", {"reason": text})


def figures(problem: Problem, phase: str, timing: Timing, rates: cost.Rates) -> Record:
    """Rates from a time: the median's, and its distance from what this machine can do at best."""
    flops, num_bytes = problem.flops(phase), problem.hbm_bytes(phase)
    seconds = timing.median_ms / 1e3
    return {
        "tflops": float(f"{flops / seconds / 1e12:.4g}"),
        "gbps": float(f"{num_bytes / seconds / 1e9:.4g}"),
        "share_of_ceiling": round(cost.roofline_s(flops, num_bytes, rates) / seconds, 4),
    }


def _forward(peer: Peer, problem: Problem, inputs: Sequence[Inputs], want: check.Expected) -> Prepared:
    """The forward as inference calls it: no gradients recorded."""
    bounds = [peer.bind(problem, *tensors[:3]) for tensors in inputs]
    context = partial(_nested, torch.no_grad, bounds[0].context)
    with context():
        facts = _first_calls(bounds[0].run, inputs[0][0].device)
        out = bounds[0].to_contract(bounds[0].run())
    errors = {"out": check.error(check.our_part(problem, out), want.out)}
    work = Work(lambda number: bounds[number % len(bounds)].run(), context)
    return _judged(problem, errors, facts, work)


def _backward(peer: Peer, problem: Problem, inputs: Sequence[Inputs], want: check.Expected) -> Prepared:
    """The backward alone, through autograd, of a graph made once and kept: dq, dk and dv from dout."""
    bounds: list[Bound] = []
    for q, k, v, _ in inputs:
        bounds.append(peer.bind(problem, *(tensor.detach().requires_grad_() for tensor in (q, k, v))))
    before = _allocated(inputs[0][0].device)
    with bounds[0].context():
        outs = [bound.run() for bound in bounds]
    saved_bytes = (_allocated(inputs[0][0].device) - before) // len(bounds)
    douts = [bound.from_contract(tensors[3]) for bound, tensors in zip(bounds, inputs, strict=True)]

    def call(number: int) -> tuple[Tensor, ...]:
        which = number % len(bounds)
        return torch.autograd.grad(outs[which], bounds[which].leaves, douts[which], retain_graph=True)

    facts = _first_calls(partial(call, 0), douts[0].device)
    if "peak_bytes" in facts:
        facts["saved_bytes"] = saved_bytes
    grads = [check.our_part(problem, bounds[0].to_contract(grad)) for grad in call(0)]
    names = ("dq", "dk", "dv")
    errors = {name: check.error(grad, getattr(want, name)) for name, grad in zip(names, grads, strict=True)}
    return _judged(problem, errors, facts, Work(call))


def _judged(problem: Problem, errors: dict[str, float], facts: Record, work: Work) -> Prepared:
    facts = facts | {"error": {name: float(f"{value:.3g}") for name, value in errors.items()}}
    if max(errors.values()) <= check.LIMITS[problem.dtype]:
        return Prepared("ok", facts, work)
    return Prepared("wrong", facts)


def _first_calls(call: Callable[[], object], device: torch.device) -> Record:
    """Seconds of the first call, which compiles what must be compiled, and memory of the second beyond its inputs.

    The inputs of a backward hold what its forward saved: `saved_bytes`, out included.
    """
    facts: Record = {"first_call_s": round(clock_for(device).wall_s(call), 3)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = _allocated(device)
        result = call()
        facts["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        del result
    return facts


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _ratio_to_best(name: str, timings: dict[str, Timing], ours: set[str]) -> float | None:
    """Time of the fastest peer over the time of this variant: above 1 is faster than every peer; None without one."""
    peers = [timing.median_ms for other, timing in timings.items() if other not in ours and other != name]
    return round(min(peers) / timings[name].median_ms, 4) if peers else None


def _nested(*contexts: Callable[[], AbstractContextManager[Any]]) -> ExitStack:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        return stack.pop_all()


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _summary(made: Sequence[Record], phase: str) -> str:
    words = []
    for record in made:
        if record.get("phase") == phase:
            value = f"{record['tflops']:.4g}" if "tflops" in record else record["status"]
            words.append(f"{record['implementation'].removeprefix('hasten_')} {value}")
    return ", ".join(words) + " TFLOP/s"


def quicker(plan: Plan) -> Plan:
    """A plan for a grid in minutes: half the calls, short rests."""
    return replace(plan, budget_ms=plan.budget_ms / 2, rest_ms=plan.rest_ms / 2, rounds=3)
