"""The prefix tree against a model that writes every token down: thousands of random schedules, no page lost."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.cache.ledger import Holding, Ledger
from hasten.cache.nodes import num_shared
from hasten.cache.pages import NULL_PAGE
from hasten.cache.prefix import PUBLIC, PrefixTree
from hasten.errors import ArgumentError


class World:
    """A ledger, a tree, what would be in the pages, and sequences that live.

    A cell holds all tokens up to its own: whoever reads another's pages by mistake sees other tokens.
    """

    def __init__(self, num_pages=1000, page_size=4, windows=(None,), **options) -> None:
        self.now = 0.0
        self.ledger = Ledger(windows, [num_pages] * len(windows), page_size)
        self.tree = PrefixTree(self.ledger, clock=lambda: self.now, **options)
        self.cells: list[dict[tuple[int, int], tuple[int, ...]]] = [{} for _ in windows]
        self.live: list[tuple[Holding, list[int], str]] = []

    def begin(self, tokens, salt="", **options):
        """(the sequence, what was found); its tokens that were not found are computed."""
        holding = self.ledger.open()
        match = self.tree.take(self.tree.lookup(tokens, salt, limit=len(tokens) - 1), holding, salt, **options)
        sequence = (holding, [], salt)
        self.live.append(sequence)
        sequence[1].extend(tokens[: match.num_tokens])
        self.read(sequence)
        self.grow(sequence, tokens[match.num_tokens :])
        return sequence, match

    def grow(self, sequence, more):
        holding, tokens, _ = sequence
        copies = holding.grow(len(more))
        size = self.ledger.page_size
        for cells, some in zip(self.cells, copies, strict=True):
            found = [{cell: cells.get((copy.source, cell)) for cell in range(size)} for copy in some]
            for copy, one in zip(some, found, strict=True):
                cells |= {(copy.target, cell): value for cell, value in one.items()}
        first = len(tokens)
        tokens += more
        for kind, table in enumerate(holding.tables):
            for position in range(first, len(tokens)):
                page = table.pages[position // size]
                assert page != NULL_PAGE and table.pool.count(page) == 1, "writes a page that others hold"
                self.cells[kind][page, position % size] = tuple(tokens[: position + 1])

    def read(self, sequence):
        """What the next token sees is there, in every kind of layer."""
        holding, tokens, _ = sequence
        assert holding.num_tokens == len(tokens)
        size = self.ledger.page_size
        for cells, table in zip(self.cells, holding.tables, strict=True):
            seen = 0 if table.window is None else max(0, len(tokens) - table.window)
            for position in range(seen, len(tokens)):
                assert cells[table.pages[position // size], position % size] == tuple(tokens[: position + 1])

    def leave(self, sequence):
        holding, tokens, salt = sequence
        self.tree.insert(tokens, holding, salt)
        holding.free()
        self.live.remove(sequence)

    def check(self):
        self.ledger.check_integrity([one for one, _, _ in self.live], self.tree.held_pages())
        for kind, pool in enumerate(self.ledger.pools):
            assert self.tree.num_evictable(kind) == pool.num_idle
        for sequence in self.live:
            self.read(sequence)


def once(world, tokens, salt=""):
    """A sequence from its beginning to its end; what was found of it."""
    sequence, match = world.begin(list(tokens), salt)
    world.leave(sequence)
    world.check()
    return match


def test_the_longest_prefix_is_found_also_inside_a_page():
    world = World()
    once(world, range(10))
    for length in range(1, 11):
        world = World()
        once(world, range(10))
        match = once(world, [*range(length), 99, 98])
        assert match.num_tokens == length and match.explanation.num_found == length
    assert once(world, range(10)).num_tokens == 9  # the last token is always computed
    assert once(world, [5, 6, 7]).num_tokens == 0


def test_a_page_that_a_running_sequence_shares_is_copied_before_it_is_written():
    world = World()
    once(world, range(6))
    first, _ = world.begin([*range(6), 70])
    second, match = world.begin([*range(6), 80])
    assert match.num_tokens == 6
    world.grow(first, [71, 72])
    world.grow(second, [81])
    world.check()
    world.leave(first)
    world.leave(second)
    assert once(world, [*range(6), 70, 71, 72, 73]).num_tokens == 9
    assert once(world, [*range(6), 80, 81, 82]).num_tokens == 8


def test_whole_pages_alone_where_a_copy_would_need_room():
    world = World()
    once(world, range(10))
    _, match = world.begin([*range(10), 50], only_whole_pages=True)
    assert match.num_tokens == 8
    world.check()


def test_more_of_the_same_replaces_less_and_less_adds_nothing():
    world = World()
    for end in range(1, 14):
        once(world, range(end))
    assert [len(one.tokens) for one in world.tree.picture()] == [4, 4, 4, 1]
    once(world, range(6))
    assert world.tree.counts().num_nodes == 4 and world.ledger.num_free == (996,)


def test_no_tenant_sees_another():
    world = World()
    once(world, range(20), "a")
    assert once(world, range(20), "b").explanation.reason == "empty"
    assert world.tree.counts("c") == type(world.tree.counts("c"))()
    assert once(world, range(20), "a").num_tokens == 19
    assert world.tree.counts("a").num_found == 19 and world.tree.counts("b").num_found == 0
    assert once(world, [*range(10), 50, 51], "b").explanation.cached == 10  # its own token, by its own request


def test_who_evicted_is_named_only_to_its_own_tenant():
    def full(actor):
        world = World(num_pages=8)
        once(world, range(16), "a")
        world.tree.actor = actor
        once(world, range(100, 132), actor[0])
        return once(world, range(16), "a").explanation

    own, other = full(("a", "request 7")), full(("b", "request 7"))
    assert own.reason == other.reason == "evicted"
    assert own.eviction.by == "request 7" and other.eviction.by is None
    assert "by request 7" in own.line() and "request" not in other.line()


def test_public_prefixes_are_found_by_all_and_lead_to_trees_of_their_own():
    world = World()
    once(world, range(8), PUBLIC)
    match = once(world, [*range(8), 50, 51], "a")
    assert match.num_tokens == 8 and match.explanation.is_public
    assert world.ledger.num_free == (997,)  # the public pages are not there twice
    assert once(world, [*range(8), 50, 51, 52], "b").num_tokens == 8
    assert once(world, [*range(8), 50, 51, 52], "a").num_tokens == 10


@pytest.mark.parametrize("window", [0, 1, 3, 4, 7, 9])
def test_layers_with_a_window_are_taken_over_where_all_is_there_that_the_next_token_sees(window):
    world = World(windows=(None, window))
    sequence, _ = world.begin(list(range(18)))
    for token in range(18, 30):
        sequence[0].slide()
        world.grow(sequence, [token])
    world.leave(sequence)
    assert once(world, [*range(30), 99]).num_tokens == 30
    early = once(world, [*range(12), 99])
    if window == 0:
        assert early.num_tokens == 12
    else:
        assert early.num_tokens == 0 and early.explanation.reason == "window" and early.num_known == 12
        assert once(world, [*range(12), 98]).num_tokens == 12  # left there by the one before
    world.check()


def test_pages_of_a_window_go_without_the_rest():
    world = World(num_pages=12, windows=(None, 5))
    once(world, range(24))
    world.ledger.pools[1].allocate(12)
    assert world.tree.num_evictable(1) == 0 and world.tree.num_evictable(0) == 6
    match = world.tree.lookup(list(range(24)))
    assert (match.num_known, match.num_tokens) == (24, 0)


def test_pins_stay_until_their_time_is_over():
    world = World(num_pages=8)
    once(world, range(8))
    assert world.tree.pin("system", list(range(8)), ttl_s=10.0) == 8
    once(world, range(100, 124))
    assert once(world, range(9)).num_tokens == 8
    assert world.tree.num_evictable(0) == world.ledger.pools[0].num_pages - world.ledger.num_free[0] - 2
    world.now = 9.0
    assert once(world, range(9)).num_tokens == 8  # which begins its time anew
    world.now = 18.0
    assert [pin.name for pin in world.tree.pins()] == ["system"] and world.tree.pins("other") == []
    world.now = 19.5
    once(world, range(200, 232))
    assert world.tree.pins() == [] and once(world, range(9)).num_tokens == 0
    with pytest.raises(ArgumentError, match="ttl: expected more than 0 seconds, got 0"):
        world.tree.pin("system", [1], ttl_s=0)


def test_pins_can_be_moved_taken_back_and_give_way():
    world = World(num_pages=8)
    once(world, range(8))
    assert world.tree.pin("nothing", [50]) == 0 and world.tree.pins() == []
    world.tree.pin("one", list(range(8)))
    world.tree.pin("one", list(range(4)))
    world.check()
    assert world.tree.num_evictable(0) == 1
    assert world.tree.unpin("one") and not world.tree.unpin("one")
    assert world.tree.num_evictable(0) == 2
    world.tree.pin("two", list(range(8)))
    assert world.tree.give_way() == 1 and world.tree.num_evictable(0) == 2
    once(world, range(100, 132))
    world.check()


def fill(world, order, hits=()):
    for first in order:
        once(world, range(first, first + 8))
    for first in hits:
        once(world, range(first, first + 8))


@pytest.mark.parametrize(("eviction", "goes"), [("lru", 0), ("lfu", 200), ("cost", 200)])
def test_who_goes_first(eviction, goes):
    world = World(num_pages=8, eviction=eviction)
    fill(world, [0, 100, 200], hits=[0, 0, 0, 100, 200])
    if eviction != "lru":
        fill(world, [], hits=[100, 100])
    once(world, range(300, 316))
    left = [first for first in (0, 100, 200) if world.tree.lookup(list(range(first, first + 8))).num_tokens == 8]
    assert goes not in left and len(left) == 2


def test_what_costs_more_to_compute_again_stays_longer_but_not_for_ever():
    world = World(num_pages=10, eviction="cost", cost=lambda before, count: count * (1 + before))
    once(world, range(16))
    for first in range(100, 1000, 10):
        once(world, range(first, first + 4))
        if first == 300:
            assert world.tree.lookup(list(range(16))).num_tokens == 16  # 21 others have come since, for 6 pages
    assert world.tree.lookup(list(range(16))).num_tokens < 16


def test_a_tenant_keeps_to_its_budget():
    world = World(budgets={"a": 3})
    once(world, range(8), "a")
    once(world, range(100, 108), "a")
    assert world.tree.counts("a").num_nodes == 3
    assert world.tree.lookup(list(range(100, 108)), "a").num_tokens == 8
    explanation = once(world, range(8), "a").explanation
    assert (explanation.reason, explanation.eviction.cause, explanation.num_found) == ("evicted", "budget", 4)
    once(world, range(80), "b")
    assert world.tree.counts("b").num_nodes == 20
    with pytest.raises(ArgumentError, match="budgets: expected at least 1 page, got 0"):
        World(budgets=0)
    with pytest.raises(ArgumentError, match="eviction: expected one of lru, lfu, cost, got 'fifo'"):
        World(eviction="fifo")


def test_every_reason_has_its_line():
    world = World()
    decode = {10: "x", 50: "y", 3: "z"}.get
    text = lambda tokens: decode(tokens[0], "?")  # noqa: E731
    assert once(world, range(10)).explanation.line() == "0 of 10 tokens from the cache: nothing is in it yet"
    line = once(world, [*range(3), 50, 51]).explanation.line(text)
    assert line == "3 of 5 tokens from the cache: token 3 is 50 ('y'), the cache has 3 ('z') there"
    line = once(world, [*range(12)]).explanation.line(text)
    assert line == "10 of 12 tokens from the cache: nothing in the cache goes on with token 10, 10 ('x')"
    assert once(world, range(10)).explanation.line() == "9 of 10 tokens from the cache"
    world.tree.clear()
    world.now = 2.0
    line = once(world, range(10)).explanation.line()
    assert line == "0 of 10 tokens from the cache: what follows was evicted 2.0 s ago when cleared"
    world = World(windows=(None, 5))
    sequence, _ = world.begin(list(range(20)))
    sequence[0].slide()
    world.grow(sequence, [20])
    world.leave(sequence)
    line = once(world, [*range(8), 50, 51]).explanation.line()
    assert line.startswith("0 of 10 tokens from the cache: 8 are known, but not all that layers with a window see")


def test_equal_hashes_do_not_decide():
    class Same(int):
        def __hash__(self):
            return 1

    world = World()
    once(world, [Same(one) for one in range(8)])
    assert once(world, [Same(one) for one in (0, 1, 2, 3, 9, 5, 6, 7)]).num_tokens == 4


class Schedule:
    """Everything that can happen, at random, in a pool that is too small, beside a model of what may be found."""

    def __init__(self, seed, num_pages, page_size, windows, eviction) -> None:
        self.random = random.Random(seed)
        budgets = self.random.choice([None, None, {"a": 3}])
        self.world = World(num_pages, page_size, windows, eviction=eviction, budgets=budgets)
        self.is_roomy = num_pages > 500 and budgets is None and windows == (None,)
        self.left: dict[str | None, list[tuple[int, ...]]] = {"a": [], "b": [], PUBLIC: []}

    def prompt(self):
        known = [one for some in self.left.values() for one in some]
        start = list(self.random.choice(known)) if known and self.random.random() < 0.8 else []
        start = start[: self.random.randint(0, len(start))]
        return start + [self.random.randint(0, 2) for _ in range(self.random.randint(1, 9))]

    def begin(self):
        salt, tokens = self.random.choice(["a", "b", PUBLIC]), self.prompt()
        whole = self.random.random() < 0.2
        most = max((num_shared(one, tokens[:-1]) for one in (*self.left[salt], *self.left[PUBLIC])), default=0)
        if not self.world.ledger.has_room(len(tokens), len(tokens), 1):
            return
        _, match = self.world.begin(tokens, salt, only_whole_pages=whole)
        assert match.num_tokens <= most and (not whole or match.num_tokens % self.world.ledger.page_size == 0)
        assert not self.is_roomy or whole or match.num_tokens == most
        assert match.explanation.num_found == match.num_tokens <= match.explanation.position < len(tokens)

    def grow(self):
        sequence = self.random.choice(self.world.live)
        if self.random.random() < 0.7:
            sequence[0].slide()
        more = [self.random.randint(0, 2) for _ in range(self.random.randint(1, 7))]
        if sequence[0].can_grow(len(more)):
            self.world.grow(sequence, more)

    def leave(self):
        sequence = self.random.choice(self.world.live)
        self.left[sequence[2]].append(tuple(sequence[1]))
        self.world.leave(sequence)

    def leave_and_go_on(self):
        holding, tokens, salt = self.random.choice(self.world.live)
        whole = len(tokens) // self.world.ledger.page_size * self.world.ledger.page_size
        self.left[salt].append(tuple(tokens[:whole]))
        self.world.tree.insert(tokens[:whole], holding, salt)

    def break_off(self):
        sequence = self.random.choice(self.world.live)
        sequence[0].free()
        self.world.live.remove(sequence)

    def pin(self):
        salt = self.random.choice(["a", "b", PUBLIC])
        if self.left[salt]:
            tokens = self.random.choice(self.left[salt])
            count = self.world.tree.pin(self.random.choice("xyz"), list(tokens), salt, self.random.choice([None, 5.0]))
            assert count <= len(tokens)

    def unpin(self):
        self.world.tree.unpin(self.random.choice("xyz"), self.random.choice(["a", "b", PUBLIC]))
        self.world.now += self.random.random()

    def evict(self):
        kind = self.random.randrange(len(self.world.ledger.windows))
        pool = self.world.ledger.pools[kind]
        count = self.random.randint(0, 5)
        before, most = pool.num_free, self.world.tree.num_evictable(kind)
        self.world.tree.evict(kind, count)
        assert pool.num_free >= before + min(count, most)
        self.is_roomy = False

    def step(self):
        acts = [self.begin] * 3
        if self.world.live:
            acts += [self.grow] * 3 + [self.leave] * 2 + [self.leave_and_go_on, self.break_off]
        acts += [self.pin, self.unpin] + ([] if self.is_roomy and self.random.random() < 0.9 else [self.evict])
        self.random.choice(acts)()
        self.world.check()

    def close(self):
        while self.world.live:
            self.leave()
        self.world.tree.give_way()
        for kind, pool in enumerate(self.world.ledger.pools):
            self.world.tree.evict(kind, pool.num_pages)
            assert pool.num_free == pool.num_pages
        if None in self.world.ledger.windows:
            assert all(self.world.tree.counts(salt).num_nodes == 0 for salt in self.world.tree.salts())


WINDOWS = [(None,), (None,), (None, 3), (6,), (2, None, 7), (None, None), (0, None), (0,)]


SCHEDULES = given(
    st.integers(0, 2**32),
    st.sampled_from([6, 9, 20, 1000]),
    st.integers(1, 5),
    st.sampled_from(WINDOWS),
    st.sampled_from(["lru", "lfu", "cost"]),
)


def run(seed, num_pages, page_size, windows, eviction):
    schedule = Schedule(seed, num_pages, page_size, windows, eviction)
    for _ in range(40):
        schedule.step()
    schedule.close()


@settings(max_examples=200)
@SCHEDULES
def test_any_schedule(seed, num_pages, page_size, windows, eviction):
    run(seed, num_pages, page_size, windows, eviction)


@pytest.mark.slow
@settings(max_examples=2000)
@SCHEDULES
def test_thousands_of_schedules(seed, num_pages, page_size, windows, eviction):
    run(seed, num_pages, page_size, windows, eviction)


def test_many_children_of_one_page_are_searched_by_halves():
    world = World(num_pages=5000)
    for one in range(1000):
        once_without_check(world, [0, 1, 2, 3, 7, one, one])
    node = next(iter(world.tree._roots[""].children.values()))
    assert len(node.children) == 1000
    assert world.tree.lookup([0, 1, 2, 3, 7, 500, 9]).num_tokens == 6


def once_without_check(world, tokens):
    sequence, _ = world.begin(tokens)
    world.leave(sequence)
