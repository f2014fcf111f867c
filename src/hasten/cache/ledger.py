"""The pages of whole sequences: a pool for each kind of layer, and all of them grow together or not at all.

Layers that see everything keep every page; layers with a window keep what the window still reaches. Called by
the scheduler of the engine; plain numbers, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hasten.cache.pages import NULL_PAGE, Copy, OutOfPages, PagePool, Table


class Ledger:
    """One pool for each kind of layer. windows: how many tokens before its own a token of that kind sees, None all.

    num_pages: of each pool. All have the same page size.
    """

    def __init__(self, windows: Sequence[int | None], num_pages: Sequence[int], page_size: int) -> None:
        self.windows, self.page_size = tuple(windows), page_size
        self.pools = tuple(PagePool(count, page_size) for count in num_pages)
        assert len(self.pools) == len(self.windows) > 0, f"{len(self.pools)} pools for {len(self.windows)} kinds"

    def open(self) -> Holding:
        """What a new sequence holds: nothing yet."""
        return Holding(self, tuple(Table(*kind) for kind in zip(self.pools, self.windows, strict=True)))

    def pages_of(self, num_tokens: int, chunk: int) -> tuple[int, ...]:
        """The most pages that a sequence of `num_tokens` ever holds, computed `chunk` tokens at a time, by kind."""
        return tuple(self._most(window, num_tokens, chunk) for window in self.windows)

    def fits(self, num_tokens: int, chunk: int, num_sequences: int = 1) -> bool:
        """True if so many sequences of `num_tokens` each can be computed together with every pool to themselves.

        Several need a page beside each that runs when the last of them is let in (`has_room`).
        """
        most = [num_sequences * count + num_sequences - 1 for count in self.pages_of(num_tokens, chunk)]
        return all(count <= pool.num_pages for count, pool in zip(most, self.pools, strict=True))

    def has_room(self, num_tokens: int, chunk: int, spare: int = 0) -> bool:
        """True if a new sequence of `num_tokens` could be computed now, with `spare` pages of each kind left."""
        most = self.pages_of(num_tokens, chunk)
        return all(count + spare <= pool.num_available for count, pool in zip(most, self.pools, strict=True))

    @property
    def num_free(self) -> tuple[int, ...]:
        """Free pages, by kind."""
        return tuple(pool.num_free for pool in self.pools)

    def check_integrity(self, holdings: Iterable[Holding], others: Sequence[Iterable[int]] = ()) -> None:
        """Raise AssertionError unless these holdings, and pages that others hold (by kind), are all that is held."""
        every = list(holdings)
        for kind, pool in enumerate(self.pools):
            held: list[Iterable[int]] = [one.tables[kind].pages for one in every]
            pool.check_integrity([*held, *(others[kind : kind + 1])])

    def _most(self, window: int | None, num_tokens: int, chunk: int) -> int:
        whole = -(-num_tokens // self.page_size)
        if window is None:
            return whole
        # a window and a chunk that begin in the middle of a page
        return min(whole, (window + chunk + self.page_size - 2) // self.page_size + 1)


class Holding:
    """The pages of one sequence: a table for each kind of layer, all of the same length."""

    def __init__(self, ledger: Ledger, tables: tuple[Table, ...]) -> None:
        self.ledger, self.tables = ledger, tables

    @property
    def num_tokens(self) -> int:
        """How many tokens there is room for."""
        return self.tables[0].num_tokens

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Pages held, by kind."""
        return tuple(sum(page != NULL_PAGE for page in table.pages) for table in self.tables)

    def can_grow(self, count: int) -> bool:
        """True if `grow(count)` would succeed."""
        return all(table.pages_to_grow(count) <= table.pool.num_available for table in self.tables)

    def grow(self, count: int) -> tuple[list[Copy], ...]:
        """Make room for `count` more tokens in every kind of layer; returns what to copy first, by kind.

        Raises OutOfPages and changes nothing.
        """
        if not self.can_grow(count):
            raise OutOfPages(f"pages: no room for {count} more tokens after {self.num_tokens}")
        return tuple(table.grow(count) for table in self.tables)

    def fork(self) -> Holding:
        """Another sequence with the same tokens so far, in the same pages."""
        return Holding(self.ledger, tuple(table.fork() for table in self.tables))

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`. Raises ArgumentError, and changes nothing, where that cannot be."""
        for table in self.tables:
            table.check_cut(num_tokens)
        for table in self.tables:
            table.truncate(num_tokens)

    def slide(self) -> None:
        """Give back the pages that no token from now on sees."""
        for table in self.tables:
            table.slide()

    def free(self) -> None:
        """Give back everything."""
        for table in self.tables:
            table.free()


__all__ = ["Holding", "Ledger"]
