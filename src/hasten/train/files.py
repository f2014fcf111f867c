"""Files that are there as a whole or not at all, also after a power cut; and a lock that dies with its process.

Everything a run writes goes through here. Knows no model and no format.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hasten.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` in the place of a file: a reader sees the old one or the new one, never a part."""
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when the block ends well; if not, nothing of it remains."""
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        remove_folder(path)
        publish(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def publish(beside: Path, path: Path) -> None:
    """Bring every file of a filled folder to the disk, then give it its name in one step."""
    for file in sorted(one for one in beside.rglob("*") if one.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(beside)
    os.rename(beside, path)
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder so that no part of it can be taken for a whole one."""
    with suppress(FileNotFoundError):
        gone = path.with_name(f".{path.name}.gone.partial")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove what a process left that died while it wrote."""
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)
        with suppress(FileNotFoundError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Tell whether writing failed for want of room, also where a library wrapped the error."""
    text = str(error).lower()
    is_wrapped = any(f"{word} {number}" in text for number in _FULL for word in ("[errno", "os error"))
    return (isinstance(error, OSError) and error.errno in _FULL) or is_wrapped


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; raises CheckpointError while another trains in it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(folder, "another process trains in it", "wait for it, or choose another") from error
        yield
