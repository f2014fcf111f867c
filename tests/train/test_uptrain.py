"""Uptraining: how long, and at which rates."""

from __future__ import annotations

import pytest

from hasten.models import builtin
from hasten.train.config import DataConfig, ScheduleConfig, TrainConfig
from hasten.train.schedule import lr_at
from hasten.train.uptrain import kv_bytes, plan


def config(**schedule):
    made = ScheduleConfig(**{"total_steps": 1000, "warmup_steps": 100, "kind": "rsqrt", "min_ratio": 0.0, **schedule})
    return TrainConfig(model="m", out="o", data=DataConfig(paths=("a",)), schedule=made, steps=1)


@pytest.mark.parametrize(
    "original, fraction, steps", [(1000, 0.05, 50), (1000, 1, 1000), (10, 0.05, 1), (1001, 0.1, 101), (100, 0.07, 7)]
)
def test_a_share_of_the_original_steps(original, fraction, steps):
    assert plan(config(), original, fraction).steps == steps


def test_rates_go_on_where_the_original_stopped():
    original, further = config(), plan(config(), 1000, 0.05)
    assert [lr_at(further.schedule, step) for step in range(50)] == [
        lr_at(original.schedule, 1000 + step) for step in range(50)
    ]


def test_bytes_of_a_token_in_the_cache():
    assert kv_bytes("builtin") == kv_bytes(str(builtin.path())) == 8 * 2 * 2 * 8 * 32
    assert kv_bytes("nowhere") is None
