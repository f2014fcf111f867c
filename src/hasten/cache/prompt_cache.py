"""`hasten.PromptCache`: the settings of a prompt cache, and the object by which a user reaches it.

Given to an engine, or used by itself with a transformers model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from hasten.cache.eviction import POLICIES, Cost
from hasten.cache.ledger import Ledger
from hasten.cache.nodes import Counts
from hasten.cache.prefix import PUBLIC, PrefixTree
from hasten.errors import ArgumentError

Answered = TypeVar("Answered")
Prompt = str | Sequence[int]


class Host(Protocol):
    """Who computes: an engine (engine/cache_host.py)."""

    def encode(self, prompt: Prompt, *, is_chat: bool = False) -> list[int]:
        """Token ids of a prompt."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""

    def compute(self, ids: Sequence[int], salt: str | None) -> None:
        """Leave K and V of these tokens in the cache."""

    def call(self, function: Callable[[], Answered]) -> Answered:
        """What a function gives while nobody else uses the pages."""


class PromptCache:
    """Prefixes that are known, so that they are not computed again.

    eviction: "lru", "lfu" or "cost" (what computing again would take). budgets: the most tokens that a tenant keeps,
    by its salt, or one number for each; None for no limit.

    Raises ArgumentError for settings out of range.
    """

    def __init__(self, *, eviction: str = "lru", budgets: int | Mapping[str, int] | None = None) -> None:
        if eviction not in POLICIES:
            raise ArgumentError("eviction", f"one of {', '.join(POLICIES)}", repr(eviction), "lru is a good one")
        for value in budgets.values() if isinstance(budgets, Mapping) else () if budgets is None else (budgets,):
            if value < 1:
                raise ArgumentError("budgets", "at least 1 token", value, "leave a tenant out for no limit")
        self.eviction, self.budgets = eviction, budgets
        self.tree: PrefixTree | None = None
        self._host: Host | None = None

    def pin(
        self,
        name: str,
        prompt: Prompt,
        *,
        ttl: float | None = None,
        is_chat: bool = False,
        salt: str = "",
        is_public: bool = False,
    ) -> int:
        """Compute a prefix and keep it from eviction by a name; returns how many tokens are kept.

        ttl: seconds since its last use, None for good. is_chat: the prompt is a user's turn. salt: whose it is;
        is_public: every tenant finds it. Raises ArgumentError where nobody computes, and for a prefix that does not
        stay.
        """
        tree, host = self._opened()
        if ttl is not None and not ttl > 0:
            raise ArgumentError("ttl", "more than 0 seconds", ttl, "leave it out to keep it until it is unpinned")
        ids, whose = host.encode(prompt, is_chat=is_chat), PUBLIC if is_public else salt
        host.compute(ids, whose)
        count = host.call(lambda: tree.pin(name, ids, whose, ttl))
        if count < len(ids) - len(ids) % tree.page_size:
            got = f"{count} of its {len(ids)} tokens there"
            raise ArgumentError("prompt", "a prefix that stays in the cache", got, "raise the budget or num_pages")
        return count

    def unpin(self, name: str, *, salt: str = "", is_public: bool = False) -> bool:
        """Let a pinned prefix be evicted as others are; False if there is none of that name."""
        tree, host = self._opened()
        return host.call(lambda: tree.unpin(name, PUBLIC if is_public else salt))

    def counts(self, salt: str = "") -> Counts:
        """What became of a tenant's requests, in tokens."""
        return self._opened()[0].counts(salt)

    def clear(self) -> None:
        """Forget everything, pins too."""
        tree, host = self._opened()
        host.call(tree.clear)

    def _opened(self) -> tuple[PrefixTree, Host]:
        if self.tree is None or self._host is None:
            hint = "give it to one: hasten.Engine(model, tokenizer, prompt_cache=cache)"
            raise ArgumentError("prompt_cache", "one that an engine has", "one that none has", hint)
        return self.tree, self._host

    def open(self, ledger: Ledger, cost: Cost, host: Host) -> PrefixTree:
        """The tree for the pages of one engine. Raises ArgumentError while another engine has this cache."""
        if self.tree is not None:
            raise ArgumentError("prompt_cache", "one that no other engine has", "one in use", "make another")
        size, budgets = ledger.page_size, self.budgets
        if isinstance(budgets, Mapping):
            pages: int | dict[str, int] | None = {salt: -(-value // size) for salt, value in budgets.items()}
        else:
            pages = None if budgets is None else -(-budgets // size)
        self._host = host
        self.tree = PrefixTree(ledger, eviction=self.eviction, cost=cost, budgets=pages)
        return self.tree

    def close(self) -> None:
        """The engine has ended, and its pages with it."""
        self.tree = self._host = None


__all__ = ["PromptCache"]
