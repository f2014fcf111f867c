"""Times: percentiles, fair turns, enough calls, contexts outside the time, and inputs that rotate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from hasten.bench.timing import CudaClock, HostClock, Plan, Timing, Work, clock_for, measure, num_input_sets


class FakeClock:
    """A clock that takes what a variant says it takes, and remembers who ran when."""

    def __init__(self) -> None:
        self.turns: list[tuple[object, int, int]] = []

    def burst(self, work: Work, first: int, count: int) -> list[float]:
        self.turns.append((work, first, count))
        return [float(work.call(number)) for number in range(first, first + count)]

    def host_us(self, work: Work) -> float | None:
        return 7.0

    def wall_s(self, work):
        raise AssertionError


def test_percentiles_lie_between_neighbours():
    timing = Timing(tuple(float(value) for value in range(1, 12)), None)
    assert timing.median_ms == 6.0
    assert timing.percentile(0.1) == 2.0
    assert timing.percentile(0.95) == pytest.approx(10.5)
    assert timing.fields() == {
        "median_ms": 6.0,
        "p10_ms": 2.0,
        "p90_ms": 10.0,
        "min_ms": 1.0,
        "max_ms": 11.0,
        "n": 11,
        "host_us": None,
    }


def test_variants_take_turns_and_each_round_begins_with_another():
    clock = FakeClock()
    works = {"a": Work(lambda number: 1.0), "b": Work(lambda number: 2.0)}
    timings = measure(clock, works, Plan(budget_ms=8, rounds=4, rest_ms=0, min_count=1))
    names = {id(work): name for name, work in works.items()}
    order = [names[id(work)] for work, _, _ in clock.turns]
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]  # two to learn, then four rounds
    assert timings["a"].times_ms == (1.0,) * 8
    assert timings["b"].times_ms == (2.0,) * 4
    assert timings["a"].host_us == 7.0


def test_slow_variants_still_get_the_least_count():
    timings = measure(FakeClock(), {"slow": Work(lambda number: 500.0)}, Plan(budget_ms=10, rounds=3, rest_ms=0))
    assert len(timings["slow"].times_ms) >= 5


def test_input_sets_go_on_where_the_last_round_stopped():
    seen: list[int] = []
    measure(FakeClock(), {"a": Work(lambda number: seen.append(number) or 1.0)}, Plan(budget_ms=6, rounds=3, rest_ms=0))
    assert seen[3:] == list(range(len(seen) - 3))


def test_nothing_to_measure_is_nothing():
    assert measure(FakeClock(), {}, Plan()) == {}


def test_the_host_clock_times_the_call_and_not_its_context():
    entered = []

    @contextmanager
    def slow_context() -> Iterator[None]:
        time.sleep(0.05)
        entered.append(True)
        yield

    times = HostClock().burst(Work(lambda number: time.sleep(0.004), slow_context), 0, 3)
    assert entered == [True]
    assert all(4.0 <= taken < 45.0 for taken in times)
    assert HostClock().wall_s(lambda: time.sleep(0.004)) >= 0.004


def test_the_clock_is_of_the_device():
    assert isinstance(clock_for(torch.device("cpu")), HostClock)
    assert isinstance(clock_for(torch.device("cuda")), CudaClock)


def test_small_inputs_rotate_and_large_ones_need_not():
    cpu = torch.device("cpu")
    assert num_input_sets(cpu, 1 << 30) == 1
    assert num_input_sets(cpu, 40 << 20) == 2
    assert num_input_sets(cpu, 1) == 32


class FakeDevice:
    """A device that does what is queued in order, once nobody queues any more; times in milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.spins = 0.0, []
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.spins.append)


def test_a_burst_hides_the_host_behind_a_spin_and_times_every_call(monkeypatch):
    device = FakeDevice(monkeypatch)

    def call(number: int) -> None:
        time.sleep(0.002)
        device.now += 3.0 + number

    clock, work = CudaClock(), Work(call)
    assert clock.burst(work, 4, 3) == [7.0, 8.0, 9.0]
    assert clock.host_us(work) >= 2000
    assert device.spins[-1] / 2e9 >= 3 * clock.host_us(work) / 1e6  # lasts until all three are queued


@pytest.mark.gpu
def test_device_time_is_the_time_of_the_kernel_whatever_the_host_does():
    def call(number: int) -> None:
        time.sleep(0.002)  # a slow host
        torch.cuda._sleep(200_000)

    (timing,) = measure(CudaClock(), {"a": Work(call)}, Plan(budget_ms=2, rounds=2, rest_ms=0)).values()
    assert timing.host_us > 2000
    assert 0.09 < timing.median_ms < 0.6  # 200 000 cycles at 0.35 to 2 GHz; never the 2 ms of the host
