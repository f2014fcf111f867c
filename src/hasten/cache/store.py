"""Prompt caches on disk: a folder with a file for each piece, and an SQLite index that several processes share.

A file is written beside its place, synced, and moved there in the same transaction that names it in the index: what is
in one and not in the other was broken off, and is cleared away when the folder is next opened. Whatever is damaged is
a miss, and is said (`problems`). Knows no model.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hasten.cache import pieces
from hasten.cache.pieces import Damaged, Piece
from hasten.errors import ArgumentError

_TABLES = """
CREATE TABLE IF NOT EXISTS pieces (
    key TEXT PRIMARY KEY, parent TEXT NOT NULL, start INTEGER NOT NULL, tokens BLOB NOT NULL,
    num_pages INTEGER NOT NULL, nbytes INTEGER NOT NULL, digest TEXT NOT NULL,
    created_s REAL NOT NULL, used_s REAL NOT NULL, hits INTEGER NOT NULL, pinned_s REAL NOT NULL);
CREATE INDEX IF NOT EXISTS by_parent ON pieces (parent, substr(tokens, 1, 4));
CREATE INDEX IF NOT EXISTS by_use ON pieces (used_s, start);
CREATE TABLE IF NOT EXISTS pins (
    root TEXT NOT NULL, name TEXT NOT NULL, last TEXT NOT NULL, num_tokens INTEGER NOT NULL, expires_s REAL NOT NULL,
    PRIMARY KEY (root, name));
"""
FOREVER = 1e18  # a time that does not come


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A piece as the index knows it; times are of the clock, in seconds since 1970. nbytes: of its file."""

    key: str
    parent: str
    start: int
    tokens: tuple[int, ...]
    num_pages: int
    nbytes: int
    created_s: float
    used_s: float
    hits: int
    pinned_s: float


@dataclass(frozen=True, kw_only=True)
class StoredPin:
    """A name under which pieces are kept. root: of the model and tenant; last: the key of its last piece."""

    root: str
    name: str
    last: str
    num_tokens: int
    expires_s: float


