"""The log of a run: one line an event, cut back to the step a run resumes from."""

from __future__ import annotations

from hasten.train import Evaluated, Saved, Warned
from hasten.train.log import Log, read


def evaluated(step):
    return Evaluated(step=step, loss=step / 2, num_labels=3)


def test_a_resumed_log_goes_on_where_the_run_does(tmp_path):
    log = Log(tmp_path, 0)
    for step in range(4):
        log.write(evaluated(step))
    log.write(Saved(step=3, path="x", seconds=0.1))
    log.write(Warned(text="for the eye"))
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "evaluated", "st')  # cut short by a kill
    assert [(line["kind"], line["step"]) for line in read(tmp_path)][-2:] == [("evaluated", 3), ("saved", 3)]
    log = Log(tmp_path, 2)
    log.write(evaluated(3))
    log.close()
    assert [line["step"] for line in read(tmp_path)] == [0, 1, 2, 3]
    assert read(tmp_path)[3] == {"kind": "evaluated", "step": 3, "loss": 1.5, "num_labels": 3}
    assert read(tmp_path / "nowhere") == []


def test_a_log_of_another_beginning_is_begun_again(tmp_path):
    log = Log(tmp_path, 0)
    log.write(evaluated(5))
    log.close()
    Log(tmp_path, 0).close()
    assert read(tmp_path) == []
