"""Where pieces are kept: host memory before a folder on disk, and how fast each gives them back.

Searches compare tokens, and go through both at once. Saving to disk is done by a thread of its own. Called by kept.py;
knows no engine.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from hasten.cache.nodes import num_shared
from hasten.cache.pieces import PIECE_TOKENS, Piece
from hasten.cache.store import DiskStore

_SMOOTHING = 0.3  # how much the last measurement counts


@dataclass(frozen=True)
class Found:
    """num_tokens of a prompt are in these pieces, in order; of the last perhaps only the first. nbytes: of them."""

    keys: tuple[str, ...] = ()
    num_tokens: int = 0
    nbytes: int = 0
    is_on_disk: bool = False


class HostTier:
    """Pieces in host memory, at most `max_bytes` of them; the least recently used go first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._pieces: OrderedDict[str, Piece] = OrderedDict()
        self._behind: dict[str, set[str]] = {}

    def children(self, parent: str) -> list[Piece]:
        """The pieces behind a parent."""
        return [self._pieces[key] for key in self._behind.get(parent, ())]

    def load(self, key: str) -> Piece | None:
        """A piece, now the last used."""
        piece = self._pieces.get(key)
        if piece is not None:
            self._pieces.move_to_end(key)
        return piece

    def put(self, piece: Piece) -> None:
        """Keep a piece; fewer tokens behind the same parent, that it has too, go."""
        if piece.nbytes > self.max_bytes:
            return
        for other in self.children(piece.parent):
            if piece.tokens[: len(other.tokens)] == other.tokens:
                self._drop(other.key)
        self._pieces[piece.key] = piece
        self._behind.setdefault(piece.parent, set()).add(piece.key)
        self.nbytes += piece.nbytes
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._pieces)))

    def clear(self) -> None:
        """Forget everything."""
        for key in list(self._pieces):
            self._drop(key)

    def _drop(self, key: str) -> None:
        piece = self._pieces.pop(key)
        self.nbytes -= piece.nbytes
        self._behind[piece.parent].discard(key)
        if not self._behind[piece.parent]:
            del self._behind[piece.parent]


class Tiers:
    """Host memory and disk as one, for any thread."""

    def __init__(self, host: HostTier | None, disk: DiskStore | None) -> None:
        self.host, self.disk = host, disk
        self.bytes_per_s: float | None = None  # of what came from disk, with its checks
        self._lock = threading.RLock()
        self._known: dict[str, int] = {}
        self._queue: SimpleQueue[Piece | None] = SimpleQueue()
        self._writer: threading.Thread | None = None

    def knows(self, key: str, num_pages: int) -> bool:
        """True if a piece with at least so many pages was given to `put` before."""
        return self._known.get(key, -1) >= num_pages

    def put(self, piece: Piece) -> None:
        """Keep a piece; what goes to disk is written later."""
        with self._lock:
            self._known[piece.key] = piece.num_pages
            if self.host is not None:
                self.host.put(piece)
            if self.disk is not None:
                if self._writer is None:
                    self._writer = threading.Thread(target=self._write, name="hasten-prompt-cache", daemon=True)
                    self._writer.start()
                self._queue.put(piece)

    def find(self, root: str, tokens: Sequence[int], limit: int) -> Found:
        """The longest prefix of at most `limit` tokens."""
        parent, start = root, 0
        keys: list[str] = []
        nbytes, is_on_disk = 0, False
        with self._lock:
            while start < limit:
                wanted = tuple(tokens[start : min(start + PIECE_TOKENS, limit)])
                offers = [(one.tokens, one.key, one.nbytes, False) for one in self._in_host(parent)]
                if self.disk is not None and not any(wanted == one[0] for one in offers):
                    found = self.disk.children(parent, wanted[0])
                    offers += [(one.tokens, one.key, one.nbytes, True) for one in found]
                if not offers:
                    break
                shared, best = max(
                    ((num_shared(one[0], wanted), one) for one in offers), key=lambda pair: (pair[0], not pair[1][3])
                )
                if not shared:
                    break
                keys.append(best[1])
                nbytes += best[2] * shared // len(best[0])
                is_on_disk |= best[3]
                start, parent = start + shared, best[1]
                if shared < PIECE_TOKENS:
                    break
        return Found(tuple(keys), start, nbytes, is_on_disk)

    def load(self, keys: Sequence[str]) -> list[Piece]:
        """The pieces, as far as they are there one after the other; what comes from disk goes to host memory too."""
        found: list[Piece] = []
        for key in keys:
            piece = self._load(key)
            if piece is None:
                break
            found.append(piece)
        if self.disk is not None and found:
            self.disk.touch([one.key for one in found])
        return found

    def flush(self) -> None:
        """Wait until all that was given is on disk."""
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is not None:
            self._queue.put(None)
            writer.join()

    def close(self) -> None:
        """Write what is waiting, and let go of the folder."""
        self.flush()
        if self.disk is not None:
            self.disk.close()

    def measure(self, key: str) -> None:
        """Write down how fast a piece comes back from disk."""
        if self.disk is not None:
            self._from_disk(key)

    def _in_host(self, parent: str) -> list[Piece]:
        return [] if self.host is None else self.host.children(parent)

    def _load(self, key: str) -> Piece | None:
        with self._lock:
            piece = None if self.host is None else self.host.load(key)
        if piece is None and self.disk is not None:
            piece = self._from_disk(key)
            if piece is not None and self.host is not None:
                with self._lock:
                    self.host.put(piece)
        return piece

    def _from_disk(self, key: str) -> Piece | None:
        assert self.disk is not None, "no disk to load from"
        begin = time.perf_counter()
        piece = self.disk.load(key)
        if piece is not None:
            speed = piece.nbytes / max(1e-9, time.perf_counter() - begin)
            before = speed if self.bytes_per_s is None else self.bytes_per_s
            self.bytes_per_s = before + _SMOOTHING * (speed - before)
        return piece

    def _write(self) -> None:
        assert self.disk is not None, "no disk to write to"
        while (piece := self._queue.get()) is not None:
            self.disk.put(piece)


__all__ = ["Found", "HostTier", "Tiers"]
