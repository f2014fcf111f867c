"""Pieces: runs of pages that are kept outside of an engine, in host memory or in a file of their own.

A piece holds the tokens behind those of its parent, and K and V of their pages; its key stands for the model, the
tenant and every token up to its end. Files are safetensors. Knows no folder and no engine.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hasten.errors import HastenError

PIECE_TOKENS = 256
FORMAT = "hasten-prompt-cache-1"


class Damaged(HastenError):
    """A piece is not what it was when it was written."""


@dataclass(frozen=True, eq=False)
class Piece:
    """K and V of `tokens`, which come after `start` others.

    pages: for each kind of layer, which pages of the piece are there (of layers with a window not all are), and for
    each tensor of its pool what they hold, (pages, layers, page_size, ...), as in `PagedCache.pools`.
    """

    parent: str
    start: int
    tokens: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]
    pages: tuple[tuple[Tensor, ...], ...] = field(repr=False)

    @property
    def key(self) -> str:
        """What it is called."""
        return key_of(self.parent, self.tokens)

    @property
    def num_pages(self) -> int:
        """Pages that are there, of all kinds."""
        return sum(map(len, self.places))

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return sum(one.nbytes for some in self.pages for one in some)


def root_of(fingerprint: str, salt: str | None) -> str:
    """The parent of the first pieces of a tenant; None is public. Nothing of the salt itself can be read from it."""
    whose = "public" if salt is None else "salt:" + salt
    return hashlib.sha256(f"{FORMAT}\0{fingerprint}\0{whose}".encode()).hexdigest()


def key_of(parent: str, tokens: Sequence[int]) -> str:
    """The key of a piece with these tokens behind a parent."""
    return hashlib.sha256(parent.encode() + to_bytes(tokens)).hexdigest()


def to_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as bytes, 4 each."""
    return array("i", tokens).tobytes()


def from_bytes(data: bytes) -> tuple[int, ...]:
    """The token ids of `to_bytes`."""
    found = array("i")
    found.frombytes(data)
    return tuple(found)


def dump(piece: Piece) -> bytes:
    """A piece as the bytes of a safetensors file."""
    tensors = {"tokens": torch.tensor(piece.tokens, dtype=torch.int32)}
    for kind, (places, some) in enumerate(zip(piece.places, piece.pages, strict=True)):
        tensors[f"{kind}.places"] = torch.tensor(places, dtype=torch.int32)
        tensors |= {f"{kind}.{number}": one.contiguous() for number, one in enumerate(some)}
    about = {"format": FORMAT, "parent": piece.parent, "start": str(piece.start), "kinds": str(len(piece.places))}
    data: bytes = safetensors.torch.save(tensors, about)
    return data


def parse(data: bytes) -> Piece:
    """The piece of those bytes. Raises Damaged for anything else."""
    try:
        size = int.from_bytes(data[:8], "little")
        about: Mapping[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
        tensors = safetensors.torch.load(data)
        if about["format"] != FORMAT:
            raise Damaged(f"piece: format {about['format']!r}, not {FORMAT!r}")
        places, pages = [], []
        for kind in range(int(about["kinds"])):
            places.append(tuple(tensors[f"{kind}.places"].tolist()))
            count = sum(name.startswith(f"{kind}.") for name in tensors) - 1
            pages.append(tuple(tensors[f"{kind}.{number}"] for number in range(count)))
        tokens = tuple(tensors["tokens"].tolist())
        return Piece(about["parent"], int(about["start"]), tokens, tuple(places), tuple(pages))
    except (ValueError, KeyError, SafetensorError, OverflowError, UnicodeDecodeError, TypeError) as error:
        raise Damaged(f"piece: not a whole file of K and V: {type(error).__name__}") from error


__all__ = ["FORMAT", "PIECE_TOKENS", "Damaged", "Piece", "dump", "from_bytes", "key_of", "parse", "root_of", "to_bytes"]
