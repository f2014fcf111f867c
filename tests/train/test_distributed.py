"""Two processes with spread weights: the same loss as one, and killed and resumed to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from hasten.errors import ArgumentError
from hasten.train import distributed, train
from hasten.train.config import to_dict
from tests.engine.tiny_checkpoints import llama
from tests.train import runs

ROOT = Path(__file__).parents[2]

# one process imports everything, then forks both ranks of each run in turn; "kill" ends both after a checkpoint
PAIR = """
import glob, json, os, signal, sys, time
import torch
torch.set_num_threads(1)
import torch.distributed as dist
import torch.distributed.fsdp, torch.distributed.checkpoint
from hasten.train import TrainConfig, train
from hasten.train.config import from_dict

def rank(number, config, path):
    try:
        dist.init_process_group("gloo", init_method="file://" + path, rank=number, world_size=2)
        train(config)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)

for turn, (how, values) in enumerate(json.loads(sys.argv[1])):
    config = from_dict(TrainConfig, values)
    children = []
    for number in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            rank(number, config, f"{config.out}-store-{turn}")
    while how == "kill" and not glob.glob(config.out + "/checkpoints/step-*"):
        time.sleep(0.005)
    for child in children if how == "kill" else ():
        os.kill(child, signal.SIGKILL)
    for child in children:  # the second may see the first one's end, and end by itself, before its own signal comes
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in ((-signal.SIGKILL, 1) if how == "kill" else (0,)), code
"""


def run_pairs(*turns):
    command = [sys.executable, "-c", PAIR, json.dumps([(how, to_dict(config)) for how, config in turns])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def state(out, step=8):
    """All that the shards of a checkpoint hold."""
    dcp_to_torch_save(out / "checkpoints" / f"step-{step:09d}" / "shards", out / "all.pt")
    return torch.load(out / "all.pt", weights_only=True)


# torch's converter of shards to one file still uses what its own releases warn about
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_two_processes_train_as_one_and_resume_to_the_bit(tmp_path):
    folder = runs.prepare(tmp_path)
    llama(folder / "plain")  # without dropout, which two processes draw differently
    config = runs.config(folder, "whole", micro_batch=1)
    killed = replace(config, out=str(folder / "killed"))
    plain = runs.config(folder, "plain-2", model=str(folder / "plain"), steps=2)
    run_pairs(("run", config), ("kill", killed), ("run", killed), ("run", plain))
    one, other = state(folder / "whole"), state(folder / "killed")
    assert runs.same(one, other) and len(one) > 50
    models = [load_file(folder / name / "model" / "model.safetensors") for name in ("whole", "killed")]
    assert runs.same(*models)
    train(replace(plain, out=str(folder / "plain-1")))
    spread = state(folder / "plain-2", 2)
    for name, weight in load_file(folder / "plain-1" / "model" / "model.safetensors").items():
        torch.testing.assert_close(spread[f"model.{name}"], weight, rtol=1e-3, atol=2e-4)


def test_alone_there_is_nothing_to_agree_on():
    with distributed.join("cpu") as world:
        assert (world.rank, world.size, world.is_first) == (0, 1, True)
        assert world.first_error(None) is None
        assert world.first_error(ValueError("x")) == "ValueError: x"
        assert world.sum(torch.ones(2)).tolist() == [1, 1]
        world.wait()


def test_a_device_that_is_not_here_is_refused():
    with (
        pytest.raises(ArgumentError, match="device: expected a device of this machine, got 'tpu9'"),
        distributed.join("tpu9"),
    ):
        pass


@pytest.mark.slow
def test_torchrun_kills_and_resumes(tmp_path):
    folder = runs.prepare(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command += [str(Path(sys.executable).parent / "hasten"), "train", str(folder / "model"), "--device", "cpu"]
    command += ["--data", str(folder / "data"), "--seqlen", "16", "--batch", "4", "--save-every", "2", "--lr", "0.01"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(out, *more):
        return subprocess.Popen([*command, "--out", str(folder / out), *more], env=environment)

    assert run("whole", "--steps", "8").wait(timeout=200) == 0
    going = run("killed", "--steps", "8")
    while not any((folder / "killed").glob("checkpoints/step-*")):
        assert going.poll() is None
    going.kill()  # torchrun itself dies at once; its workers see that and end, or go on writing whole checkpoints
    going.wait()
    subprocess.run(["sleep", "5"], check=True)
    assert run("killed", "--steps", "8").wait(timeout=200) == 0
    assert runs.same(state(folder / "whole"), state(folder / "killed"))
