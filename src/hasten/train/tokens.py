"""The tokens of a run on disk: made once from text into the run folder, or the user's own token files as they lie.

A table says where each document is. Opened again on resumption, so that a run never depends on whether the text is
still the same. Called by the loop; knows no batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hasten.errors import ArgumentError, CheckpointError
from hasten.train.config import DataConfig
from hasten.train.files import is_full, sync_folder, write_whole
from hasten.train.text import TOKEN_SUFFIXES, documents, find_files

_AT_ONCE = 1 << 24  # tokens looked at in one go


@dataclass(frozen=True)
class Tokens:
    """Token files and where documents lie in them.

    arrays: one-dimensional arrays of token ids, usually mapped from disk. table: int64 (num_documents, 3), for
    each document its array, its first token and its length, which is at least 1.
    """

    arrays: tuple[np.ndarray[Any, Any], ...]
    table: np.ndarray[Any, Any]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.table[:, 2].sum())


def prepare(config: DataConfig, tokenizer: Any, vocab_size: int, folder: Path, name: str) -> None:
    """Write `name`.json, the table and, for text, the tokens into `folder`, unless they are there already.

    tokenizer: of transformers, or None where the data are token files. Each document of text is the tokenizer's
    first special token (if it puts one), its tokens, its end-of-text token (if it has one). Raises ArgumentError for
    data that cannot be used.
    """
    if (folder / f"{name}.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = find_files(config.paths, config.include)
    if files[0].suffix in TOKEN_SUFFIXES:
        made = [_look(path, config, vocab_size, tokenizer) for path in files]
        entries = [entry for entry, _ in made]
        rows = [np.insert(spans, 0, number, axis=1) for number, (_, spans) in enumerate(made)]
        table = np.concatenate(rows)
    else:
        try:
            entry, table = _tokenize(files, config, tokenizer, vocab_size, folder / f"{name}.bin")
        except OSError as error:
            if not is_full(error):
                raise
            (folder / f"{name}.bin").unlink()
            raise CheckpointError(folder, "no room for the tokens of the text", "free some, then repeat") from error
        entries = [entry]
    with (folder / f"{name}.npy").open("wb") as file:
        np.save(file, table)
    record = {"files": entries, "num_tokens": int(table[:, 2].sum()), "num_documents": len(table)}
    sync_folder(folder)
    write_whole(folder / f"{name}.json", json.dumps(record, indent=1).encode())


def open_tokens(folder: Path, name: str) -> Tokens:
    """What `prepare` made. Raises CheckpointError if a token file is gone or has another size than it had."""
    record = json.loads((folder / f"{name}.json").read_text())
    arrays = []
    for entry in record["files"]:
        path = folder / entry["path"]  # an absolute path stays itself
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            problem = f"is not as it was when the run began ({entry['bytes']} bytes)"
            raise CheckpointError(path, problem, "put it back, or begin a new run")
        arrays.append(_map(path, entry["dtype"]))
    return Tokens(tuple(arrays), np.load(folder / f"{name}.npy"))


def _map(path: Path, dtype: str) -> np.ndarray[Any, Any]:
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    return np.memmap(path, dtype=dtype, mode="r")


def _look(path: Path, config: DataConfig, vocab_size: int, tokenizer: Any) -> tuple[dict[str, Any], Any]:
    """(entry, spans int64 (num_documents, 2) of (first, length)) of a user's token file."""
    dtype = config.token_dtype
    dtype = ("uint16" if vocab_size <= 1 << 16 else "uint32") if dtype == "auto" else dtype
    try:
        array = _map(path, dtype)
    except ValueError as error:  # numpy's word for a size that is no multiple, an odd header, and nothing at all
        hint = "write it with numpy.save, or as raw uint16 or uint32 named .bin (see --token-dtype)"
        raise ArgumentError("data", f"a token file of {dtype}", f"{path}: {error}", hint) from error
    if array.ndim != 1 or array.dtype.kind not in "ui" or array.size == 0:
        got = f"{path}, {array.dtype} of shape {array.shape}"
        raise ArgumentError("data", "a one-dimensional array of token ids", got, "flatten it and save it again")
    separator = config.separator
    if separator is None and tokenizer is not None:
        separator = tokenizer.eos_token_id
    ends = []
    for begin in range(0, array.size, _AT_ONCE):
        part = array[begin : begin + _AT_ONCE]
        if int(part.max()) >= vocab_size or int(part.min()) < 0:
            got = f"{int(part.max())} in {path}"
            hint = "is it of another tokenizer, or of another width? (--token-dtype)"
            raise ArgumentError("data", f"token ids from 0 to {vocab_size - 1}", got, hint)
        if separator is not None:
            ends.append(np.flatnonzero(part == separator) + begin + 1)
    bounds = np.unique(np.concatenate([[0], *ends, [array.size]])).astype(np.int64)
    entry = {"path": str(path.resolve()), "bytes": path.stat().st_size, "dtype": str(array.dtype)}
    return entry, np.stack([bounds[:-1], np.diff(bounds)], axis=1)


def _tokenize(
    files: Sequence[Path], config: DataConfig, tokenizer: Any, vocab_size: int, target: Path
) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """(entry, table) of the tokens of text, written to `target`."""
    if tokenizer is None:
        raise ArgumentError("tokenizer", "one for text", "none beside the model", "give --tokenizer FOLDER")
    dtype = np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32")
    lengths = []
    with target.open("wb") as file:
        for ids in _encoded(documents(files, config.text_field), tokenizer):
            if max(ids) >= vocab_size:
                hint = "the tokenizer belongs to another model; give --tokenizer FOLDER"
                raise ArgumentError("tokenizer", f"ids below the model's {vocab_size}", max(ids), hint)
            file.write(np.array(ids, dtype=dtype).tobytes())
            lengths.append(len(ids))
    if not lengths:
        raise ArgumentError("data", "text", f"{len(files)} files with white space only", "check the files")
    length = np.array(lengths, dtype=np.int64)
    table = np.stack([np.zeros_like(length), length.cumsum() - length, length], axis=1)
    return {"path": target.name, "bytes": target.stat().st_size, "dtype": str(dtype)}, table


def _encoded(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    """Ids of each document with what the tokenizer puts first and its end-of-text token."""
    begins = tokenizer("a")["input_ids"][:1]
    first = begins if begins and begins[0] == tokenizer.bos_token_id else []
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while some := list(islice(texts, 256)):
        for ids in tokenizer(some, add_special_tokens=False)["input_ids"]:
            yield [*first, *ids, *last]
