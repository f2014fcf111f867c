"""The log of a run: JSON lines in the run folder, and TensorBoard's files where it is installed and asked for.

A resumed run continues its log at the step it resumes from: what was logged beyond is dropped, and comes again.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

from hasten.errors import ArgumentError
from hasten.train.events import Evaluated, Event, Finished, Saved, Stepped
from hasten.train.files import write_whole

NAME = "log.jsonl"


class Log:
    """Appends events of a step to `log.jsonl` below a folder; each line has the `kind` of its event."""

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False) -> None:
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            hint = "run: pip install tensorboard; the log is in log.jsonl as well"
            raise ArgumentError("tensorboard", "an installed tensorboard", "none", hint)
        self._path = folder / NAME
        kept = [line for line in read(folder) if line["step"] <= step and line["kind"] != "finished"]
        if self._path.exists():
            write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self._path.open("a")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # an optional library

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, event: Event) -> None:
        """Log an event that has a step; others are for the eye only."""
        if not isinstance(event, Stepped | Evaluated | Saved | Finished):
            return
        values = dataclasses.asdict(event)
        self._file.write(json.dumps({"kind": type(event).__name__.lower(), **values}) + "\n")
        self._file.flush()
        if self._board is not None and isinstance(event, Stepped | Evaluated):
            group = "train" if isinstance(event, Stepped) else "eval"
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(f"{group}/{name}", value, event.step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that was cut short by a kill is left out. Empty if there is none."""
    if not (folder / NAME).is_file():
        return []
    found = []
    for line in (folder / NAME).read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