class DiskStore:
    """Pieces in a folder, which is made if it is not there.

    max_bytes: of all files; the least recently used go first. ttl_s: pieces that nobody used for so long go. Opening
    clears away what broken-off processes left; `problems` says what was lost, one line each.

    Raises ArgumentError for a folder that cannot be used.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        ttl_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self.max_bytes, self.ttl_s, self.clock = Path(folder).expanduser(), max_bytes, ttl_s, clock
        self.problems: list[str] = []
        self._lock = threading.RLock()
        self._files = self.folder / "pieces"
        try:
            self._files.mkdir(parents=True, exist_ok=True)
            self._connection = self._open_index()
            self._clear_away()
        except (OSError, sqlite3.Error) as error:
            hint = "give a folder that can be written, or make room"
            raise ArgumentError("path", "a folder for a prompt cache", f"{self.folder} ({error})", hint) from error

    def close(self) -> None:
        """Let go of the index."""
        with self._lock:
            self._connection.close()

    def children(self, parent: str, token: int) -> list[Entry]:
        """The pieces behind a parent that begin with a token."""
        return self._entries("WHERE parent = ? AND substr(tokens, 1, 4) = ?", parent, pieces.to_bytes([token]))

    def entry(self, key: str) -> Entry | None:
        """A piece by its key."""
        found = self._entries("WHERE key = ?", key)
        return found[0] if found else None

    def entries(self) -> list[Entry]:
        """Every piece, the last used first, parents before children."""
        return self._entries("ORDER BY used_s DESC, start")

    def load(self, key: str) -> Piece | None:
        """A piece, seen to be whole and the one that is meant; None if it is not there (any more)."""
        with self._lock:
            row = self._execute("SELECT digest, parent, start, tokens FROM pieces WHERE key = ?", key).fetchone()
        if row is None:
            return None
        try:
            data = self._path(key).read_bytes()
            if hashlib.sha256(data).hexdigest() != row[0]:
                raise Damaged("its checksum is another")
            piece = pieces.parse(data)
            if (piece.parent, piece.start, piece.tokens, piece.key) != (*row[1:3], pieces.from_bytes(row[3]), key):
                raise Damaged("it holds other tokens")
        except (OSError, Damaged) as error:
            self._lose(key, error)
            return None
        return piece

    def touch(self, keys: Sequence[str]) -> None:
        """These were used now."""
        with self._lock, self._guarded("touch"):
            values = [(self.clock(), key) for key in keys]
            self._connection.executemany("UPDATE pieces SET used_s = ?, hits = hits + 1 WHERE key = ?", values)

    def put(self, piece: Piece) -> bool:
        """Keep a piece, in the place of one with fewer pages; False if it was there or could not be written.

        Fewer tokens behind the same parent, that this one has too, go. A full disk raises nothing: `problems` says it.
        """
        key, data = piece.key, pieces.dump(piece)
        if self.max_bytes is not None and len(data) > self.max_bytes:
            return False
        known = self.entry(key)
        if known is not None and known.num_pages >= piece.num_pages:
            return False
        path = self._path(key)
        draft = path.with_name(f"{key}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with self._lock, self._transaction():
                draft.replace(path)
                self._add(piece, key, data, known)
            self.prune()
        except (OSError, sqlite3.Error) as error:
            draft.unlink(missing_ok=True)
            self.problems.append(
                f"{self.folder}: a prefix of {piece.start + len(piece.tokens):,} tokens not kept: {error}"
            )
            return False
        return True

    def pin(self, root: str, name: str, keys: Sequence[str], num_tokens: int, ttl_s: float | None) -> None:
        """Keep these pieces, in order, by a name, for ttl_s seconds from now or for good."""
        until = FOREVER if ttl_s is None else self.clock() + ttl_s
        with self._lock, self._transaction():
            self._execute("INSERT OR REPLACE INTO pins VALUES (?, ?, ?, ?, ?)", root, name, keys[-1], num_tokens, until)
            self._renew_pins()

    def unpin(self, root: str, name: str) -> bool:
        """Take a name back; False if there is none."""
        with self._lock, self._transaction():
            found = self._execute("DELETE FROM pins WHERE root = ? AND name = ?", root, name).rowcount > 0
            self._renew_pins()
        return found

    def pins(self) -> list[StoredPin]:
        """All pins that are not over."""
        with self._lock:
            rows = self._execute("SELECT * FROM pins WHERE expires_s > ? ORDER BY name", self.clock()).fetchall()
        return [StoredPin(root=a, name=b, last=c, num_tokens=d, expires_s=e) for a, b, c, d, e in rows]

    def verify(self) -> tuple[int, list[str]]:
        """(how many pieces are whole, one line for each that is not); those go, with all that is behind them."""
        before = len(self.problems)
        whole = sum(self.load(entry.key) is not None for entry in self.entries())
        return whole, self.problems[before:]

    def prune(self, max_bytes: int | None = None, ttl_s: float | None = None) -> int:
        """Part with what is too old and too much, by these limits or the store's own; returns how many pieces went."""
        most = self.max_bytes if max_bytes is None else max_bytes
        ttl_s = self.ttl_s if ttl_s is None else ttl_s
        now, gone = self.clock(), 0
        with self._lock, self._transaction():
            if ttl_s is not None:
                gone += self._delete("used_s < ? AND pinned_s < ?", now - ttl_s, now)
            total = self._execute("SELECT COALESCE(SUM(nbytes), 0) FROM pieces").fetchone()[0]
            if most is not None and total > most:
                rows = self._execute(
                    "SELECT key, nbytes FROM pieces WHERE pinned_s < ? ORDER BY used_s, start DESC", now
                )
                for key, nbytes in rows.fetchall():
                    if total <= most:
                        break
                    total -= nbytes
                    gone += self._delete("key = ?", key)
        return gone

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return int(self._execute("SELECT COALESCE(SUM(nbytes), 0) FROM pieces").fetchone()[0])

    def _path(self, key: str) -> Path:
        return self._files / key[:2] / f"{key}.safetensors"

    def _execute(self, query: str, *values: object) -> sqlite3.Cursor:
        return self._connection.execute(query, values)

    def _entries(self, where: str, *values: object) -> list[Entry]:
        names = "key, parent, start, tokens, num_pages, nbytes, created_s, used_s, hits, pinned_s"
        with self._lock:
            rows = self._execute(f"SELECT {names} FROM pieces {where}", *values).fetchall()
        fields = names.split(", ")
        return [Entry(**{**dict(zip(fields, row, strict=True)), "tokens": pieces.from_bytes(row[3])}) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """What no other process sees half of."""
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.rollback()
            raise
        self._connection.commit()

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self.problems.append(f"{self.folder}: {what}: {error}")

    def _add(self, piece: Piece, key: str, data: bytes, known: Entry | None) -> None:
        now, tokens = self.clock(), pieces.to_bytes(piece.tokens)
        digest, pinned = hashlib.sha256(data).hexdigest(), 0.0 if known is None else known.pinned_s
        row = (key, piece.parent, piece.start, tokens, piece.num_pages, len(data), digest, now, now, 0, pinned)
        self._execute(f"INSERT OR REPLACE INTO pieces VALUES ({', '.join('?' * len(row))})", *row)
        for ancestor in self._path_to(piece.parent):  # no sooner than what is behind it does it go
            self._execute("UPDATE pieces SET used_s = ? WHERE key = ?", now, ancestor)
        fewer = (
            "parent = ? AND key != ? AND length(tokens) < ? AND tokens = substr(?, 1, length(tokens)) AND pinned_s < ?"
        )
        self._delete(fewer, piece.parent, key, len(tokens), tokens, now)

    def _delete(self, where: str, *values: object) -> int:
        """Take pieces out of the index and the folder, and all that is behind them, in a transaction."""
        keys = [key for (key,) in self._execute(f"SELECT key FROM pieces WHERE {where}", *values).fetchall()]
        for key in keys:
            self._path(key).unlink(missing_ok=True)
            self._execute("DELETE FROM pieces WHERE key = ?", key)
        behind = sum(self._delete("parent = ?", key) for key in keys)
        return len(keys) + behind

    def _lose(self, key: str, error: Exception) -> None:
        self.problems.append(f"{self._path(key)}: lost, and computed again when it is asked for: {error}")
        with self._lock, self._guarded("remove"), self._transaction():
            self._delete("key = ?", key)

    def _renew_pins(self) -> None:
        """Until when each piece is kept: as long as the longest pin that needs it."""
        now = self.clock()
        self._execute("DELETE FROM pins WHERE expires_s <= ?", now)
        self._execute("UPDATE pieces SET pinned_s = 0 WHERE pinned_s > 0")
        for last, until in self._execute("SELECT last, expires_s FROM pins").fetchall():
            for key in self._path_to(last):
                self._execute("UPDATE pieces SET pinned_s = MAX(pinned_s, ?) WHERE key = ?", until, key)

    def _path_to(self, key: str) -> list[str]:
        """A piece and all before it, the last first."""
        found: list[str] = []
        row: tuple[str] | None = (key,)
        while row is not None:
            found.append(row[0])
            row = self._execute("SELECT parent FROM pieces WHERE key = ?", row[0]).fetchone()
        return found

    def _open_index(self) -> sqlite3.Connection:
        path = self.folder / "index.sqlite"
        try:
            return _connect(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, full, not to be written: not the file's fault
                raise
            self.problems.append(f"{path}: the index is damaged, and all that was kept is lost: {error}")
            for part in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
                part.unlink(missing_ok=True)
            return _connect(path)

    def _clear_away(self) -> None:
        """Make folder and index agree. No other process is in the middle of a move meanwhile."""
        with self._lock, self._transaction():
            known = dict(self._execute("SELECT key, nbytes FROM pieces").fetchall())
            for path in self._files.glob("*/*"):
                key = path.name.split(".")[0]
                is_draft = path.suffix == ".tmp"
                if (is_draft and not _is_alive(path)) or (not is_draft and key not in known):
                    path.unlink(missing_ok=True)
            for key, nbytes in known.items():
                path = self._path(key)
                found = path.stat().st_size if path.is_file() else None
                if found != nbytes:
                    got = "missing" if found is None else f"of {found:,} bytes, not {nbytes:,}"
                    self.problems.append(f"{path}: lost, and computed again when it is asked for: the file is {got}")
                    self._delete("key = ?", key)
            self._renew_pins()
        self.prune()


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=30.0, check_same_thread=False, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(_TABLES)
        connection.execute("SELECT COUNT(*) FROM pieces").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _is_alive(draft: Path) -> bool:
    """True if the process that writes this draft still runs; of our own number only if it is new (containers)."""
    try:
        pid = int(draft.name.split(".")[1])
        os.kill(pid, 0)
        return pid != os.getpid() or time.time() - draft.stat().st_mtime < 3600
    except (OSError, ValueError):
        return False


__all__ = ["FOREVER", "DiskStore", "Entry", "StoredPin"]
