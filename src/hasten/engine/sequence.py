"""One sequence of tokens on its way through the engine, as the scheduler sees it: how long, how far, in what state."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass, field
from typing import Any

from hasten.cache.ledger import Holding


class State(enum.Enum):
    """Where a sequence is: not begun or preempted, in the batches, or out of the engine."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, kw_only=True)
class Sequence:
    """Tokens known so far, of the prompt and new ones, and how many of them are computed.

    num_pending: new tokens that are chosen, but not yet read from the device: they count as known, and `tokens` ends
    before them. most: tokens that are ever computed; the last new one is not.
    arrival: (request, continuation of it): earlier ones go first, and are preempted last. seats: places in a batch
    that it will take, more than one if it is to be forked. deadline_s: the time, on the scheduler's clock, at which it
    is too late. owner: whose it is; the scheduler does not look. draft: tokens that may come next, to be computed in
    the next step as far as there is room, and cut back where they are not what is chosen. is_of_group:
    none of the sequences of its request goes on without the others, so they are preempted together.
    landmark, epoch: where a prefix ends that the prompt cache knows and could not give, and the state of that cache
    when the sequence was let in (prefixes.py).
    """

    tokens: list[int]
    holding: Holding
    arrival: tuple[int, int]
    seats: int = 1
    deadline_s: float | None = None
    owner: Any = None
    most: int = sys.maxsize
    num_pending: int = 0
    is_of_group: bool = False
    draft: list[int] = field(default_factory=list)
    state: State = field(default=State.WAITING)
    num_preemptions: int = 0
    landmark: int = 0
    epoch: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens known so far."""
        return len(self.tokens) + self.num_pending

    @property
    def num_computed(self) -> int:
        """Tokens whose K and V are, or are being, computed: the rest is to be scheduled."""
        return self.holding.num_tokens

    @property
    def num_left(self) -> int:
        """Tokens to compute before the next one can be chosen; 1 while decoding, 0 when nothing is to come."""
        return min(self.num_tokens, self.most) - self.num_computed


__all__ = ["Sequence", "State"]
