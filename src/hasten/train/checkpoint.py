"""Checkpoints of a run: written whole or not at all, read back to the bit; the last good one always stands.

One process writes safetensors in a folder that transformers can load as it is; many write shards by
torch.distributed.checkpoint. Called by the loop; knows no data beyond the number of rows taken.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.errors import CheckpointError
from hasten.train import randomness
from hasten.train.distributed import World
from hasten.train.files import is_full, publish, remove_folder, remove_partial
from hasten.train.optimizer import MOMENTS, Weights

_NAME = re.compile(r"step-(\d{9})$")
_STATE, _WEIGHTS, _OPTIMIZER, _SHARDS = "state.json", "model.safetensors", "optimizer.safetensors", "shards"
_UNREADABLE = (OSError, ValueError, KeyError, SafetensorError, RuntimeError)


@dataclass(frozen=True)
class Subject:
    """What a checkpoint is of: the model, the weights that are trained, the optimizer; and who saves beside them.

    beside: writes what makes the folder a model of transformers (configuration, tokenizer).
    """

    model: Any
    weights: Weights
    optimizer: torch.optim.Optimizer
    identity: str
    beside: Callable[[Path], None] = lambda folder: None

    def model_tensors(self) -> dict[str, Tensor]:
        """Trained and frozen weights and lasting buffers, by the model's names; tied ones once."""
        found = {name: one.detach() for name, one in self.model.named_parameters()}
        found |= {name: one.detach() for name, one in self.weights.trained.items()}
        lasting = set(self.model.state_dict())
        return found | {name: one for name, one in self.model.named_buffers() if name in lasting}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts, as `exp_avg.<weight>` and so on."""
        state = self.optimizer.state
        return {
            f"{key}.{name}": state[one][key] for name, one in self.weights.trained.items() for key in (*MOMENTS, "step")
        }


class Checkpoints:
    """The checkpoints of a run folder, `step-000000100` and so on; all processes call the same methods."""

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        if world.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            remove_partial(folder)
        world.wait()

    def steps(self) -> list[int]:
        """Steps of which there is a whole checkpoint, from the first to the last."""
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.match(path.name)))

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        return self.folder / f"step-{step:09d}"

    def save(self, step: int, rows_taken: int, subject: Subject) -> Path:
        """Write a checkpoint and then remove the oldest beyond `keep`.

        Raises CheckpointError in every process if it could not be written in any; those before it are untouched.
        """
        path = self.path(step)
        partial = path.with_name(f".{path.name}.partial")
        record = {"step": step, "rows_taken": rows_taken, "world": self.world.size, "identity": subject.identity}
        with self._together(step, partial):
            if self.world.is_first:
                partial.mkdir()
                (partial / _STATE).write_text(json.dumps(record | {"torch": str(torch.__version__)}))
                subject.beside(partial)
        with self._together(step, partial):
            self._write(partial, subject)
            state = json.dumps(randomness.capture(self.world.device))
            (partial / f"random-{self.world.rank}.json").write_text(state)
        with self._together(step, partial):
            if self.world.is_first:
                remove_folder(path)  # a damaged one of the same step, which was passed over
                publish(partial, path)
        if self.world.is_first:
            for old in self.steps()[: -self.keep]:
                remove_folder(self.path(old))
        return path

    def load(self, subject: Subject, warn: Callable[[str], None]) -> tuple[int, int]:
        """Read the last checkpoint that can be read into the subject; returns (step, rows taken), (0, 0) if none.

        warn is told of a damaged one that was passed over. Raises CheckpointError for one of another model or
        another kind of run, and if there are some but all of them are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            error: BaseException | None = None
            record: dict[str, Any] = {}
            try:
                record = json.loads((self.path(step) / _STATE).read_text())
                self._expect_ours(record, subject, self.path(step))
                self._read(self.path(step), subject)
                self._restore_random(step, record, warn)
            except _UNREADABLE as caught:
                error = caught
            problem = self.world.first_error(error)
            if problem is None:
                subject.weights.publish()
                return int(record["step"]), int(record["rows_taken"])
            warn(f"{self.path(step).name} cannot be read ({problem.splitlines()[0][:200]}); the one before it is taken")
        if steps:
            raise CheckpointError(self.folder, "no checkpoint can be read", "begin a new run in another folder")
        return 0, 0

    def _write(self, partial: Path, subject: Subject) -> None:
        if self.world.size == 1:
            save_file(_contiguous(subject.model_tensors()), partial / _WEIGHTS, metadata={"format": "pt"})
            save_file(_contiguous(subject.optimizer_tensors()), partial / _OPTIMIZER)
            return
        from torch.distributed.checkpoint.state_dict_saver import save  # seconds to load, only for many processes

        save(_sharded(subject), checkpoint_id=partial / _SHARDS)

    def _read(self, path: Path, subject: Subject) -> None:
        if self.world.size == 1:
            _read_into(path / _WEIGHTS, subject.model_tensors())
            _read_into(path / _OPTIMIZER, subject.optimizer_tensors())
            return
        from torch.distributed.checkpoint.state_dict_loader import load  # as above

        load(_sharded(subject), checkpoint_id=path / _SHARDS)

    def _expect_ours(self, record: dict[str, Any], subject: Subject, path: Path) -> None:
        if record["identity"] != subject.identity:
            raise CheckpointError(path, "it is of another model", "give another --out, or the model it was begun with")
        if (record["world"] == 1) != (self.world.size == 1):
            problem = f"it was saved by {record['world']} processes, this run has {self.world.size}"
            raise CheckpointError(path, problem, "resume with as many, or begin a new run from its weights")

    def _restore_random(self, step: int, record: dict[str, Any], warn: Callable[[str], None]) -> None:
        if record["world"] == self.world.size:
            state = json.loads((self.path(step) / f"random-{self.world.rank}.json").read_text())
            randomness.restore(state, self.world.device)
        elif self.world.is_first:
            warn(f"saved by {record['world']} processes, resumed by {self.world.size}: random numbers will differ")

    @contextmanager
    def _together(self, step: int, partial: Path) -> Iterator[None]:
        """Run a part of saving in every process; if it fails in any, clear away and raise in all."""
        error: BaseException | None = None
        try:
            yield
        except _UNREADABLE as caught:
            error = caught
        except Exception as caught:  # torch.distributed.checkpoint wraps what happened in a class of its own
            if self.world.size == 1:
                raise
            error = caught
        problem = self.world.first_error(error)
        if problem is None:
            return
        if self.world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        self.world.wait()
        why = "the disk is full" if is_full(OSError(problem)) else problem.splitlines()[0][:200]
        stands = f"the one of step {self.steps()[-1]} stands" if self.steps() else "there is none before it"
        hint = f"{stands}; free some room, then resume by the same command"
        raise CheckpointError(partial.parent, f"step {step} was not saved: {why}", hint) from error


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.contiguous() for name, one in tensors.items()}


def _sharded(subject: Subject) -> dict[str, Any]:
    return {
        **{f"model.{name}": one for name, one in subject.model_tensors().items()},
        **{f"optimizer.{name}": one for name, one in subject.optimizer_tensors().items()},
    }


@torch.no_grad()
def _read_into(path: Path, tensors: dict[str, Tensor]) -> None:
    """Copy every tensor of a file into the one of its name; raises ValueError unless names and shapes agree."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != set(tensors):
            odd = sorted(names ^ set(tensors))
            raise ValueError(f"{len(odd)} tensors on one side only, the first is {odd[0]}")
        for name, tensor in tensors.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(tensor.shape):
                raise ValueError(f"{name} has shape {shape}, expected {tuple(tensor.shape)}")
            tensor.copy_(file.get_tensor(name))
