"""What a prompt cache asks of the engine that has it: ids of a text, K and V of a prefix, a moment of its thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from hasten.cache.paged import Kind, PagedCache
from hasten.cache.prompt_cache import PromptCache
from hasten.engine import prompt as prompts
from hasten.engine import sizes
from hasten.engine.prefixes import Prefixes, versions
from hasten.engine.sampling import Sampling
from hasten.engine.scheduler import Scheduler
from hasten.errors import HastenError

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
    given: PromptCache | bool | None, engine: Engine, scheduler: Scheduler, pages: PagedCache, layers: Sequence[Kind]
) -> PromptCache | None:
    """Give an engine that is being made its prompt cache: the one given, or a new one for True."""
    if given is None or given is False:
        return None
    cache = PromptCache() if given is True else given
    tree = cache.open(scheduler.ledger, sizes.cost(engine.model, layers), CacheHost(engine))
    scheduler.prefixes = Prefixes(tree, versions(engine.model))
    return cache


__all__ = ["CacheHost", "join"]
