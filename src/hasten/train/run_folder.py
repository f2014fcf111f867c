"""The folder of a run: its settings, its tokens, its checkpoints, its log, and at the end its model.

Answers whether a folder may be used, and which files lie where. Called by the loop.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.errors import CheckpointError
from hasten.train.config import TrainConfig, decisive, to_dict
from hasten.train.distributed import World
from hasten.train.files import whole_folder, write_whole
from hasten.train.model import Loaded
from hasten.train.tokens import Tokens, open_tokens, prepare

SETTINGS = "settings.json"
_BEFORE_SETTINGS = ("data", "checkpoints", "converted", ".lock")


class RunFolder:
    """`out` of a configuration. All processes make one; only the first writes."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.path = Path(config.out).expanduser()
        self.config, self.world = config, world
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        if world.is_first:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(self.path, f"cannot be made: {error.strerror}", "choose another --out") from error

    def expect_ours(self, identity: str) -> None:
        """Raise CheckpointError if the folder holds something else, or a run with settings that give other weights."""
        file = self.path / SETTINGS
        if not file.is_file():
            strange = [one.name for one in self.path.iterdir() if one.name not in _BEFORE_SETTINGS]
            if strange:
                problem = f"is no run folder, and not empty ({sorted(strange)[0]})"
                raise CheckpointError(self.path, problem, "choose another --out")
            return
        try:
            written = json.loads(file.read_text())
            before, model = written["decisive"], written["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(file, f"cannot be read: {error}", "choose another --out") from error
        if model != identity:
            hint = "choose another --out, or give the model it was begun with"
            raise CheckpointError(self.path, f"is the run of another model ({before.get('model')})", hint)
        now = json.loads(json.dumps(decisive(self.config)))
        differs = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differs:
            listed = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in differs[:4])
            raise CheckpointError(self.path, f"was begun with other settings: {listed}", "repeat them to resume")

    def tokens(self, tokenizer: Any, vocab_size: int, identity: str) -> tuple[Tokens, Tokens | None]:
        """(training, evaluation) tokens, made if they are not there; then the settings are written."""
        data, evaluation = self.config.data, None
        error: BaseException | None = None
        name = eval_name(self.config)
        if self.config.eval_data:
            evaluation = replace(data, paths=self.config.eval_data)
        folder = self.path / "data"
        if self.world.is_first:
            try:
                if not (self.path / SETTINGS).is_file():
                    shutil.rmtree(folder, ignore_errors=True)  # of a beginning that failed, perhaps with other settings
                prepare(data, tokenizer, vocab_size, folder, "train")
                if evaluation is not None:
                    prepare(evaluation, tokenizer, vocab_size, folder, name)
                written = {"decisive": decisive(self.config), "identity": identity, "settings": to_dict(self.config)}
                write_whole(self.path / SETTINGS, json.dumps(written, indent=1).encode())
            except Exception as caught:  # noqa: BLE001 - raised again below, when no process waits any more
                error = caught
        problem = self.world.first_error(error)
        if error is not None:
            raise error
        if problem is not None:
            raise CheckpointError(folder, f"tokens could not be made: {problem}", "see the first process")
        return open_tokens(folder, "train"), None if evaluation is None else open_tokens(folder, name)

    def export(self, loaded: Loaded, state: dict[str, Any]) -> Path:
        """Write the trained model as transformers does, in the place of an earlier one; returns its folder.

        state: all its weights, in the dtype that the checkpoint had which it began from.
        """
        with whole_folder(self.model) as folder:
            loaded.model.save_pretrained(folder, state_dict=state)
            loaded.model.config.dtype = loaded.dtype
            describe(loaded, folder)
        return self.model


def eval_name(config: TrainConfig) -> str:
    """What the tokens to evaluate on are called in `data`: they may change from one resumption to the next."""
    evaluation = replace(config.data, paths=config.eval_data or config.data.paths)
    return "eval-" + hashlib.sha256(json.dumps(to_dict(evaluation)).encode()).hexdigest()[:8]


def describe(loaded: Loaded, folder: Path) -> None:
    """Write what makes a folder of weights a model: configuration, tokenizer, the code of a carried class."""
    loaded.model.config.save_pretrained(folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    if getattr(loaded.model.config, "auto_map", None):
        for file in loaded.folder.glob("*.py"):
            shutil.copyfile(file, folder / file.name)
