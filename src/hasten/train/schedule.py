"""The learning rate of every step: pure arithmetic, the same however often a run was resumed."""

from __future__ import annotations

import math

from hasten.errors import ArgumentError
from hasten.train.config import ScheduleConfig


def lr_at(schedule: ScheduleConfig, step: int) -> float:
    """The rate of a run's step (0 is its first), `start_step` steps into the schedule.

    warm-up: (s + 1) / warmup_steps of the peak at step s. Then, with t the share of the way from the end of the
    warm-up to total_steps, and m = min_ratio: constant 1; linear 1 - (1 - m) t; cosine m + (1 - m)(1 + cos πt)/2;
    rsqrt √(w / s), w = max(warmup_steps, 1), and no less than m. Beyond total_steps linear and cosine stay at m.
    """
    place = schedule.start_step + step
    warmup = schedule.warmup_steps
    if place < warmup:
        return schedule.peak_lr * (place + 1) / warmup
    return schedule.peak_lr * _share(schedule, place)


def check_continued(schedule: ScheduleConfig, steps: int) -> None:
    """Raise ArgumentError if a continued run would not learn: the original schedule ended at a rate of 0."""
    if schedule.start_step and max(lr_at(schedule, 0), lr_at(schedule, steps - 1)) <= 0:
        got = f"a rate of 0 from step {schedule.start_step} on"
        hint = "give --min-lr-ratio, or --schedule-steps with the length the schedule is to have now"
        raise ArgumentError("schedule", "a rate above 0 where the original stopped", got, hint)


def _share(schedule: ScheduleConfig, place: int) -> float:
    warmup, low = schedule.warmup_steps, schedule.min_ratio
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "rsqrt":
        begin = max(warmup, 1)
        return max(low, math.sqrt(begin / max(place, begin)))
    way = min(1.0, (place - warmup) / max(1, schedule.total_steps - warmup))
    if schedule.kind == "linear":
        return 1 - (1 - low) * way
    return low + (1 - low) * (1 + math.cos(math.pi * way)) / 2
