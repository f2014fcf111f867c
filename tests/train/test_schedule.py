"""Learning rates: the shapes, and that a continued schedule goes on where it stopped."""

from __future__ import annotations

import itertools

import pytest

from hasten.errors import ArgumentError
from hasten.train.config import SCHEDULES, ScheduleConfig
from hasten.train.schedule import check_continued, lr_at


def rates(kind, count=101, **options):
    usual = {"total_steps": 100, "peak_lr": 1.0, "min_ratio": 0.1, "warmup_steps": 10}
    schedule = ScheduleConfig(kind=kind, **(usual | options))
    return [lr_at(schedule, step) for step in range(count)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_peak(kind):
    found = rates(kind)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert all(one >= other for one, other in itertools.pairwise(found[10:]))


def test_where_each_shape_goes():
    assert set(rates("constant")[9:]) == {1.0}
    assert rates("linear")[55] == pytest.approx(0.55) and rates("linear")[100] == pytest.approx(0.1)
    assert rates("cosine")[55] == pytest.approx(0.55) and rates("cosine")[100] == pytest.approx(0.1)
    assert rates("rsqrt")[40] == pytest.approx(0.5)
    assert rates("cosine", 200)[150:] == pytest.approx([0.1] * 50)
    assert rates("rsqrt", 3000)[-1] == pytest.approx(0.1)
    assert rates("rsqrt", warmup_steps=0)[4] == pytest.approx(0.5)


@pytest.mark.parametrize("start", [0, 1, 10, 37, 120])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_continued_schedule_does_not_warm_up_again(kind, start):
    whole = rates(kind, 200)
    assert rates(kind, 50, start_step=start) == whole[start : start + 50]


def test_a_schedule_that_ended_at_zero_cannot_be_continued():
    ended = ScheduleConfig(kind="linear", total_steps=100, min_ratio=0.0, start_step=100)
    with pytest.raises(ArgumentError, match=r"schedule: expected a rate above 0 .* from step 100 on; give --min-lr"):
        check_continued(ended, 5)
    check_continued(ScheduleConfig(kind="linear", total_steps=105, min_ratio=0.0, start_step=100), 5)
    check_continued(ScheduleConfig(kind="linear", total_steps=1, min_ratio=0.0), 5)
