"""The environment variables hasten reads: all of them, here and nowhere else.

Read by functions at call time, never at import, so that a test or a user can change them in a running
process. Callers: ops (choice of implementation), cache and convert (where files go), doctor (prints the table).
"""

from __future__ import annotations

import os
from pathlib import Path

from hasten.errors import ArgumentError

# name -> one line for `hasten doctor`; a fourth entry needs a decision first (docs/design/layout.md)
VARIABLES = {
    "HASTEN_IMPLEMENTATION": "forces one implementation of every op, as implementation=... does for one call",
    "HASTEN_CACHE": "folder for stored prompt caches and tuned tables (default: ~/.cache/hasten)",
    "HASTEN_NUM_THREADS": "CPU threads the command line gives to PyTorch (default: PyTorch's own choice)",
}


def forced_implementation() -> str | None:
    """Return the implementation name forced for this process, or None when the choice is free.

    The name is checked where implementations are known, by the op that chooses.
    """
    return os.environ.get("HASTEN_IMPLEMENTATION", "").strip() or None


def cache_dir() -> Path:
    """Return the folder for files hasten writes on its own; the folder may not exist yet."""
    chosen = os.environ.get("HASTEN_CACHE", "").strip()
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base) if base else Path.home() / ".cache") / "hasten"


def num_threads() -> int | None:
    """Return the number of CPU threads asked for, or None when nothing was asked.

    Raises ArgumentError when the variable is not a positive integer.
    """
    text = os.environ.get("HASTEN_NUM_THREADS", "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentError("HASTEN_NUM_THREADS", "a positive integer", repr(text), "unset it or write a number")
    return int(text)


def environment() -> dict[str, str | None]:
    """Return every variable hasten reads with its present value; None means unset."""
    return {name: os.environ.get(name) for name in VARIABLES}
