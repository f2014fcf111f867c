"""A request in the engine: what was asked, its continuations as they grow, and the records they end in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hasten.cache.pieces import Piece
from hasten.cache.reasons import Explanation
from hasten.engine.answer import Answer
from hasten.engine.events import Failed, Finished, Logprobs, Token
from hasten.engine.lookup import Lookup
from hasten.engine.sampling import Chooser, Sampling
from hasten.engine.sequence import Sequence

Pieces = list[Piece] | tuple[()]
Event = Token | Finished | Failed


@dataclass(eq=False, kw_only=True)
class Choice:
    """One continuation of a request. sequence: None until the prompt is computed, for all but the first.

    place: of its token among those that the last step has chosen for all. lookup: drafts its next tokens, `num_lookup`
    at most, None if nobody does. draft: what of that the last step has computed; marks: its generator after each draw.
    """

    request: Request
    index: int
    answer: Answer
    chooser: Chooser
    sequence: Sequence | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    place: int = 0
    lookup: Lookup | None = None
    num_lookup: int = 0
    draft: list[int] = field(default_factory=list)
    marks: list[Tensor] = field(default_factory=list)
    score: float | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    num_positions: int = 0
    num_preemptions: int = 0
    num_pages: tuple[int, ...] = (0,)
    first_token_s: float | None = None
    last_token_s: float | None = None
    is_done: bool = False


@dataclass(eq=False, kw_only=True)
class Request:
    """What was asked. emit: takes its events, in the engine's thread. Times are seconds of the engine's clock.

    beams: its beam search (beams.py), whose beams are its choices. Of these only the first get a record.
    salt: whose prefixes it may take over, and who may take over its own; None is everybody's. cached_tokens: that it
    took over when it was first let in; explanation: why no more. kept: pieces that it may begin with, of which
    restored_tokens were put into pages for it.
    """

    number: int
    prompt: list[int]
    sampling: Sampling
    limit: int
    emit: Callable[[Event], None]
    submitted_s: float
    deadline_s: float | None = None
    salt: str | None = ""
    cached_tokens: int = 0
    restored_tokens: int = 0
    kept: Pieces = ()
    explanation: Explanation | None = None
    choices: list[Choice] = field(default_factory=list)
    beams: Any = None
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)  # begins with None if they are asked for

    @property
    def num_records(self) -> int:
        """How many of the choices, from the first, are handed out."""
        return self.sampling.num_return_sequences if self.beams is not None else len(self.choices)

    @property
    def is_done(self) -> bool:
        """True if every continuation has ended."""
        return all(choice.is_done for choice in self.choices)


__all__ = ["Choice", "Event", "Request"]
