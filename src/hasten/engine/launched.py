"""What a step has chosen and the host has yet to read: tokens, and the log probabilities that were asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from hasten.engine.events import Logprobs
from hasten.engine.request import Choice


@dataclass(frozen=True, eq=False)
class Asked:
    """Log probabilities on the device (sampler.py): for which places of the tokens, and how many for each."""

    places: Sequence[int]
    counts: Sequence[int]
    values: tuple[Tensor, Tensor, Tensor]

    def read(self) -> list[Logprobs]:
        """All rows, with all that was computed for each."""
        own, values, ids = (each.tolist() for each in self.values)
        return [
            Logprobs(logprob=one, top=tuple(zip(tokens, some, strict=True)))
            for one, some, tokens in zip(own, values, ids, strict=True)
        ]


class Pick(NamedTuple):
    """A token to choose: for whom, from which row of the logits, after so many tokens of the choice's draft."""

    choice: Choice
    row: int
    num_draft: int = 0

    @property
    def history(self) -> Sequence[int]:
        """The tokens before it."""
        assert self.choice.sequence is not None, "a choice without a sequence has no token to come"
        tokens = self.choice.sequence.tokens
        return [*tokens, *self.choice.draft[: self.num_draft]] if self.num_draft else tokens


@dataclass(frozen=True, eq=False)
class Launched:
    """Tokens int64 (wanted,) on the device, and for whom they were chosen; those of one choice come together."""

    wanted: Sequence[Pick]
    tokens: Tensor
    asked: Asked | None

    def places(self) -> Iterator[tuple[Choice, list[int]]]:
        """Every choice, and the places of its tokens."""
        for _, group in groupby(enumerate(self.wanted), key=lambda one: id(one[1].choice)):
            own = list(group)
            yield own[0][1].choice, [place for place, _ in own]

    def read_logprobs(self) -> list[Logprobs | None]:
        """Those of each token, None where they were not asked for."""
        found: list[Logprobs | None] = [None] * len(self.wanted)
        if self.asked is not None:
            for place, count, one in zip(self.asked.places, self.asked.counts, self.asked.read(), strict=True):
                found[place] = Logprobs(logprob=one.logprob, top=one.top[:count])
        return found


__all__ = ["Asked", "Launched", "Pick"]
