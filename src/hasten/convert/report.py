"""What a conversion did to every tensor, what it checked, and how its folder is written: whole or not at all.

Shared by every converter; knows no architecture.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.errors import ArgumentError, CheckpointError

FILE = "hasten_conversion.json"
KEPT, COPIED, MADE, DROPPED = "kept", "copied", "made", "dropped"


@dataclass(frozen=True)
class Entry:
    """One tensor: `kept` as it was, `copied` (more than once, or in part), `made` anew, or `dropped` from the source.

    source: the tensors it comes from, or the one that was dropped. shape: of the tensor itself. how: in words.
    """

    name: str
    origin: str
    source: str
    shape: tuple[int, ...]
    how: str = ""


@dataclass(frozen=True)
class Check:
    """A self-check: the largest difference found where theory says equal, and what rounding may make of it."""

    name: str
    difference: float
    tolerance: float

    @property
    def has_passed(self) -> bool:
        """True if the difference is a number within the tolerance."""
        return self.difference <= self.tolerance


@dataclass
class Report:
    """What a conversion did: source and target architecture, every tensor, remarks a user should read, checks."""

    source: str
    target: str
    entries: list[Entry] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def add(self, name: str, origin: str, source: str, tensor: Tensor, how: str = "") -> None:
        """Write down one tensor."""
        self.entries.append(Entry(name, origin, source, tuple(tensor.shape), how))

    def count(self, origin: str) -> int:
        """How many tensors have that origin."""
        return sum(entry.origin == origin for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A few lines for people: counts, what is not simply kept (one line for the same in all layers), checks."""
        counts = ", ".join(f"{self.count(origin)} {origin}" for origin in (KEPT, COPIED, MADE, DROPPED))
        lines = [f"{self.source} -> {self.target}: {counts}"]
        alike: dict[tuple[str, str, str], list[Entry]] = {}
        for entry in self.entries:
            if entry.origin != KEPT:
                alike.setdefault((_any_layer(entry.name), entry.origin, entry.how), []).append(entry)
        for (name, origin, how), entries in alike.items():
            times = f" ({len(entries)} layers)" if len(entries) > 1 else ""
            lines.append(f"  {origin:7} {name}{times} {'x'.join(map(str, entries[0].shape))}{how and ': ' + how}")
        lines += [f"  note    {remark}" for remark in self.remarks]
        for check in self.checks:
            verdict = "equal" if check.has_passed else "NOT EQUAL"
            numbers = f"largest difference {check.difference:.1e}, allowed {check.tolerance:.1e}"
            lines.append(f"  check   {check.name}: {verdict} ({numbers})")
        return lines

    def expect_passed(self) -> None:
        """Raise CheckpointError if a self-check failed."""
        for check in self.checks:
            if not check.has_passed:
                problem = f"self-check failed: {check.name} differs by {check.difference:.1e} (> {check.tolerance:.1e})"
                raise CheckpointError(self.target, problem, "nothing was written; please report this model")


def _any_layer(name: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def expect_free(out: str | Path, *, overwrite: bool) -> Path:
    """The output folder as a path; raises ArgumentError if it exists and may not be replaced, before any work."""
    folder = Path(out).expanduser()
    if folder.exists() and not overwrite:
        raise ArgumentError("OUT", "a folder that does not exist yet", str(out), "choose another, or pass --overwrite")
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))):
        hint = "only a checkpoint or an empty folder is replaced"
        raise ArgumentError("OUT", "a checkpoint to overwrite", str(out), hint)
    if not folder.absolute().parent.is_dir():
        raise ArgumentError("OUT", "a folder inside one that exists", str(out), "create the outer folder first")
    return folder


@contextmanager
def writing(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write a checkpoint into, which becomes `out` when the block ends and never before.

    Until then it stands beside `out` under a hidden name; an exception or Ctrl-C removes it, and what stood
    at `out` is untouched. A killed process leaves the hidden folder and no `out`.
    """
    folder = expect_free(out, overwrite=overwrite)
    parent = folder.absolute().parent
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        _flush(partial)
        expect_free(folder, overwrite=overwrite)
        if folder.exists():
            old = partial.with_suffix(".old")
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save(model: Any, tokenizer: Any, report: Report, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write model, tokenizer (or None) and report as a checkpoint folder, whole or not at all; returns its path."""
    with writing(out, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        text = json.dumps(report.to_dict(), indent=1)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")
    return Path(out).expanduser()


def _flush(folder: Path) -> None:
    """Have the disk hold what is written, so that not even a power cut leaves a checkpoint of zeros."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _umask() -> int:
    """The mask of new files: mkdtemp makes private folders, a checkpoint is as readable as others are."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
