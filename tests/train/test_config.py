"""Settings: checked when made, unknown keys refused, the same after a trip through JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hasten.errors import ArgumentError
from hasten.train.config import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig, decisive, from_dict, to_dict


def config(**changes) -> TrainConfig:
    usual = {"data": DataConfig(paths=("a.txt",)), "schedule": ScheduleConfig(total_steps=10), "steps": 10}
    return TrainConfig(**({"model": "m", "out": "o"} | usual | changes))


def test_a_trip_through_json_changes_nothing():
    made = config(eval_data=("x", "y"), optimizer=OptimizerConfig(clip_norm=0))
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(made)))) == made


@pytest.mark.parametrize("path", [(), ("data",), ("schedule",)], ids=str)
def test_an_unknown_key_is_refused(path):
    values = to_dict(config())
    inner = values
    for name in path:
        inner = inner[name]
    inner["learning_rat"] = 1
    with pytest.raises(ArgumentError, match=r"settings: expected keys of \w+, got 'learning_rat'; known: "):
        from_dict(TrainConfig, values)


def test_a_missing_key_is_named():
    values = to_dict(config())
    del values["steps"]
    with pytest.raises(ArgumentError, match=r"settings: expected all keys of TrainConfig, got .*'steps'"):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: config(steps=0),
        lambda: config(batch=0),
        lambda: config(micro_batch=0),
        lambda: config(precision="fp8"),
        lambda: config(compile="fast"),
        lambda: config(attention="flash"),
        lambda: config(keep=0),
        lambda: config(eval_every=-1),
        lambda: DataConfig(paths=()),
        lambda: DataConfig(paths=("a",), seqlen=1),
        lambda: DataConfig(paths=("a",), token_dtype="int8"),
        lambda: ScheduleConfig(total_steps=0),
        lambda: ScheduleConfig(total_steps=5, warmup_steps=6),
        lambda: ScheduleConfig(total_steps=5, kind="step"),
        lambda: ScheduleConfig(total_steps=5, peak_lr=float("nan")),
        lambda: ScheduleConfig(total_steps=5, min_ratio=2),
        lambda: OptimizerConfig(beta2=1.0),
        lambda: OptimizerConfig(weight_decay=-0.1),
        lambda: OptimizerConfig(clip_norm=-1),
    ],
)
def test_what_is_out_of_range_is_refused(make):
    with pytest.raises(ArgumentError):
        make()


def test_what_decides_the_weights():
    made = config()
    free = replace(made, out="p", steps=20, log_every=1, save_every=3, keep=9, eval_data=("z",), micro_batch=2)
    assert decisive(free) == decisive(made)
    for other in (
        replace(made, model="n"),
        replace(made, batch=3),
        replace(made, seed=1),
        replace(made, data=replace(made.data, seed=1)),
        replace(made, schedule=replace(made.schedule, peak_lr=1e-3)),
        replace(made, optimizer=OptimizerConfig(beta2=0.9)),
    ):
        assert decisive(other) != decisive(made)
