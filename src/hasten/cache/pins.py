"""Prefixes that are kept from eviction by name, for a time or for good. Called by prefix.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hasten.cache.nodes import Node
from hasten.cache.pages import PagePool


@dataclass(eq=False)
class Pin:
    """num_tokens of a tenant's prefix. ttl_s: seconds since its last use, None for good. expires_s: on the clock."""

    name: str
    salt: str | None
    nodes: tuple[Node, ...]
    pages: tuple[tuple[int, ...], ...]
    num_tokens: int
    ttl_s: float | None = None
    expires_s: float | None = None


class Pins:
    """Every pin of a tree; each holds its pages beside the tree.

    freed: is told the nodes whose last pin has gone. clock: seconds.
    """

    def __init__(
        self, pools: Sequence[PagePool], freed: Callable[[Sequence[Node]], None], clock: Callable[[], float]
    ) -> None:
        self._pools, self._freed, self._clock = pools, freed, clock
        self._pins: dict[tuple[str | None, str], Pin] = {}
        self._next_s = float("inf")  # when the first is over

    def add(self, pin: Pin) -> None:
        """Hold what a pin names, in the place of another of its name."""
        for node in pin.nodes:
            node.pins += 1
        for pool, pages in zip(self._pools, pin.pages, strict=True):
            pool.share(pages)
        self.remove(pin.salt, pin.name)
        self._pins[pin.salt, pin.name] = pin
        self._renew(pin)

    def remove(self, salt: str | None, name: str) -> bool:
        """Let go of a pin; False if there is none."""
        pin = self._pins.pop((salt, name), None)
        if pin is None:
            return False
        for pool, pages in zip(self._pools, pin.pages, strict=True):
            pool.free(pages)
        for node in pin.nodes:
            node.pins -= 1
        self._freed([node for node in pin.nodes if not node.pins])
        return True

    def refresh(self, nodes: Sequence[Node]) -> None:
        """Begin the time of those pins anew whose last token was taken over."""
        if self._pins and any(node.pins for node in nodes):
            used = set(map(id, nodes))
            for pin in self._pins.values():
                if pin.nodes and id(pin.nodes[-1]) in used:
                    self._renew(pin)

    def expire(self) -> None:
        """Let go of the pins whose time is over."""
        now = self._clock() if self._next_s < float("inf") else 0.0
        if now < self._next_s:
            return
        for pin in list(self._pins.values()):
            if pin.expires_s is not None and pin.expires_s <= now:
                self.remove(pin.salt, pin.name)
        self._next_s = min(
            (one.expires_s for one in self._pins.values() if one.expires_s is not None), default=float("inf")
        )

    def of(self, salt: str | None) -> list[Pin]:
        """One tenant's pins."""
        return [pin for pin in self._pins.values() if pin.salt == salt]

    def pages(self, kind: int) -> list[int]:
        """Every page of a kind that a pin holds, as often as pins do."""
        return [page for pin in self._pins.values() for page in pin.pages[kind]]

    def clear(self) -> int:
        """Let go of all; returns how many there were."""
        count = len(self._pins)
        for salt, name in list(self._pins):
            self.remove(salt, name)
        return count

    def _renew(self, pin: Pin) -> None:
        if pin.ttl_s is not None:
            pin.expires_s = self._clock() + pin.ttl_s
            self._next_s = min(self._next_s, pin.expires_s)


__all__ = ["Pin", "Pins"]
