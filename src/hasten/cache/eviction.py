"""Which page of tokens goes first: the least recently used, the least often used, or the cheapest to compute again.

A queue that is cheap to keep: a node that was used since it was put in is moved when it comes up. Called by prefix.py.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from hasten.cache.nodes import Node
from hasten.errors import ArgumentError

Entry = tuple[tuple[float, ...], int, Node]
Cost = Callable[[int, int], float]  # (tokens before, tokens) -> what computing them takes, in any unit

POLICIES = ("lru", "lfu", "cost")


class Policy:
    """Values of nodes, of which the least goes first.

    name: "lru" by last use, "lfu" by number of hits and then by last use, "cost" by hits times what computing the page
    again would take, to which what has gone before is added, so that what is never used again goes in the end (known
    as GreedyDual). cost: needed for the last. Raises ArgumentError for another name.
    """

    def __init__(self, name: str, cost: Cost | None = None) -> None:
        if name not in POLICIES:
            raise ArgumentError("eviction", f"one of {', '.join(POLICIES)}", repr(name), "lru is a good one")
        self.name, self._cost, self._tick, self._age = name, cost or _alike, 0, 0.0

    def touch(self, node: Node, *, is_hit: bool) -> None:
        """Write down that a node was used now."""
        self._tick += 1
        node.tick, node.hits = self._tick, node.hits + int(is_hit)
        if self.name == "lru":
            node.value = (self._tick,)
        elif self.name == "lfu":
            node.value = (node.hits, self._tick)
        else:
            again = (node.hits + 1) * self._cost(node.start, len(node.tokens))
            node.value = (self._age + again, self._tick)

    def went(self, node: Node) -> None:
        """Write down that a node was evicted."""
        if self.name == "cost":
            self._age = max(self._age, node.value[0])


class Queue:
    """Nodes by their values. is_candidate: whether a node that comes up could go at all; if not it is left out."""

    def __init__(self, is_candidate: Callable[[Node], bool]) -> None:
        self._is_candidate = is_candidate
        self._entries: list[Entry] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, node: Node) -> None:
        """Put a node in; one that is in already comes up once more, and is then left out."""
        heapq.heappush(self._entries, (node.value, next(self._numbers), node))

    def pop(self) -> Node | None:
        """The candidate with the least value, taken out; None if there is none."""
        while self._entries:
            value, _, node = heapq.heappop(self._entries)
            if node.is_gone or not self._is_candidate(node):
                continue
            if value == node.value:
                return node
            self.push(node)
        return None

    def tidy(self, num_nodes: int) -> None:
        """Leave out what could not go, once there are many more entries than nodes."""
        if len(self._entries) > 64 + 4 * num_nodes:
            alive = {id(node): node for _, _, node in self._entries if not node.is_gone and self._is_candidate(node)}
            self._entries = [(node.value, next(self._numbers), node) for node in alive.values()]
            heapq.heapify(self._entries)


def _alike(start: int, count: int) -> float:
    return float(count)


__all__ = ["POLICIES", "Cost", "Policy", "Queue"]
