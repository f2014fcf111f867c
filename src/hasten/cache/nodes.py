"""The nodes of a prefix tree: a page of tokens each, and the pages of the pools in which their K and V lie.

Called by prefix.py alone. Real tokens are compared everywhere: what is equal is equal, whatever it hashes to.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from hasten.cache.pages import NULL_PAGE

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """What became of one tenant's requests, in tokens. num_nodes: pages of tokens that are in its tree now."""

    num_lookups: int = 0
    num_asked: int = 0
    num_found: int = 0
    num_inserted: int = 0
    num_evicted: int = 0
    num_nodes: int = 0


class Node:
    """One page of tokens behind those of its parents; fewer than a page only without children.

    pages: of each kind of layer, the null page where it is not there. trail: stands for all tokens up to its end, for
    remarks on what is gone; nothing is ever found by it. value: what eviction goes by, the least first.
    """

    __slots__ = (
        *("children", "hits", "is_gone", "keys", "pages", "parent", "pins"),
        *("root", "start", "tick", "tokens", "trail", "value"),
    )

    def __init__(self, parent: Node | None, tokens: Tokens, pages: list[int]) -> None:
        self.parent, self.tokens, self.pages = parent, tokens, pages
        self.root: Root = self if isinstance(self, Root) else parent.root  # type: ignore[union-attr]
        self.start: int = 0 if parent is None else parent.end
        self.trail: int = 0 if parent is None else hash((parent.trail, tokens))
        self.children: dict[Tokens, Node] = {}
        self.keys: list[Tokens] = []  # of the children, sorted: those that share most with a page are neighbours of it
        self.pins = self.hits = self.tick = 0
        self.value: tuple[float, ...] = (0.0,)
        self.is_gone = False

    @property
    def end(self) -> int:
        """How many tokens there are up to its last."""
        return self.start + len(self.tokens)

    @property
    def is_leaf(self) -> bool:
        """True if nothing is behind it."""
        return not self.children

    def nearest(self, page: Tokens) -> tuple[Node | None, int]:
        """(the child that shares most tokens with this page, how many)."""
        exact = self.children.get(page)
        if exact is not None:
            return exact, len(page)
        place = bisect_left(self.keys, page)
        best, most = None, 0
        for key in self.keys[max(0, place - 1) : place + 1]:
            shared = num_shared(key, page)
            if shared > most:
                best, most = self.children[key], shared
        return best, most

    def neighbours(self, page: Tokens) -> tuple[Node | None, Node | None]:
        """(the last child before a page that is not there, the first after it), in the order of their tokens."""
        place = bisect_left(self.keys, page)
        before = self.children[self.keys[place - 1]] if place else None
        return before, self.children[self.keys[place]] if place < len(self.keys) else None

    def attach(self, child: Node) -> None:
        """Put a new child in."""
        assert child.tokens not in self.children, "a page of tokens is there twice"
        self.children[child.tokens] = child
        insort(self.keys, child.tokens)

    def detach(self, child: Node) -> None:
        """Take a child out."""
        del self.children[child.tokens]
        del self.keys[bisect_left(self.keys, child.tokens)]
        child.is_gone = True

    def path(self) -> list[Node]:
        """From the first page of tokens to this one."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


@dataclass(eq=False)
class Tally:
    """`Counts` while they change."""

    num_lookups: int = 0
    num_asked: int = 0
    num_found: int = 0
    num_inserted: int = 0
    num_evicted: int = 0
    num_nodes: int = 0

    def counts(self) -> Counts:
        """As they are now."""
        return Counts(**vars(self))


class Root(Node):
    """The beginning of one tenant's tree."""

    __slots__ = ("salt", "tally")

    def __init__(self, salt: str | None, num_kinds: int) -> None:
        super().__init__(None, (), [NULL_PAGE] * num_kinds)
        self.salt, self.tally = salt, Tally()


def num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    if one == other:
        return len(one)
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


__all__ = ["Counts", "Node", "Root", "Tokens", "num_shared"]
