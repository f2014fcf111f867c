"""Prompt caches on disk through every fault: what is left is whole, and what was lost is said."""

from __future__ import annotations

import errno
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from hasten.cache import pieces
from hasten.cache.pieces import Damaged, Piece
from hasten.cache.store import DiskStore
from hasten.errors import ArgumentError

ROOT = pieces.root_of("model", "a")


def piece(tokens=(1, 2, 3), parent=ROOT, start=0, places=((0,), ()), fill=None):
    """K and V that can be told apart, of two kinds of layers."""
    value = float(sum(tokens)) if fill is None else fill
    pages = tuple(tuple(torch.full((len(some), 2, 16, 1, 8), value + n) for n in range(2)) for some in places)
    return Piece(parent, start, tuple(tokens), places, pages)


def chain(length, first=0):
    """Pieces one behind another."""
    found, parent = [], ROOT
    for number in range(length):
        found.append(piece((first, number, 7), parent, 3 * number))
        parent = found[-1].key
    return found


def same(one, other):
    assert (one.parent, one.start, one.tokens, one.places) == (other.parent, other.start, other.tokens, other.places)
    for some, others in zip(one.pages, other.pages, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(some, others, strict=True))
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_a_piece_comes_back_as_it_was(tmp_path, dtype):
    pages = tuple((torch.randn(2, 1, 16, 1, 8).to(dtype), torch.randn(2, 1, 16, 1)) for _ in range(2))
    one = Piece(ROOT, 0, tuple(range(20)), ((0, 1), (0, 1)), pages)
    store = DiskStore(tmp_path)
    assert store.put(one) and not store.put(one)
    store.close()
    store = DiskStore(tmp_path)
    found = store.load(one.key)
    assert found.tokens == one.tokens and store.problems == []
    for some, others in zip(found.pages, pages, strict=True):
        assert all(torch.equal(a.float(), b.float()) and a.dtype == b.dtype for a, b in zip(some, others, strict=True))
    (entry,) = store.children(ROOT, 0)
    assert (
        entry.key == one.key and store.children(ROOT, 1) == [] and store.children(pieces.root_of("model", "b"), 0) == []
    )


def test_more_tokens_or_pages_replace_fewer(tmp_path):
    store = DiskStore(tmp_path)
    store.put(piece((1, 2)))
    store.put(piece((1, 2, 3)))
    store.put(piece((1, 9)))
    assert sorted(entry.tokens for entry in store.entries()) == [(1, 2, 3), (1, 9)]
    better = piece((1, 2, 3), places=((0,), (0,)))
    assert store.put(better) and same(store.load(better.key), better) and len(store.entries()) == 2
    assert len(list(tmp_path.glob("pieces/*/*"))) == 2


def test_the_least_recently_used_go_first_and_ends_before_beginnings(tmp_path):
    now = [0.0]
    store = DiskStore(tmp_path, clock=lambda: now[0])
    first, second = chain(3), chain(3, first=50)
    for one in [*first, *second]:
        store.put(one)
    size = store.entries()[0].nbytes
    now[0] = 5.0
    store.touch([one.key for one in first])
    assert store.prune(max_bytes=4 * size) == 2
    assert {entry.key for entry in store.entries()} == {*(one.key for one in first), second[0].key}
    now[0] = 8.0
    assert store.prune(ttl_s=4.0) == 1 and store.prune(ttl_s=2.0) == 3 and store.nbytes == 0
    assert list(tmp_path.glob("pieces/*/*")) == []
    small = DiskStore(tmp_path, max_bytes=2 * size + 10, clock=lambda: now[0])
    for one in first:
        now[0] += 1.0
        small.put(one)
    assert small.nbytes <= 2 * size + 10 and small.entries()
    assert not DiskStore(tmp_path, max_bytes=10).put(piece((5,)))


def test_pins_keep_what_they_need_until_they_are_over(tmp_path):
    now = [100.0]
    store = DiskStore(tmp_path, clock=lambda: now[0])
    kept, other = chain(3), chain(2, first=50)
    for one in [*kept, *other]:
        store.put(one)
    store.pin(ROOT, "system", [one.key for one in kept], 9, ttl_s=10.0)
    assert store.prune(max_bytes=0) == 2 and len(store.entries()) == 3
    again = DiskStore(tmp_path, clock=lambda: now[0])
    assert [(pin.name, pin.num_tokens, pin.last) for pin in again.pins()] == [("system", 9, kept[-1].key)]
    now[0] = 111.0
    assert again.pins() == [] and again.prune(max_bytes=0) == 3
    store.put(kept[0])
    store.pin(ROOT, "system", [kept[0].key], 3, ttl_s=None)
    assert store.prune(max_bytes=0) == 0 and store.unpin(ROOT, "system") and not store.unpin(ROOT, "system")
    assert store.prune(max_bytes=0) == 1


def file_of(folder: Path, one: Piece) -> Path:
    (path,) = folder.glob(f"pieces/*/{one.key}.safetensors")
    return path


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_anywhere_is_a_miss_and_is_said(tmp_path, seed):
    one = piece((1, 2, 3))
    store = DiskStore(tmp_path)
    store.put(one)
    path = file_of(tmp_path, one)
    data = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(data))
    data[place] ^= 1 << (seed % 8)
    path.write_bytes(bytes(data))
    assert store.load(one.key) is None and "lost, and computed again" in store.problems[0]
    assert store.entries() == [] and not path.exists() and store.put(one) and same(store.load(one.key), one)


