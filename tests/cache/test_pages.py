"""The accountant against a model that writes every token down: thousands of random schedules, no page lost."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.cache.pages import NULL_PAGE, Copy, OutOfPages, PagePool, Table
from hasten.errors import ArgumentError


class Memory:
    """What would be in the pages: a sequence writes its tokens where its table says and reads them back."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.cells: dict[tuple[int, int], object] = {}

    def copy(self, copies: list[Copy]) -> None:
        found = [{cell: self.cells.get((copy.source, cell)) for cell in range(self.pool.page_size)} for copy in copies]
        for copy, cells in zip(copies, found, strict=True):
            self.cells |= {(copy.target, cell): value for cell, value in cells.items()}

    def write(self, table: Table, first: int, values: list[object]) -> None:
        for position, value in enumerate(values, first):
            place, cell = divmod(position, self.pool.page_size)
            assert table.pages[place] != NULL_PAGE and self.pool.count(table.pages[place]) == 1, "writes a shared page"
            self.cells[table.pages[place], cell] = value

    def read(self, table: Table, first: int) -> list[object]:
        size = self.pool.page_size
        return [self.cells[table.pages[i // size], i % size] for i in range(first, table.num_tokens)]


class Keeper:
    """A prompt cache at its simplest: it holds the pages of some sequences, and parts with the oldest."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.kept: list[tuple[list[int], list[object]]] = []  # whole pages, and what they hold
        pool.evictor = self

    def num_evictable(self) -> int:
        mine = [page for pages, _ in self.kept for page in pages]
        return sum(self.pool.count(page) == mine.count(page) for page in set(mine))

    def evict(self, count: int) -> None:
        goal = self.pool.num_free + count
        while self.kept and self.pool.num_free < goal:
            self.pool.free(self.kept.pop(0)[0])


class Schedule:
    """Sequences that live, and everything that can happen to them."""

    def __init__(self, seed: int, num_pages: int, page_size: int, window: int | None) -> None:
        self.random = random.Random(seed)
        self.pool, self.window = PagePool(num_pages, page_size), window
        self.memory, self.keeper = Memory(self.pool), Keeper(self.pool)
        self.live: list[tuple[Table, list[object]]] = []
        self.next_value = 0

    def admit(self) -> None:
        table, values = Table(self.pool, self.window), []
        if self.keeper.kept and self.window is None and self.random.random() < 0.5:
            pages, values = self.random.choice(self.keeper.kept)
            values = list(values)
            table.adopt(pages, len(values))
        self.live.append((table, values))
        self.grow(-1)

    def grow(self, which: int | None = None) -> None:
        table, values = self.pick(which)
        count = self.random.randint(0, 2 * self.pool.page_size + 1)
        if self.random.random() < 0.7:
            table.slide()
        before = (list(table.pages), table.num_tokens, self.pool.num_available)
        needed = table.pages_to_grow(count)
        try:
            copies = table.grow(count)
        except OutOfPages:
            assert needed > before[2] and before[:2] == (table.pages, table.num_tokens)
            return
        assert needed <= before[2]
        self.memory.copy(copies)
        new = list(range(self.next_value, self.next_value + count))
        self.next_value += count
        self.memory.write(table, len(values), new)
        values += new

    def fork(self) -> None:
        table, values = self.pick()
        self.live.append((table.fork(), list(values)))

    def truncate(self) -> None:
        table, values = self.pick()
        length = self.random.randint(0, len(values))
        try:
            table.truncate(length)
        except ArgumentError:
            assert self.window is not None and length > 0 and table.first_kept > max(0, length - self.window)
            return
        del values[length:]

    def keep(self) -> None:
        table, values = self.pick()
        whole = len(values) // self.pool.page_size
        if whole and NULL_PAGE not in table.pages[:whole]:
            self.pool.share(table.pages[:whole])
            self.keeper.kept.append((table.pages[:whole], values[: whole * self.pool.page_size]))

    def free(self) -> None:  # what preempting, cancelling and finishing all come to
        table, values = self.pick()
        self.live.remove((table, values))
        table.free()

    def pick(self, which: int | None = None) -> tuple[Table, list[object]]:
        return self.live[self.random.randrange(len(self.live)) if which is None else which]

    def step(self) -> None:
        if not self.live or self.random.random() < 0.15:
            self.admit()
        else:
            acts = (self.grow, self.grow, self.grow, self.fork, self.truncate, self.keep, self.free)
            self.random.choice(acts)()
        self.check()

    def check(self) -> None:
        self.pool.check_integrity([*(table.pages for table, _ in self.live), *(pages for pages, _ in self.keeper.kept)])
        for table, values in self.live:
            assert table.num_tokens == len(values)
            seen = 0 if self.window is None else max(0, len(values) - self.window)
            assert table.first_kept <= seen and self.memory.read(table, seen) == values[seen:]
        for pages, values in self.keeper.kept:
            size = self.pool.page_size
            assert [self.memory.cells[pages[i // size], i % size] for i in range(len(values))] == values

    def close(self) -> None:
        while self.live:
            self.free()
        self.keeper.evict(self.pool.num_pages)
        assert self.pool.num_free == self.pool.num_pages
        self.pool.check_integrity([])


@settings(max_examples=400)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 5), st.sampled_from([None, None, 0, 1, 3, 7]))
def test_random_schedules_lose_no_page_and_no_token(seed, num_pages, page_size, window):
    schedule = Schedule(seed, num_pages, page_size, window)
    for _ in range(40):
        schedule.step()
    schedule.close()


@pytest.mark.parametrize("window", [None, 0, 5])
def test_thousands_of_short_schedules(window):
    for seed in range(400):
        schedule = Schedule(seed, 6, 2, window)
        for _ in range(10):
            schedule.step()
        schedule.close()


def test_pages_are_numbered_from_1_and_the_null_page_is_never_given_out():
    pool = PagePool(3, 4)
    assert sorted(pool.allocate(3)) == [1, 2, 3] and pool.num_free == 0
    pool.share([NULL_PAGE])
    pool.free([NULL_PAGE])
    assert pool.count(NULL_PAGE) == 0


def test_a_pool_gives_all_or_nothing():
    pool = PagePool(3, 4)
    with pytest.raises(OutOfPages, match="4 asked for, 3 of 3 free"):
        pool.allocate(4)
    assert pool.num_free == 3


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_a_pool_of_nothing_is_refused(sizes):
    with pytest.raises(ArgumentError, match="expected at least 1, got 0"):
        PagePool(*sizes)


def test_giving_back_twice_is_found():
    pool = PagePool(2, 4)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(AssertionError, match="was given back again"):
        pool.free(pages)
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share(pages)


def test_integrity_sees_what_is_wrong():
    pool = PagePool(4, 2)
    table = Table(pool)
    table.grow(3)
    pool.check_integrity([table.pages])
    with pytest.raises(AssertionError, match="counted 1 times, held 0 times"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="counted 1 times, held 2 times"):
        pool.check_integrity([table.pages, table.pages])
    pool._free.append(pool._free[0])
    with pytest.raises(AssertionError, match="free twice"):
        pool.check_integrity()
    pool._free[-1] = table.pages[0]
    with pytest.raises(AssertionError, match="held 1 times and free"):
        pool.check_integrity()


def test_a_fork_copies_the_partial_page_it_writes_and_leaves_the_parent_alone():
    pool = PagePool(8, 4)
    parent = Table(pool)
    parent.grow(6)
    child = parent.fork()
    assert child.pages == parent.pages and pool.num_free == 6 and child.pages_to_grow(1) == 1
    (copy,) = child.grow(1)
    assert copy.source == parent.pages[1] and copy.target == child.pages[1] != parent.pages[1]
    assert child.pages[0] == parent.pages[0]
    assert parent.grow(1) == []  # the only one to hold its page again


def test_a_fork_at_the_end_of_a_page_copies_nothing():
    pool = PagePool(8, 4)
    parent = Table(pool)
    parent.grow(8)
    child = parent.fork()
    assert child.pages_to_grow(1) == 1 and child.grow(1) == [] and pool.num_free == 5


def test_growing_across_several_pages_takes_enough():
    pool = PagePool(8, 4)
    table = Table(pool)
    table.grow(3)
    assert table.pages_to_grow(11) == 3
    table.grow(11)
    assert len(table.pages) == 4 and pool.num_free == 4
    assert table.grow(0) == [] and len(table.pages) == 4


def test_a_window_keeps_what_the_next_token_sees():
    pool = PagePool(8, 2)
    table = Table(pool, window=3)
    table.grow(9)
    table.slide()  # token 9 sees 6, 7, 8
    assert table.pages[:3] == [NULL_PAGE] * 3 and NULL_PAGE not in table.pages[3:] and table.first_kept == 6
    assert pool.num_free == 6
    table.truncate(9)
    with pytest.raises(ArgumentError, match="a cut whose window begins at or after token 6, got 8"):
        table.truncate(8)
    table.truncate(0)
    assert pool.num_free == 8 and table.first_kept == 0


def test_a_table_is_cut_only():
    table = Table(PagePool(8, 2))
    table.grow(3)
    with pytest.raises(ArgumentError, match="num_tokens: expected 0 to 3, got 4"):
        table.truncate(4)


def test_an_evictor_is_asked_only_for_what_is_missing():
    pool = PagePool(4, 2)
    asked = []

    class Cache:
        def num_evictable(self):
            return len(self.pages)

        def evict(self, count):
            asked.append(count)
            pool.free([self.pages.pop() for _ in range(count)])

    cache = pool.evictor = Cache()
    cache.pages = pool.allocate(3)
    assert pool.num_available == 4
    held = pool.allocate(1)
    assert not asked
    held += pool.allocate(2)
    assert asked == [2] and pool.num_free == 0
    pool.check_integrity([held, cache.pages])
