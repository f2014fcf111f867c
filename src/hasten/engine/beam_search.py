"""Beam search: which continuations of which beams go on, and which are finished, as transformers' `generate` has it.

`BeamSearch` is given log probabilities of all beams, step by step; `Beams` joins it to the sequences of a request,
which become each other's forks and share pages. Called by core.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

# takes a beam out of a comparison; transformers' own number, for sums in float32 tell it from -inf
OUT = -1.0e9


@dataclass(frozen=True)
class Hypothesis:
    """A finished text: its new tokens, and its score, the sum of log probabilities over length ** length_penalty."""

    tokens: tuple[int, ...]
    score: float


class BeamSearch:
    """The beams of one request. running: their new tokens, best first; at first a single beam without any.

    ends: tokens that finish a beam. limit: new tokens at which all are finished. early_stopping: True ends once there
    are num_beams finished ones; False, when the best beam could not be better than they are if it ended now; "never",
    when it could not be at any length.
    """

    def __init__(
        self, num_beams: int, length_penalty: float, early_stopping: bool | str, ends: Collection[int], limit: int
    ) -> None:
        self.num_beams, self.length_penalty, self.early_stopping = num_beams, length_penalty, early_stopping
        self.ends, self.limit, self.num_kept = frozenset(ends), limit, kept(num_beams, len(set(ends)))
        self.running: list[list[int]] = [[]]
        self.is_over = False
        self._scores = torch.zeros(1)
        self._finished: list[list[int]] = [[]] * num_beams
        self._finished_scores = torch.full((num_beams,), OUT)
        self._is_finished = torch.zeros(num_beams, dtype=torch.bool)
        self._can_improve = True

    def advance(self, logprobs: Tensor) -> list[tuple[int, int]]:
        """[(beam that goes on, its next token)], best first, from log probabilities float32 (beams, vocab)."""
        vocab = logprobs.shape[-1]
        total = (logprobs + self._scores.to(logprobs.device)[:, None]).flatten()
        scores, places = (each.cpu() for each in total.topk(self.num_kept))
        beams, tokens = (places // vocab).tolist(), (places % vocab).tolist()
        texts = [[*self.running[beam], token] for beam, token in zip(beams, tokens, strict=True)]
        length = len(texts[0])
        is_done = torch.tensor([token in self.ends or length >= self.limit for token in tokens])
        going = scores + is_done.float() * OUT
        chosen = going.topk(self.num_beams).indices
        self._finish(texts, scores, is_done, length)
        self._scores = going[chosen]
        self.running = [texts[place] for place in chosen.tolist()]
        self._can_improve &= self._could_improve(length)
        is_full = bool(self._is_finished.all()) and self.early_stopping is True
        self.is_over = not self._can_improve or is_full or bool(is_done.all())
        return [(beams[place], tokens[place]) for place in chosen.tolist()]

    def best(self, count: int) -> list[Hypothesis]:
        """The best finished texts, at most so many."""
        found = zip(self._finished, self._finished_scores.tolist(), self._is_finished.tolist(), strict=True)
        return [Hypothesis(tuple(tokens), score) for tokens, score, is_finished in found if is_finished][:count]

    def _finish(self, texts: list[list[int]], scores: Tensor, is_done: Tensor, length: int) -> None:
        """Keep the best num_beams of what was finished and what now is, of the first num_beams continuations."""
        is_new = is_done & (torch.arange(len(scores)) < self.num_beams)
        is_full = bool(self._is_finished.all()) and self.early_stopping is True
        scores = scores / length**self.length_penalty
        for is_out in (is_full, not self._can_improve):
            scores = scores + float(is_out) * OUT
        merged = torch.cat((self._finished_scores, scores + (~is_new).float() * OUT))
        places = merged.topk(self.num_beams).indices
        every = [*self._finished, *texts]
        self._finished = [every[place] for place in places.tolist()]
        self._finished_scores = merged[places]
        self._is_finished = torch.cat((self._is_finished, is_new))[places]

    def _could_improve(self, length: int) -> bool:
        at_best = self.limit if self.early_stopping == "never" and self.length_penalty > 0 else length
        best = self._scores[0] / at_best**self.length_penalty
        worst = torch.where(self._is_finished, self._finished_scores.min(), torch.tensor(OUT))
        return bool((best > worst).any())


def kept(num_beams: int, num_ends: int) -> int:
    """How many continuations are looked at in a step, so that num_beams of them go on whatever ends."""
    return max(2, 1 + num_ends) * num_beams


__all__ = ["BeamSearch", "Hypothesis", "kept"]
