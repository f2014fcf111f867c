"""What a step has chosen and the host has yet to read: tokens, and the log probabilities that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class Launched:
    """Tokens int64 (wanted,) on the device, and for whom they were chosen, from which row of the logits."""

    wanted: Sequence[tuple[Choice, int]]
    tokens: Tensor
    asked: Asked | None

    def read_logprobs(self) -> list[Logprobs | None]:
        """Those of each token, None where they were not asked for."""
        found: list[Logprobs | None] = [None] * len(self.wanted)
        if self.asked is not None:
            for place, count, one in zip(self.asked.places, self.asked.counts, self.asked.read(), strict=True):
                found[place] = Logprobs(logprob=one.logprob, top=one.top[:count])
        return found


__all__ = ["Asked", "Launched"]
