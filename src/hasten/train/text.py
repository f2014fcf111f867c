"""Documents from local files: plain text, one a file; JSON lines, one a line. Refuses what is not text, by name.

Called when a run's tokens are prepared. Knows no tokenizer and no model.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from hasten.errors import ArgumentError

TOKEN_SUFFIXES = (".bin", ".npy")
LINE_SUFFIXES = (".jsonl", ".ndjson")


def find_files(paths: Sequence[str], include: str) -> list[Path]:
    """The files at `paths` in a fixed order: files as given, folders with all below that `include` matches, sorted.

    include: a shell pattern of the file's name. Files that begin with a dot, and empty ones in a folder, are
    left out. Raises ArgumentError for a path that is not there or holds nothing, and where token files and text mix.
    """
    found: list[Path] = []
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            below = [one for one in sorted(path.rglob("*")) if _is_wanted(one, path, include)]
            if not below:
                got = f"no file that is not empty and matches {include!r} in {path}"
                raise ArgumentError("data", "a folder with data", got, "check the path and --include")
            found += below
        elif path.is_file():
            if path.stat().st_size == 0:
                raise ArgumentError("data", "a file with data", f"{path}, which is empty", "check how it was written")
            found.append(path)
        else:
            raise ArgumentError("data", "a file or a folder", f"{path}, which is not there", "check the path")
    kinds = {path.suffix in TOKEN_SUFFIXES for path in found}
    if len(kinds) > 1:
        raise ArgumentError("data", "text or token files", "both", "make token files of the text, or leave one out")
    return found


def documents(files: Sequence[Path], text_field: str) -> Iterator[str]:
    """The documents of text files and JSON lines, in order, none of them empty.

    Raises ArgumentError that names the file, and the line or byte, for what is not UTF-8, is binary, is not JSON
    or lacks the field.
    """
    for path in files:
        text = _decode(path)
        if path.suffix in LINE_SUFFIXES:
            yield from _lines(path, text, text_field)
        elif text.strip():
            yield text


def _is_wanted(path: Path, root: Path, include: str) -> bool:
    is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not is_hidden and fnmatch.fnmatch(path.name, include) and path.is_file() and path.stat().st_size > 0


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    place = raw.find(b"\0")
    if place >= 0:
        hint = "leave it out by --include, such as '*.txt'; give tokens as .bin or .npy; save UTF-16 text as UTF-8"
        raise ArgumentError("data", "text", f"{path}, which is binary (a NUL at byte {place})", hint)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "save it as UTF-8 (iconv -f latin1 -t utf-8), or leave it out by --include"
        raise ArgumentError("data", "text in UTF-8", f"{path}, which is not at byte {error.start}", hint) from error


def _lines(path: Path, text: str, text_field: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ArgumentError("data", "JSON on each line", f"{path}:{number}: {error}", "mend the line") from error
        if not isinstance(value, dict) or not isinstance(value.get(text_field), str):
            keys = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            hint = "name the field that holds the text: --text-field NAME"
            raise ArgumentError("data", f"a text {text_field!r} on each line", f"{path}:{number}: {keys}", hint)
        if value[text_field].strip():
            yield value[text_field]
