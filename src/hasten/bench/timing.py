"""How long a call takes: clocks of a device and of the host, and fair turns between what is compared.

Called by every suite; knows no attention. The method and its reasons: docs/design/measuring.md.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

_SPIN_CYCLES_PER_S = 2.0e9  # at or above the clock of every GPU we know, so a spin lasts at least as long as asked
_MOST_IN_BURST = 50


@dataclass(frozen=True)
class Work:
    """Something to time: `call(i)` uses the i-th set of inputs; `context` is entered outside the time."""

    call: Callable[[int], object]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Timing:
    """Times of single calls on the device, and of the host that queued them (None where both are one)."""

    times_ms: tuple[float, ...]
    host_us: float | None

    def percentile(self, share: float) -> float:
        """The time under which that share of the calls stayed, between neighbours by line."""
        ordered = sorted(self.times_ms)
        place = share * (len(ordered) - 1)
        below = ordered[math.floor(place)]
        return below + (ordered[math.ceil(place)] - below) * (place - math.floor(place))

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms)

    def fields(self) -> dict[str, Any]:
        """What a record says of it."""
        named = {"p10_ms": self.percentile(0.1), "p90_ms": self.percentile(0.9)}
        named = {"median_ms": self.median_ms, **named, "min_ms": min(self.times_ms), "max_ms": max(self.times_ms)}
        rounded: dict[str, Any] = {name: float(f"{value:.5g}") for name, value in named.items()}
        return {**rounded, "n": len(self.times_ms), "host_us": None if self.host_us is None else round(self.host_us, 1)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to measure: `budget_ms` of calls for each variant, in `rounds` turns, each after `rest_ms` of rest."""

    budget_ms: float = 40.0
    rounds: int = 5
    rest_ms: float = 20.0
    min_count: int = 5


class Clock(Protocol):
    """Times calls on one kind of device."""

    def burst(self, work: Work, first: int, count: int) -> list[float]:
        """Milliseconds of each of `count` calls in a row, call(first) and on."""

    def host_us(self, work: Work) -> float | None:
        """Microseconds the host needs to queue one call; None where the host does the work itself."""

    def wall_s(self, work: Callable[[], object]) -> float:
        """Seconds one call takes from start to finish, host and device together."""


class HostClock:
    """Times work that the host does itself."""

    def burst(self, work: Work, first: int, count: int) -> list[float]:
        times = []
        with work.context():
            for number in range(first, first + count):
                start = time.perf_counter()
                work.call(number)
                times.append((time.perf_counter() - start) * 1e3)
        return times

    def host_us(self, work: Work) -> float | None:
        return None

    def wall_s(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


@dataclass
class CudaClock:
    """Times work queued on a CUDA stream, with events round every call.

    A spin kernel goes first and lasts until the host has queued the whole burst, so the device never waits for
    the host and no host time is in the numbers; what the host takes is measured apart.
    """

    _host_s: dict[Work, float] = field(default_factory=dict)

    def burst(self, work: Work, first: int, count: int) -> list[float]:
        host_s = self._host_s.get(work) or self._learn(work)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        with work.context():
            self._spin(1.5 * host_s * count + 2e-4)
            for number, (start, end) in enumerate(events, first):
                start.record()
                work.call(number)
                end.record()
            torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def host_us(self, work: Work) -> float | None:
        return 1e6 * (self._host_s.get(work) or self._learn(work))

    def wall_s(self, work: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def _learn(self, work: Work) -> float:
        """Seconds the host takes for one call, the median of five queued behind a spin."""
        times = []
        with work.context():
            work.call(0)
            torch.cuda.synchronize()
            self._spin(5e-3)
            for number in range(5):
                start = time.perf_counter()
                work.call(number)
                times.append(time.perf_counter() - start)
            torch.cuda.synchronize()
        self._host_s[work] = statistics.median(times)
        return self._host_s[work]

    @staticmethod
    def _spin(seconds: float) -> None:
        torch.cuda._sleep(int(min(seconds, 0.1) * _SPIN_CYCLES_PER_S))


def clock_for(device: torch.device) -> Clock:
    """A new clock of a device; it holds on to what it has timed, so make one for each comparison."""
    return CudaClock() if device.type == "cuda" else HostClock()


def measure(clock: Clock, works: Mapping[str, Work], plan: Plan) -> dict[str, Timing]:
    """Time every variant, in turns: each round runs each of them once, beginning with another one.

    So a clock that falls under load, or a neighbour on the machine, meets all of them alike. `works` must have
    run before: nothing is warmed up here but caches.
    """
    counts = {}
    for name, work in works.items():
        longest_ms = max(statistics.median(clock.burst(work, 0, 3)), 1e-4)
        fair = max(plan.budget_ms / longest_ms, plan.min_count) / plan.rounds
        counts[name] = min(max(1, math.ceil(fair)), _MOST_IN_BURST)
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(plan.rounds if names else 0):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            time.sleep(plan.rest_ms / 1e3)
            times[name] += clock.burst(works[name], len(times[name]), counts[name])
    return {name: Timing(tuple(times[name]), clock.host_us(work)) for name, work in works.items()}


def num_input_sets(device: torch.device, input_bytes: int) -> int:
    """How many sets of inputs to rotate through so that none is still in the last cache when its turn returns."""
    cache_bytes = 32 << 20
    if device.type == "cuda":
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(1, math.ceil(2.5 * cache_bytes / input_bytes)), 32)
