"""The prompt cache in the pages of an engine: a tree of tokens, by pages, in which the longest known prefix is found.

Tokens are compared themselves, also within a page. The tree holds pages beside the sequences that computed them, and
parts with them when a pool runs out. Plain numbers, no tensor. The rules are in docs/design/prompt-cache.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hasten.cache import match as matching
from hasten.cache.eviction import Cost, Policy, Queue
from hasten.cache.ledger import Holding, Ledger
from hasten.cache.match import Match
from hasten.cache.nodes import Counts, Node, Root, Tokens
from hasten.cache.pages import NULL_PAGE, PagePool
from hasten.cache.pins import Pin, Pins
from hasten.cache.reasons import Eviction, Remarks
from hasten.errors import ArgumentError

PUBLIC = None  # the salt of prefixes that every tenant may find


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A node as a person sees it. depth: pages before it. is_end: nothing is behind it."""

    depth: int
    tokens: Tokens
    hits: int
    is_pinned: bool
    is_end: bool


class PrefixTree:
    """Prefixes of the sequences of one ledger, each tenant's in a tree of its own.

    eviction: "lru", "lfu" or "cost", the last by `cost(tokens before, tokens)`, in any unit. budgets: the most pages
    that a tenant's tree has, by its salt, or one number for each of them; its own least valued go first. clock: in
    seconds.

    Raises ArgumentError for an unknown eviction and for budgets below 1.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        eviction: str = "lru",
        cost: Cost | None = None,
        budgets: int | Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for value in budgets.values() if isinstance(budgets, Mapping) else () if budgets is None else (budgets,):
            if value < 1:
                raise ArgumentError("budgets", "at least 1 page", value, "leave a tenant out for no limit")
        self.ledger, self.page_size, self.windows = ledger, ledger.page_size, ledger.windows
        self.policy, self.clock = Policy(eviction, cost), clock
        self.actor: tuple[str | None, str] | None = None  # (salt, request) for whom pages are asked for
        self._budgets, self._remarks, self._lock = budgets, Remarks(), threading.RLock()
        self._roots: dict[str | None, Root] = {}
        self._ends: dict[str | None, Queue] = {}  # of each tenant, for its budget
        self._every_end = Queue(_is_end)
        self._in_window = [Queue(lambda node, kind=kind: node.pages[kind] != NULL_PAGE) for kind in self._kinds]  # type: ignore[misc]
        self._pins = Pins(ledger.pools, self._freed_of_pins, clock)
        for kind, pool in enumerate(ledger.pools):
            pool.evictor = _Room(self, kind)

    def lookup(self, tokens: Sequence[int], salt: str | None = "", *, limit: int | None = None) -> Match:
        """The longest prefix of at most `limit` tokens that can be taken over, in this tenant's tree or the public one.

        Changes nothing but pins that are over; `take` it before anything else is allocated.
        """
        with self._lock:
            self._pins.expire()
            most = len(tokens) if limit is None else min(limit, len(tokens))
            own = matching.find(self._roots.get(salt), tokens, most, self.windows, self.page_size)
            public = matching.find(self._roots.get(PUBLIC), tokens, most, self.windows, self.page_size)
            return public if public.num_tokens > own.num_tokens else own

    def num_usable(self, tokens: Sequence[int], salt: str | None = "") -> int:
        """How many tokens `lookup` would find now; changes nothing, and can be asked by any thread."""
        with self._lock:
            found = [
                matching.find(self._roots.get(one), tokens, len(tokens) - 1, self.windows, self.page_size)
                for one in (salt, PUBLIC)
            ]
            return max(one.num_tokens for one in found)

    def nodes(self, tokens: Sequence[int], salt: str | None = "") -> tuple[Node, ...]:
        """What there is of these tokens in one tenant's tree, whole nodes alone; pages of windows may be missing."""
        with self._lock:
            match = matching.find(self._roots.get(salt), tokens, len(tokens), self.windows, self.page_size)
            return tuple(node for node in match.path if node.end <= match.num_known)

    def take(self, match: Match, holding: Holding, salt: str | None = "", *, only_whole_pages: bool = False) -> Match:
        """Let a holding that is empty begin with what was found; returns what it now has.

        only_whole_pages: leave out a last page that is not full, which would be copied when the sequence grows.
        """
        with self._lock:
            if only_whole_pages and match.num_tokens % self.page_size:
                match = matching.cut(match, self.windows, self.page_size)
            root, tally = self._root(salt), self._root(salt).tally
            match = self._explained(match, root)
            tally.num_lookups += 1
            tally.num_asked += match.num_asked
            tally.num_found += match.num_tokens
            if match.num_tokens:
                for table, pages in zip(holding.tables, match.pages, strict=True):
                    table.adopt(pages, match.num_tokens)
                for node in match.nodes:
                    self.policy.touch(node, is_hit=True)
                self._pins.refresh(match.nodes)
            return match

    def insert(self, tokens: Sequence[int], holding: Holding, salt: str | None = "") -> int:
        """Keep the pages of a sequence whose first tokens, all computed, are these; returns how many tokens are new.

        The sequence may go on: a last page that is not full should then be left out, or it is copied. Of layers with a
        window, pages before the window of the last token and of the last whole page are left out.
        """
        with self._lock:
            assert len(tokens) <= holding.num_tokens, f"{len(tokens)} tokens, {holding.num_tokens} computed"
            node: Node = self._root(salt)
            num_new, is_new = 0, False
            for place, start in enumerate(range(0, len(tokens), self.page_size)):
                pages = [self._offered(holding, kind, place, len(tokens)) for kind in self._kinds]
                child, was_put = self._put(node, tuple(tokens[start : start + self.page_size]), pages)
                if child is None:
                    break
                node, is_new = child, was_put
                num_new += len(child.tokens) if is_new else 0
            for one in node.path():
                self.policy.touch(one, is_hit=False)
            if is_new:
                self._push_end(node)
                self._prune(node)
            root = self._root(salt)
            root.tally.num_inserted += num_new
            self._keep_to_budget(root)
            return num_new

    def pin(self, name: str, tokens: Sequence[int], salt: str | None = "", ttl_s: float | None = None) -> int:
        """Keep what is there of these tokens from eviction, for `ttl_s` seconds since its last use, or for good.

        Returns how many tokens that is; if none, nothing changes. A name that is in use is moved. Raises
        ArgumentError for a time that is not positive.
        """
        if ttl_s is not None and not ttl_s > 0:
            raise ArgumentError("ttl", "more than 0 seconds", ttl_s, "leave it out to keep it until it is unpinned")
        with self._lock:
            match = matching.find(self._roots.get(salt), tokens, len(tokens), self.windows, self.page_size)
            if match.num_tokens:
                # windows also at the end of the last whole page, where those begin that have no room for a copy
                whole = matching.cut(match, self.windows, self.page_size).pages
                short = len(match.nodes) - len(whole[0])
                both = zip(match.pages, ((*pages, *[NULL_PAGE] * short) for pages in whole), strict=True)
                pages = tuple(tuple(a or b for a, b in zip(*pair, strict=True)) for pair in both)
                self._pins.add(Pin(name, salt, match.nodes, pages, match.num_tokens, ttl_s))
            return match.num_tokens

    def unpin(self, name: str, salt: str | None = "") -> bool:
        """Let a pinned prefix be evicted as others are; False if there is none of that name."""
        with self._lock:
            return self._pins.remove(salt, name)

    def pins(self, salt: str | None = "") -> list[Pin]:
        """This tenant's pins."""
        with self._lock:
            self._pins.expire()
            return self._pins.of(salt)

    def give_way(self) -> int:
        """Take all pins back, for a request that could not be served beside them; returns how many there were."""
        with self._lock:
            return self._pins.clear()

    def counts(self, salt: str | None = "") -> Counts:
        """What became of this tenant's requests."""
        with self._lock:
            root = self._roots.get(salt)
            return Counts() if root is None else root.tally.counts()

    def salts(self) -> list[str | None]:
        """The tenants that were seen; for the operator."""
        return list(self._roots)

    def picture(self, salt: str | None = "") -> list[Kept]:
        """This tenant's tree, parents before children."""
        with self._lock:
            root = self._roots.get(salt)
            return [] if root is None else [_kept(node, depth) for node, depth in _walk(root)]

    def clear(self) -> None:
        """Part with everything, pins too."""
        with self._lock:
            self._pins.clear()
            for salt in self._roots:
                self.forget(salt)

    def forget(self, salt: str | None) -> None:
        """Part with all of one tenant's that is not pinned."""
        with self._lock:
            root = self._roots.get(salt)
            for node, _ in reversed(list(_walk(root))) if root is not None else ():
                if _is_end(node):
                    self._remove(node, "cleared")

    def held_pages(self) -> list[list[int]]:
        """Every page that the tree and its pins hold, as often as they do, by kind: for `Ledger.check_integrity`."""
        with self._lock:
            nodes = [node for root in self._roots.values() for node, _ in _walk(root)]
            return [[*(one.pages[kind] for one in nodes), *self._pins.pages(kind)] for kind in self._kinds]

    def num_evictable(self, kind: int) -> int:
        """How many pages of this kind `evict` would make free."""
        with self._lock:
            self._pins.expire()
            return self.ledger.pools[kind].num_idle

    def evict(self, kind: int, count: int) -> None:
        """Make `count` pages of this kind free, or as many as can be."""
        with self._lock:
            self._pins.expire()
            pool = self.ledger.pools[kind]
            goal = pool.num_free + min(count, pool.num_idle)
            if self.windows[kind] is None:
                self._evict_ends(pool, kind, goal)
            else:
                self._evict_windows(pool, kind, goal)

    @property
    def _kinds(self) -> range:
        return range(len(self.windows))

    def _root(self, salt: str | None) -> Root:
        if salt not in self._roots:
            self._roots[salt] = Root(salt, len(self.windows))
            self._ends[salt] = Queue(_is_end)
        return self._roots[salt]

    def _offered(self, holding: Holding, kind: int, place: int, num_tokens: int) -> int:
        """The page that is worth keeping of a sequence with a window, the null page if none is."""
        window = self.windows[kind]
        whole = num_tokens - num_tokens % self.page_size
        if window is not None and (place + 1) * self.page_size <= whole - window:
            return NULL_PAGE
        return holding.tables[kind].pages[place]

    def _put(self, parent: Node, tokens: Tokens, pages: list[int]) -> tuple[Node | None, bool]:
        """(the child that stands for these tokens, whether it is new); None where nothing can be kept."""
        child = parent.children.get(tokens)
        if child is not None:
            for kind, page in enumerate(pages):
                if child.pages[kind] == NULL_PAGE != page:
                    self._fill(child, kind, page)
            return child, False
        if any(page == NULL_PAGE for page, window in zip(pages, self.windows, strict=True) if window is None):
            return None, False
        before, after = parent.neighbours(tokens)
        if after is not None and after.tokens[: len(tokens)] == tokens:
            return None, False  # more than these are there
        if before is not None and not before.pins and before.tokens == tokens[: len(before.tokens)]:
            self._remove(before, None)  # fewer are
        child = Node(parent, tokens, [NULL_PAGE] * len(pages))
        parent.attach(child)
        child.root.tally.num_nodes += 1
        self.policy.touch(child, is_hit=False)
        for kind, page in enumerate(pages):
            self._fill(child, kind, page)
        return child, True

    def _fill(self, node: Node, kind: int, page: int) -> None:
        self.ledger.pools[kind].keep(page)
        node.pages[kind] = page
        if self.windows[kind] is not None and page != NULL_PAGE:
            self._in_window[kind].push(node)
            self._in_window[kind].tidy(self.ledger.pools[kind].num_pages)

    def _push_end(self, node: Node) -> None:
        self._every_end.push(node)
        self._every_end.tidy(sum(root.tally.num_nodes for root in self._roots.values()))
        own = self._ends[node.root.salt]
        own.push(node)
        own.tidy(node.root.tally.num_nodes)

    def _keep_to_budget(self, root: Root) -> None:
        budgets = self._budgets
        most = budgets.get(root.salt or "") if isinstance(budgets, Mapping) else budgets
        while most is not None and root.salt is not PUBLIC and root.tally.num_nodes > most:
            node = self._ends[root.salt].pop()
            if node is None:
                return
            self._remove(node, "budget")

    def _evict_ends(self, pool: PagePool, kind: int, goal: int) -> None:
        """Part with ends whose pages nobody else holds; then with ends in use, to get at what is idle before them."""
        in_use: list[Node] = []
        while pool.num_free < goal:
            node = self._every_end.pop()
            if node is None:
                if not in_use:
                    break
                self._remove(in_use.pop(0), "room")
            elif pool.is_idle(node.pages[kind]) or node.pages[kind] == NULL_PAGE:
                self._remove(node, "room")
            else:
                in_use.append(node)
        for node in in_use:
            self._every_end.push(node)

    def _evict_windows(self, pool: PagePool, kind: int, goal: int) -> None:
        """Part with pages of one kind alone; what layers without a window have stays."""
        in_use: list[Node] = []
        while pool.num_free < goal:
            node = self._in_window[kind].pop()
            if node is None:
                break
            if not pool.is_idle(node.pages[kind]):
                in_use.append(node)
                continue
            pool.drop(node.pages[kind])
            node.pages[kind] = NULL_PAGE
            self._prune(node)
        for node in in_use:
            self._in_window[kind].push(node)

    def _prune(self, node: Node) -> None:
        """Part with ends that have no page left."""
        while _is_end(node) and not any(node.pages) and node.parent is not None:
            self._remove(node, "room")
            node = node.parent

    def _remove(self, node: Node, cause: str | None) -> None:
        """Part with a node that nothing is behind. cause: None if it is replaced by more of the same."""
        parent = node.parent
        assert parent is not None and node.is_leaf and not node.pins, "a node that is needed cannot go"
        parent.detach(node)
        for pool, page in zip(self.ledger.pools, node.pages, strict=True):
            pool.drop(page)
        tally = node.root.tally
        tally.num_nodes -= 1
        if cause is not None:
            tally.num_evicted += len(node.tokens)
            self.policy.went(node)
            self._remarks.add(node.root.salt, parent.trail, node.tokens, cause, self.actor, self.clock())
            if parent.is_leaf and not isinstance(parent, Root):
                self._push_end(parent)

    def _explained(self, match: Match, root: Root) -> Match:
        def gone(trail: int, page: Tokens) -> Eviction | None:
            return self._remarks.find(root.salt, trail, page, self.clock())

        return matching.explain(match, root, self.page_size, gone)

    def _freed_of_pins(self, nodes: Sequence[Node]) -> None:
        """Ends that were pinned can go again."""
        for node in nodes:
            if _is_end(node) and not node.is_gone:
                self._push_end(node)


class _Room:
    """What a pool asks for pages (`Evictor`)."""

    def __init__(self, tree: PrefixTree, kind: int) -> None:
        self._tree, self._kind = tree, kind

    def num_evictable(self) -> int:
        return self._tree.num_evictable(self._kind)

    def evict(self, count: int) -> None:
        self._tree.evict(self._kind, count)


def _kept(node: Node, depth: int) -> Kept:
    return Kept(depth=depth, tokens=node.tokens, hits=node.hits, is_pinned=node.pins > 0, is_end=node.is_leaf)


def _is_end(node: Node) -> bool:
    return node.is_leaf and not node.pins and not isinstance(node, Root)


def _walk(root: Root) -> Iterator[tuple[Node, int]]:
    """Every node below a root with its depth, parents first."""
    waiting: list[tuple[Node, int]] = [(root.children[key], 0) for key in reversed(root.keys)]
    while waiting:
        node, depth = waiting.pop()
        yield node, depth
        waiting += [(node.children[key], depth + 1) for key in reversed(node.keys)]


__all__ = ["PUBLIC", "Kept", "PrefixTree"]