def test_every_length_of_a_truncated_file_is_a_miss(tmp_path):
    first, second, third = chain(3)
    whole = pieces.dump(second)
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        folder = tmp_path / str(length)
        store = DiskStore(folder)
        for one in (first, second, third):
            store.put(one)
        file_of(folder, second).write_bytes(whole[:length])
        store.close()
        store = DiskStore(folder)
        assert f"of {length:,} bytes, not {len(whole):,}" in store.problems[0]
        assert [entry.key for entry in store.entries()] == [first.key]  # nothing is behind what is gone
        with pytest.raises(Damaged):
            pieces.parse(whole[:length])


def test_verify_finds_what_is_damaged(tmp_path):
    store = DiskStore(tmp_path)
    good, bad = piece((1,)), piece((2,))
    store.put(good)
    store.put(bad)
    path = file_of(tmp_path, bad)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    whole, problems = store.verify()
    assert whole == 1 and len(problems) == 1 and bad.key in problems[0]
    assert store.verify() == (1, [])


def test_a_file_in_the_place_of_another_is_not_taken_for_it(tmp_path):
    one, other = piece((1, 2)), piece((3, 4))
    store = DiskStore(tmp_path)
    store.put(one)
    store.put(other)
    data = file_of(tmp_path, other).read_bytes()
    file_of(tmp_path, one).write_bytes(data)
    import hashlib

    with sqlite3.connect(tmp_path / "index.sqlite") as index:
        index.execute("UPDATE pieces SET digest = ? WHERE key = ?", (hashlib.sha256(data).hexdigest(), one.key))
    assert store.load(one.key) is None and "it holds other tokens" in store.problems[0]


def test_a_damaged_index_is_begun_anew(tmp_path):
    store = DiskStore(tmp_path)
    store.put(piece())
    store.close()
    (tmp_path / "index.sqlite").write_bytes(b"not a database" * 300)
    store = DiskStore(tmp_path)
    assert "the index is damaged" in store.problems[0] and store.entries() == []
    assert list(tmp_path.glob("pieces/*/*")) == [] and store.put(piece())


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_done(tmp_path, monkeypatch, where):
    store = DiskStore(tmp_path)
    store.put(piece((1,)))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os if where == "fsync" else Path, where, full)
        assert not store.put(piece((2,)))
    assert "No space left on device" in store.problems[0]
    assert [entry.tokens for entry in store.entries()] == [(1,)] and len(list(tmp_path.glob("pieces/*/*"))) == 1
    assert store.put(piece((2,)))


WRITER = """
import sys
sys.path.insert(0, {root!r})
from tests.cache.test_store import chain
from hasten.cache.store import DiskStore
store = DiskStore(sys.argv[1])
print("open", flush=True)
if {limit}:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
for number in range(10**6 if not {limit} else 3):
    for one in chain(3, first={first} + number):
        store.put(one)
print(len(store.problems), len(store.entries()), flush=True)
"""


def writer(folder, first=0, limit=0):
    root = str(Path(__file__).parents[2])
    code = WRITER.format(root=root, first=first, limit=limit)
    command = [sys.executable, "-c", code, str(folder)]
    environment = {**os.environ, "PYTHONPATH": f"{root}/src"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_process_that_may_write_no_more_goes_on(tmp_path):
    process = writer(tmp_path, limit=1000)  # below any piece
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "open\n9 0\n"
    assert list(tmp_path.glob("pieces/*/*")) == []


def test_killed_processes_leave_a_folder_that_opens_clean(tmp_path):
    draw = random.Random(0)
    processes = [writer(tmp_path, first) for first in (0, 10**6)]
    for process in processes:
        assert process.stdout.readline() == "open\n"
    while not list(tmp_path.glob("pieces/*/*.safetensors")):
        time.sleep(0.01)
    time.sleep(0.3 + 0.3 * draw.random())
    for process in processes:  # in the middle of saves, both on one folder
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    drafts = list(tmp_path.glob("pieces/*/*.tmp"))
    store = DiskStore(tmp_path)
    whole, problems = store.verify()
    assert whole > 3 and problems == store.problems == [], drafts
    assert len(list(tmp_path.glob("pieces/*/*"))) == whole == len(store.entries())
    for entry in store.entries():
        one = store.load(entry.key)
        assert torch.equal(one.pages[0][0], torch.full_like(one.pages[0][0], float(sum(one.tokens))))


def test_many_threads_with_stores_of_their_own_on_one_folder(tmp_path):
    def work(seed):
        draw, store = random.Random(seed), DiskStore(tmp_path, max_bytes=40_000)
        for _ in range(15):
            some = chain(3, first=draw.randrange(5))
            for one in some:
                store.put(one)
            found = store.load(draw.choice(some).key)
            assert found is None or torch.equal(
                found.pages[0][0], torch.full_like(found.pages[0][0], float(sum(found.tokens)))
            )
        problems.extend(store.problems)
        done.append(seed)

    problems: list[str] = []
    done: list[int] = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]
    store = DiskStore(tmp_path, max_bytes=40_000)
    assert store.nbytes <= 40_000 and store.verify()[1] == []
    assert all("lost" in problem for problem in problems)  # evicted by one while another read it


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArgumentError, match="path: expected a folder for a prompt cache"):
        DiskStore(tmp_path / "file")
