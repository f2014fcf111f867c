"""`hasten.PromptCache`: the settings of a prompt cache, and the object by which a user reaches it.

Given to an engine, or used by itself with a transformers model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from transformers.cache_utils import DynamicCache

from hasten.cache.eviction import POLICIES, Cost
from hasten.cache.kept import RULES, Kept
from hasten.cache.ledger import Ledger
from hasten.cache.library import Library
from hasten.cache.nodes import Counts
from hasten.cache.paged import PagedCache
from hasten.cache.pieces import Piece, root_of
from hasten.cache.prefix import PUBLIC, PrefixTree
from hasten.cache.store import DiskStore
from hasten.cache.tiers import HostTier, Tiers
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

    def seconds(self, num_tokens: int) -> float | None:
        """In how many seconds so many first tokens are computed; None if that cannot be."""

    def call(self, function: Callable[[], Answered]) -> Answered:
        """What a function gives while nobody else uses the pages."""


class PromptCache:
    """Prefixes that are known, so that they are not computed again.

    eviction: "lru", "lfu" or "cost" (what computing again would take). budgets: the most tokens that a tenant keeps in
    pages, by its salt, or one number for each; None for no limit.

    path: a folder in which they outlive the process, shared by any number of them. max_bytes: of its files; ttl: in
    seconds, after which what nobody used goes. host_bytes: of copies in host memory, before those on disk.
    restore: when what is on disk is read instead of computed: "measured" (when that is faster), "always" or "never".

    Raises ArgumentError for settings out of range and for a folder that cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        eviction: str = "lru",
        budgets: int | Mapping[str, int] | None = None,
        max_bytes: int | None = None,
        ttl: float | None = None,
        host_bytes: int | None = None,
        restore: str = "measured",
    ) -> None:
        for name, value, known in (("eviction", eviction, POLICIES), ("restore", restore, RULES)):
            if value not in known:
                raise ArgumentError(name, f"one of {', '.join(known)}", repr(value), f"{known[0]} is a good one")
        for count in budgets.values() if isinstance(budgets, Mapping) else () if budgets is None else (budgets,):
            if count < 1:
                raise ArgumentError("budgets", "at least 1 token", count, "leave a tenant out for no limit")
        limits = (("max_bytes", max_bytes), ("ttl", ttl), ("host_bytes", host_bytes))
        for name, limit in limits:
            if limit is not None and not limit > 0:
                raise ArgumentError(name, "more than 0", limit, "leave it out for none")
            if limit is not None and path is None and name != "host_bytes":
                raise ArgumentError(name, "a path beside it", "none", "it is for what is kept on disk")
        self.eviction, self.budgets, self.restore = eviction, budgets, restore
        self.store = None if path is None else DiskStore(path, max_bytes=max_bytes, ttl_s=ttl)
        host_tier = None if host_bytes is None else HostTier(host_bytes)
        self.tiers = Tiers(host_tier, self.store) if host_tier is not None or self.store is not None else None
        self.tree: PrefixTree | None = None
        self.kept: Kept | None = None
        self._host: Host | None = None
        self._library: Library | None = None

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Any = None, tokenizer: Any = None, **settings: Any
    ) -> PromptCache:
        """A cache in a folder, for a transformers model that is used without an engine.

            cache = PromptCache.load(path, model, tokenizer)
            cache.pin("system", system_prompt, ttl=3600)
            model.generate(**inputs, past_key_values=cache.fork(inputs["input_ids"]))

        Reads the weights once, for their fingerprint. Without a model the folder can be looked at. settings: as of
        `PromptCache`. Raises ArgumentError for a folder that cannot be used and a model that keeps something else than
        K and V.
        """
        cache = cls(path, **settings)
        if model is not None and cache.tiers is not None:
            cache._library = Library(model, tokenizer, cache.tiers)
        return cache

    def fork(self, prompt: Any, *, salt: str = "") -> DynamicCache:
        """A `transformers` cache with the longest known prefix of a prompt, for `past_key_values=`.

        prompt: a text, token ids, or a tensor (n,) or (1, n); its last token is never in. What is written into one
        fork is in no other. Raises ArgumentError without a model (`load`).
        """
        library = self._loaded()
        return library.fork(library.encode(prompt), salt)

    def add(self, tokens: Any, past: Any, *, salt: str = "") -> None:
        """Keep what a cache holds of exactly these tokens, such as a fork after `generate`: all but its last token.

        Raises ArgumentError for another number of tokens, for a cache whose layers with a window have let go of some
        (`pin` the prefix instead), and without a model (`load`).
        """
        library = self._loaded()
        library.add(library.encode(tokens), past, salt)

    @property
    def problems(self) -> list[str]:
        """What was lost of the folder or could not be written, one line each."""
        return [] if self.store is None else list(self.store.problems)

    def fetch(self, tokens: Sequence[int], salt: str | None) -> list[Piece]:
        """What is kept outside of the pages of a prompt, and pays to be put there; for the engine."""
        return [] if self.kept is None else self.kept.fetch(tokens, salt)

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
        if ttl is not None and not ttl > 0:
            raise ArgumentError("ttl", "more than 0 seconds", ttl, "leave it out to keep it until it is unpinned")
        whose = PUBLIC if is_public else salt
        if self._library is not None and self.tree is None:
            if is_chat:
                raise ArgumentError("is_chat", "False without an engine", True, "apply the chat template to the prompt")
            ids = self._library.encode(prompt)
            self._library.compute(ids, whose)
            return self._pin_files(name, ids, whose, ttl, self._library.fingerprint)
        tree, host = self._opened()
        ids = host.encode(prompt, is_chat=is_chat)
        host.compute(ids, whose)
        count = host.call(lambda: tree.pin(name, ids, whose, ttl))
        if count < len(ids) - len(ids) % tree.page_size:
            got = f"{count} of its {len(ids)} tokens there"
            raise ArgumentError("prompt", "a prefix that stays in the cache", got, "raise the budget or num_pages")
        if self.kept is not None and self.store is not None:
            self._pin_files(name, ids, whose, ttl, self.kept.fingerprint)
        return count

    def unpin(self, name: str, *, salt: str = "", is_public: bool = False) -> bool:
        """Let a pinned prefix be evicted as others are; False if there is none of that name."""
        whose = PUBLIC if is_public else salt
        if self._library is not None and self.tree is None and self.store is not None:
            return self.store.unpin(root_of(self._library.fingerprint, whose), name)
        tree, host = self._opened()
        was_kept = False
        if self.kept is not None and self.store is not None:
            was_kept = self.store.unpin(root_of(self.kept.fingerprint, whose), name)
        return host.call(lambda: tree.unpin(name, whose)) or was_kept

    def counts(self, salt: str = "") -> Counts:
        """What became of a tenant's requests, in tokens."""
        return self._opened()[0].counts(salt)

    def clear(self) -> None:
        """Forget everything that is in pages, pins too."""
        tree, host = self._opened()
        host.call(tree.clear)

    def flush(self) -> None:
        """Wait until what is to be on disk is written."""
        if self.tiers is not None:
            self.tiers.flush()

    def _pin_files(self, name: str, ids: Sequence[int], salt: str | None, ttl: float | None, fingerprint: str) -> int:
        assert self.tiers is not None and self.store is not None, "nothing is kept in files"
        self.tiers.flush()
        root = root_of(fingerprint, salt)
        found = self.tiers.find(root, ids, len(ids))
        if found.keys:
            self.store.pin(root, name, found.keys, found.num_tokens, ttl)
        return found.num_tokens

    def _loaded(self) -> Library:
        if self._library is None:
            hint = "hasten.PromptCache.load(path, model, tokenizer)"
            raise ArgumentError("model", "the one that the cache is for", "none", hint)
        return self._library

    def _opened(self) -> tuple[PrefixTree, Host]:
        if self.tree is None or self._host is None:
            hint = "give it to one: hasten.Engine(model, tokenizer, prompt_cache=cache)"
            raise ArgumentError("prompt_cache", "one that an engine has", "one that none has", hint)
        return self.tree, self._host

    def attach(
        self, ledger: Ledger, pages: PagedCache, cost: Cost, host: Host, identify: Callable[[], str]
    ) -> PrefixTree:
        """The tree for the pages of one engine. identify: the fingerprint of all that K and V depend on.

        Raises ArgumentError while another engine has this cache.
        """
        if self.tree is not None:
            raise ArgumentError("prompt_cache", "one that no other engine has", "one in use", "make another")
        size, budgets = ledger.page_size, self.budgets
        if isinstance(budgets, Mapping):
            most: int | dict[str, int] | None = {salt: -(-value // size) for salt, value in budgets.items()}
        else:
            most = None if budgets is None else -(-budgets // size)
        self._host = host
        self.tree = PrefixTree(ledger, eviction=self.eviction, cost=cost, budgets=most)
        if self.tiers is not None:
            name = identify() if self.store is not None else "this engine"
            self.kept = Kept(self.tree, pages, self.tiers, name, cost, self.restore, host.seconds)
        return self.tree

    def detach(self) -> None:
        """The engine has ended, and its pages with it; what is to be on disk is written."""
        if self.tiers is not None:
            self.tiers.flush()
            if self.tiers.host is not None:
                self.tiers.host.clear()
        self.tree = self.kept = self._host = None

    def close(self) -> None:
        """Write what waits, and let go of the folder."""
        if self.tiers is not None:
            self.tiers.close()


__all__ = ["PromptCache"]
