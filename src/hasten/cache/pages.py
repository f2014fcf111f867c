"""The accountant of pages: which are free, who holds which, and when a write needs a copy first.

Plain numbers: no tensor is touched here. `PagePool` counts references; `Table` is the pages of one sequence in
the layers of one kind. Called by `ledger.py`; a prompt cache holds pages beside the sequences (`Evictor`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from hasten.errors import ArgumentError, HastenError

# never given out: stands for pages that were given back, and takes the writes of rows that are padding
NULL_PAGE = 0


class OutOfPages(HastenError):
    """A pool has fewer pages than were asked for; nothing was taken."""


class Copy(NamedTuple):
    """The content of page `source` is to be copied to page `target`, before anything is written in this step."""

    source: int
    target: int


class Evictor(Protocol):
    """Who else holds pages and can part with them: a prompt cache."""

    def num_evictable(self) -> int:
        """How many pages `evict` could make free now."""

    def evict(self, count: int) -> None:
        """Make at least `count` pages free, by `pool.free`, or as many as can be."""


class PagePool:
    """Pages 1 to `num_pages`, each free or held by at least one; page 0 is never given out.

    Raises ArgumentError for a size below 1.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ArgumentError(name, "at least 1", value, "a pool holds tokens in pages")
        self.num_pages, self.page_size = num_pages, page_size
        self.evictor: Evictor | None = None
        self._counts = [0] * (num_pages + 1)
        self._kept = [0] * (num_pages + 1)  # how many of these holds are an evictor's (`keep`)
        self._num_idle = 0
        self._free = list(range(num_pages, 0, -1))  # the last given back is the next given out: it is warm

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could give: the free ones and those an evictor would part with."""
        return self.num_free + (0 if self.evictor is None else self.evictor.num_evictable())

    @property
    def num_idle(self) -> int:
        """Pages that nobody holds but by `keep`: what a prompt cache could part with."""
        return self._num_idle

    def is_idle(self, page: int) -> bool:
        """True if nobody holds this page but by `keep`."""
        return 0 < self._kept[page] == self._counts[page]

    def keep(self, page: int) -> None:
        """Hold a page once more, ready to part with it; the null page is passed over."""
        if page != NULL_PAGE:
            assert self._counts[page] > 0, f"page {page} is free and cannot be kept"
            self._counts[page] += 1
            self._kept[page] += 1

    def drop(self, page: int) -> None:
        """Take a `keep` back; whoever was the last makes the page free. The null page is passed over."""
        if page != NULL_PAGE:
            assert self._kept[page] > 0, f"page {page} was not kept"
            self._num_idle -= int(self._kept[page] == self._counts[page] == 1)
            self._counts[page] -= 1
            self._kept[page] -= 1
            if self._counts[page] == 0:
                self._free.append(page)

    def count(self, page: int) -> int:
        """How many hold this page."""
        return self._counts[page]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each held once, evicting if need be. Raises OutOfPages and takes none."""
        if count > self.num_free and self.evictor is not None:
            self.evictor.evict(count - self.num_free)
        if count > self.num_free:
            raise OutOfPages(f"pages: {count} asked for, {self.num_free} of {self.num_pages} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold these pages once more; the null page is passed over."""
        for page in pages:
            if page != NULL_PAGE:
                assert self._counts[page] > 0, f"page {page} is free and cannot be shared"
                self._num_idle -= int(self.is_idle(page))
                self._counts[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Hold these pages once less; whoever was the last makes them free. The null page is passed over."""
        for page in pages:
            if page != NULL_PAGE:
                assert self._counts[page] > 0, f"page {page} is free and was given back again"
                self._counts[page] -= 1
                assert self._counts[page] >= self._kept[page], f"page {page} is kept, and was given back by another"
                self._num_idle += int(self.is_idle(page))
                if self._counts[page] == 0:
                    self._free.append(page)

    def check_integrity(self, holders: Iterable[Iterable[int]] | None = None) -> None:
        """Raise AssertionError unless every page is either free or held, as often as `holders` list it if given."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        assert free <= set(range(1, self.num_pages + 1)), "a page that does not exist is free"
        assert self._counts[NULL_PAGE] == 0, "somebody holds the null page"
        for page in range(1, self.num_pages + 1):
            assert (self._counts[page] == 0) == (page in free), f"page {page}: held {self._counts[page]} times and free"
        idle = sum(self.is_idle(page) for page in range(1, self.num_pages + 1))
        assert idle == self._num_idle, f"{self._num_idle} pages counted as idle, {idle} are"
        if holders is not None:
            held = Counter(page for pages in holders for page in pages if page != NULL_PAGE)
            for page in range(1, self.num_pages + 1):
                found = f"page {page}: counted {self._counts[page]} times, held {held[page]} times"
                assert self._counts[page] == held[page], found


class Table:
    """The pages of one sequence, in order: token i is in page `pages[i // page_size]`.

    window: a token sees that many before it, or all (None). Pages that no later token sees can be given back
    (`slide`); the null page then stands in their place. What is before `first_kept` is gone.
    """

    def __init__(self, pool: PagePool, window: int | None = None) -> None:
        self.pool, self.window = pool, window
        self.pages: list[int] = []
        self.num_tokens = 0
        self._num_slid = 0  # pages at the front that were given back

    @property
    def first_kept(self) -> int:
        """The first token that is still in a page."""
        return min(self._num_slid * self.pool.page_size, self.num_tokens)

    def pages_to_grow(self, count: int) -> int:
        """How many pages `grow(count)` takes out of the pool."""
        end = -(-(self.num_tokens + count) // self.pool.page_size)
        return max(0, end - len(self.pages)) + int(count > 0 and self._must_copy())

    def grow(self, count: int) -> list[Copy]:
        """Make room for `count` more tokens, all of which may then be written; returns what to copy before.

        A page that others hold too is not written to: it is copied. Raises OutOfPages and changes nothing.
        """
        must_copy = count > 0 and self._must_copy()  # before an evictor, asked for pages, parts with this one
        new = self.pool.allocate(self.pages_to_grow(count))
        copies = []
        if must_copy:
            place = self.num_tokens // self.pool.page_size
            copies.append(Copy(self.pages[place], new[0]))
            self.pool.free([self.pages[place]])
            self.pages[place] = new.pop(0)
        self.pages += new
        self.num_tokens += count
        return copies

    def fork(self) -> Table:
        """Another sequence with the same tokens so far, in the same pages."""
        other = Table(self.pool, self.window)
        other.adopt(self.pages, self.num_tokens)
        return other

    def adopt(self, pages: Iterable[int], num_tokens: int) -> None:
        """Begin with tokens that others have written, in pages that they hold and this now holds too.

        With a window, null pages may stand for those at the front that no token sees any more.
        """
        assert not self.pages, "a table that holds pages cannot adopt others"
        self.pages = list(pages)
        assert len(self.pages) == -(-num_tokens // self.pool.page_size), f"{len(self.pages)} pages, {num_tokens} tokens"
        self.pool.share(self.pages)
        self.num_tokens = num_tokens
        self._num_slid = next((place for place, page in enumerate(self.pages) if page != NULL_PAGE), len(self.pages))

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`, and give back what only they needed.

        Raises ArgumentError as `check_cut` does.
        """
        self.check_cut(num_tokens)
        keep = -(-num_tokens // self.pool.page_size)
        self.pool.free(reversed(self.pages[keep:]))
        del self.pages[keep:]
        self.num_tokens = num_tokens
        self._num_slid = min(self._num_slid, keep)

    def check_cut(self, num_tokens: int) -> None:
        """Raise ArgumentError for more tokens than there are, and where the window before the cut was given back."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise ArgumentError("num_tokens", f"0 to {self.num_tokens}", num_tokens, "a sequence can only be cut")
        if 0 < num_tokens < self.num_tokens and self._first_seen(num_tokens) < self.first_kept:
            expected = f"a cut whose window begins at or after token {self.first_kept}"
            raise ArgumentError("num_tokens", expected, num_tokens, "compute the sequence again from its beginning")

    def slide(self) -> None:
        """Give back the pages that no token from now on sees: those before the window of the next one."""
        num_gone = self._first_seen(self.num_tokens) // self.pool.page_size
        for place in range(self._num_slid, num_gone):
            self.pool.free([self.pages[place]])
            self.pages[place] = NULL_PAGE
        self._num_slid = max(self._num_slid, num_gone)

    def free(self) -> None:
        """Give back everything."""
        self.truncate(0)

    def _first_seen(self, position: int) -> int:
        return 0 if self.window is None else max(0, position - self.window)

    def _must_copy(self) -> bool:
        place, filled = divmod(self.num_tokens, self.pool.page_size)
        return filled > 0 and self.pool.count(self.pages[place]) > 1


__all__ = ["NULL_PAGE", "Copy", "Evictor", "OutOfPages", "PagePool", "Table"]
