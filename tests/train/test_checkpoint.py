"""Checkpoints: kill -9 at any moment, a full disk, damage; the last good one stands and resumes to the bit."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hasten.errors import CheckpointError
from hasten.train import Saved, Started, Warned, checkpoint, files, train
from hasten.train.config import to_dict
from tests.train import runs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def whole(folder):
    train(runs.config(folder, "whole"))
    return runs.tensors(folder / "whole")


# one process that has imported everything forks a child for each attempt, and kills it at a random moment
KILLER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from hasten.train import TrainConfig, train
from hasten.train.config import from_dict
config = from_dict(TrainConfig, json.loads(sys.argv[1]))
random.seed(int(sys.argv[2]))
kills, longest_s = 0, None
while True:
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            train(config)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if kills < int(sys.argv[3]):
        time.sleep(random.uniform(0.1, 1.5))
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if kills < int(sys.argv[3]) and os.path.isdir(config.out + "/model"):
            break
        continue
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, code
    break
print(kills)
"""


def test_killed_at_random_moments_and_resumed_is_never_interrupted(folder):
    steps = 40
    config = runs.config(folder, "killed", save_every=1, steps=steps, keep=1)
    config = replace(config, schedule=replace(config.schedule, total_steps=steps))
    command = [sys.executable, "-c", KILLER, json.dumps(to_dict(config)), "1", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(replace(config, out=str(folder / "unkilled"), save_every=steps))
    finally:
        torch.set_num_threads(threads)
    assert runs.same(runs.tensors(folder / "killed", steps), runs.tensors(folder / "unkilled", steps))
    assert [path.name for path in (folder / "killed" / "checkpoints").iterdir()] == [f"step-{steps:09d}"]


@pytest.mark.parametrize("part", ["_write", "publish", "capture"])
def test_a_full_disk_loses_nothing(folder, whole, monkeypatch, part):
    """Full at the second save: a warning, the first one stands, training goes on and the next save succeeds."""
    config, told = runs.config(folder, f"full-{part}"), []
    home = {"_write": checkpoint.Checkpoints, "publish": checkpoint, "capture": checkpoint.randomness}[part]
    own, calls = getattr(home, part), []

    def fill(*given):
        calls.append(given)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return own(*given)

    def look(event):
        told.append(event)
        if isinstance(event, Warned):
            names = [path.name for path in (folder / f"full-{part}" / "checkpoints").iterdir()]
            assert names == ["step-000000002"]

    monkeypatch.setattr(home, part, fill)
    train(config, look)
    (warned,) = (event.text for event in told if isinstance(event, Warned))
    assert warned.endswith(
        "step 4 was not saved: the disk is full; the one of step 2 stands; free some room, then resume"
        " by the same command"
    )
    assert [event.step for event in told if isinstance(event, Saved)] == [2, 6, 8]
    assert runs.same(runs.tensors(folder / f"full-{part}"), whole)


def test_a_disk_that_stays_full_is_an_error_and_the_run_can_be_resumed(folder, whole):
    config = runs.config(folder, "stays-full")
    train(replace(config, steps=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_file", lambda *given, **options: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(CheckpointError, match="step 8 was not saved: the disk is full; the one of step 2 stands"):
            train(config)
    train(config)
    assert runs.same(runs.tensors(folder / "stays-full"), whole)


def test_a_damaged_checkpoint_is_passed_over_and_said(folder, whole):
    config, told = runs.config(folder, "damaged"), []
    train(replace(config, steps=4))
    last = folder / "damaged" / "checkpoints" / "step-000000004" / "optimizer.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    train(config, told.append)
    assert any("step-000000004 cannot be read" in event.text for event in told if isinstance(event, Warned))
    assert [event.step for event in told if isinstance(event, Started)] == [2]
    assert runs.same(runs.tensors(folder / "damaged"), whole)
    for path in (folder / "damaged" / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        train(config)


def test_a_checkpoint_of_another_kind_is_refused(folder):
    config = runs.config(folder, "kind", steps=2)
    train(config)
    state = folder / "kind" / "checkpoints" / "step-000000002" / "state.json"
    record = json.loads(state.read_text())
    for changes, message in (({"identity": "x"}, "it is of another model"), ({"world": 2}, "saved by 2 processes")):
        state.write_text(json.dumps(record | changes))
        with pytest.raises(CheckpointError, match=message):
            train(config)


def test_only_so_many_are_kept(folder, whole):
    names = sorted(path.name for path in (folder / "whole" / "checkpoints").iterdir())
    assert names == ["step-000000004", "step-000000006", "step-000000008"]


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.write_whole(path, b"old")
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        files.write_whole(path, b"new")
    with pytest.raises(OSError, match="full"), files.whole_folder(tmp_path / "b") as inside:
        (inside / "c").write_text("x")
    assert files.is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not files.is_full(OSError(2, "No such file"))
    assert path.read_bytes() == b"old" and not (tmp_path / "b").exists()
    files.remove_partial(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
