"""Between the pages of an engine and what is kept outside: saves prefixes as pieces, and puts pieces into pages.

Whether that pays is measured: how fast the model computes tokens, and how fast pieces come back. Called by the engine
through its prompt cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hasten.cache.eviction import Cost
from hasten.cache.match import Match, cut
from hasten.cache.nodes import num_shared
from hasten.cache.paged import PagedCache
from hasten.cache.pages import NULL_PAGE
from hasten.cache.pieces import PIECE_TOKENS, Piece, key_of, root_of
from hasten.cache.prefix import PUBLIC, PrefixTree
from hasten.cache.tiers import Tiers

RULES = ("measured", "always", "never")


class Kept:
    """What one engine keeps outside of its pages.

    fingerprint: of all that K and V depend on beside the tokens. rule: when to put pieces into pages instead of
    computing them: "measured", "always" or "never". cost: of computing tokens behind others, in any unit.
    measure: seconds in which the model computes so many first tokens, asked once, when there is a choice to make.
    """

    def __init__(
        self,
        tree: PrefixTree,
        pages: PagedCache,
        tiers: Tiers,
        fingerprint: str,
        cost: Cost,
        rule: str,
        measure: Callable[[int], float | None],
    ) -> None:
        self.tree, self.pages, self.tiers, self.fingerprint = tree, pages, tiers, fingerprint
        self.rule, self.is_off, self._cost = rule, False, cost
        self.seconds_per_cost: float | None = None
        self._measure = measure
        self.num_restored = self.num_recomputed = 0  # tokens that came back, and that were known and computed again

    def is_worth(self, before: int, count: int, nbytes: int) -> bool:
        """True if `nbytes` come back from disk faster than `count` tokens behind `before` others are computed."""
        if self.rule != "measured":
            return self.rule == "always"
        if self.seconds_per_cost is None or self.tiers.bytes_per_s is None:
            return True
        return nbytes / self.tiers.bytes_per_s < self._cost(before, count) * self.seconds_per_cost

    def fetch(self, tokens: Sequence[int], salt: str | None) -> list[Piece]:
        """The pieces with which a prompt would begin, if they are more than the tree has, and pay. For any thread."""
        if self.is_off or self.rule == "never":
            return []
        limit, known = len(tokens) - 1, self.tree.num_usable(tokens, salt)
        if limit - known < self.tree.page_size:
            return []
        found = max(
            (self.tiers.find(root_of(self.fingerprint, one), tokens, limit) for one in {salt, PUBLIC}),
            key=lambda one: one.num_tokens,
        )
        count = found.num_tokens - known
        if count < self.tree.page_size:
            return []
        nbytes = found.nbytes * count // found.num_tokens
        if found.is_on_disk and self.rule == "measured":
            self._measure_once(found.keys[0])
        if found.is_on_disk and not self.is_worth(known, count, nbytes):
            self.num_recomputed += count
            return []
        first = known // PIECE_TOKENS
        return self.tiers.load(found.keys[first:])

    def _measure_once(self, key: str) -> None:
        if self.tiers.bytes_per_s is None:
            self.tiers.measure(key)
        if self.seconds_per_cost is None:
            self.seconds_per_cost, self.is_off = float("inf"), True  # nobody else asks, and nothing of it is saved
            seconds = self._measure(PIECE_TOKENS)
            self.is_off = False
            if seconds is not None:
                self.seconds_per_cost = seconds / self._cost(0, PIECE_TOKENS)

    def restore(self, match: Match, some: Sequence[Piece], salt: str | None) -> int:
        """Put pieces behind what was found in the tree, into pages and the tree; returns how many tokens came.

        Of the pieces those tokens count that the prompt has. Does nothing if there is no room.
        """
        size, ledger, tokens = self.tree.page_size, self.tree.ledger, match.tokens
        end, whole = shared_end(tokens, match.limit, some), cut(match, self.tree.windows, size)
        first = whole.num_tokens // size
        if self.is_off or end <= match.num_tokens or some[0].start > whole.num_tokens:
            return 0
        wanted = self._places(some, first, -(-end // size))
        num_needed = [len(new) + len(old) for new, old in zip(wanted, whole.pages, strict=True)]
        if any(count > pool.num_available for count, pool in zip(num_needed, ledger.pools, strict=True)):
            return 0
        holding = ledger.open()
        for kind, (pool, table) in enumerate(zip(ledger.pools, holding.tables, strict=True)):
            pool.share(whole.pages[kind])  # or they might be evicted for the new ones
            new = pool.allocate(len(wanted[kind]))
            self._write(kind, new, some, wanted[kind])
            spread = dict(zip(wanted[kind], new, strict=True))
            behind = [spread.get(place, NULL_PAGE) for place in range(first, -(-end // size))]
            table.adopt([*whole.pages[kind], *behind], end)
            pool.free([*new, *whole.pages[kind]])
        self.tree.insert(tokens[:end], holding, salt)
        holding.free()
        self.num_restored += end - match.num_tokens
        return end - match.num_tokens

    def save(self, tokens: Sequence[int], salt: str | None) -> None:
        """Keep what the tree has of these tokens, as pieces, as far as it is not kept; no rest of less than a page."""
        if self.is_off:
            return
        size, parent = self.tree.page_size, root_of(self.fingerprint, salt)
        nodes = self.tree.nodes(tokens, salt)
        for start in range(0, sum(len(node.tokens) for node in nodes), PIECE_TOKENS):
            own = nodes[start // size : (start + PIECE_TOKENS) // size]
            part = tuple(token for node in own for token in node.tokens)
            places = tuple(
                tuple(place for place, node in enumerate(own) if node.pages[kind] != NULL_PAGE)
                for kind in range(len(self.tree.windows))
            )
            key = key_of(parent, part)
            if len(part) >= size and not self.tiers.knows(key, sum(map(len, places))):
                pages = tuple(
                    tuple(self.pages.read_pages(kind, [own[place].pages[kind] for place in some]))
                    for kind, some in enumerate(places)
                )
                self.tiers.put(Piece(parent, start, part, places, pages))
            parent = key

    def turn_off(self) -> None:
        """The weights are others now: nothing that is kept fits, and nothing new can be told apart."""
        self.is_off = True

    def _places(self, some: Sequence[Piece], first: int, last: int) -> list[list[int]]:
        """For each kind the places of the prompt's pages, from `first` to `last`, that pieces have."""
        size = self.tree.page_size
        return [
            [
                place
                for piece in some
                for place in (piece.start // size + one for one in piece.places[kind])
                if first <= place < last
            ]
            for kind in range(len(self.tree.windows))
        ]

    def _write(self, kind: int, new: Sequence[int], some: Sequence[Piece], wanted: Sequence[int]) -> None:
        size, places = self.tree.page_size, set(wanted)
        done = 0
        for piece in some:
            rows = [row for row, one in enumerate(piece.places[kind]) if piece.start // size + one in places]
            targets = new[done : done + len(rows)]
            done += len(rows)
            if rows:
                self.pages.write_pages(kind, targets, [tensor[rows[0] : rows[-1] + 1] for tensor in piece.pages[kind]])


def shared_end(tokens: Sequence[int], limit: int, some: Sequence[Piece]) -> int:
    """Where the tokens end that a prompt has in common with pieces."""
    end = some[0].start if some else 0
    for piece in some:
        wanted = tuple(tokens[piece.start : min(piece.start + len(piece.tokens), limit)])
        shared = num_shared(wanted, piece.tokens) if piece.start == end else 0
        end += shared
        if shared < len(piece.tokens):
            break
    return end


__all__ = ["RULES", "Kept", "shared_end"]
