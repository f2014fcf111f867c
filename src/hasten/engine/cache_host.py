"""What a prompt cache asks of the engine that has it: ids of a text, K and V of a prefix, a moment of its thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from hasten.cache.fingerprint import fingerprint
from hasten.cache.paged import Kind, PagedCache
from hasten.cache.prefix import PrefixTree
from hasten.cache.prompt_cache import PromptCache
from hasten.engine import prompt as prompts
from hasten.engine import sizes
from hasten.engine.prefixes import Prefixes, versions
from hasten.engine.request import Request
from hasten.engine.sampling import Sampling
from hasten.engine.scheduler import Scheduler
from hasten.errors import ArgumentTypeError, HastenError

if TYPE_CHECKING:
    from hasten.engine.engine import Engine

Answered = TypeVar("Answered")


class CacheHost:
    """An engine as its prompt cache sees it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def encode(self, prompt: str | Sequence[int], *, is_chat: bool = False) -> list[int]:
        """Token ids of a prompt."""
        return prompts.encode(self._engine.tokenizer, prompt, is_chat=is_chat)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, or their numbers where there is no tokenizer."""
        tokenizer = self._engine.tokenizer
        return str(list(tokens)) if tokenizer is None else str(tokenizer.decode(list(tokens)))

    def compute(self, ids: Sequence[int], salt: str | None) -> None:
        """Leave K and V of these tokens in the cache; raises what `Engine.submit` and the model raise."""
        self._engine.submit(ids, Sampling(max_tokens=1), salt=salt).result()

    def seconds(self, num_tokens: int) -> float | None:
        """How long the model computes so many first tokens; None where they do not fit."""
        try:
            begin = time.perf_counter()
            for _ in range(2):  # the first is slow for other reasons
                begin = time.perf_counter()
                self.compute([0] * num_tokens, "\0measured")  # of no tenant: of its tokens nothing was there
                seconds = time.perf_counter() - begin
                self.call(lambda: self._tree().forget("\0measured"))
            return seconds
        except HastenError:
            return None

    def _tree(self) -> PrefixTree:
        cache = self._engine.prompt_cache
        assert cache is not None and cache.tree is not None, "an engine asked by a prompt cache that it does not have"
        return cache.tree

    def call(self, function: Callable[[], Answered]) -> Answered:
        """What a function gives in the engine's thread, between two steps."""
        future: Future[Answered] = Future()

        def call() -> None:
            try:
                future.set_result(function())
            except HastenError as error:
                future.set_exception(error)

        self._engine.between_steps(call)
        return future.result()


def join(
    given: PromptCache | bool | None,
    engine: Engine,
    scheduler: Scheduler,
    pages: PagedCache,
    layers: Sequence[Kind],
    reproducible: bool,
) -> PromptCache | None:
    """Give an engine that is being made its prompt cache: the one given, or a new one for True.

    reproducible: what is kept outside of its pages is apart from that of engines whose bits hang on the batch.
    """
    if given is None or given is False:
        return None
    cache = PromptCache() if given is True else given
    model = engine.model

    def identify() -> str:
        found = fingerprint(model, engine.tokenizer, layers, pages.page_size, pages.dtype, pages.stored)
        return found + "-reproducible" if reproducible else found

    tree = cache.attach(scheduler.ledger, pages, sizes.cost(model, layers), CacheHost(engine), identify)
    scheduler.prefixes = Prefixes(tree, versions(model), cache.kept)
    return cache


def prepare(request: Request, salt: str | None, cache: PromptCache | None) -> None:
    """Let a request that is being made belong to a tenant, and find what is kept of its prompt outside of the pages."""
    if not isinstance(salt, str | None):
        raise ArgumentTypeError("salt", "a string, or None for public", type(salt).__name__, "leave it out")
    request.salt = salt
    if cache is not None and request.sampling.prompt_logprobs is None:  # those are computed from the beginning
        request.kept = cache.fetch(request.prompt, salt)


__all__ = ["CacheHost", "join", "prepare"]
