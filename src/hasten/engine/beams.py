"""The beams of a request in the engine: a sequence each, which become forks of the best ones and share their pages.

All beams go on together: what is known of each is kept until it is known of all. Called by core.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.engine.beam_search import BeamSearch, Hypothesis
from hasten.engine.request import Choice, Request
from hasten.engine.scheduler import Scheduler
from hasten.errors import ArgumentError


class Beams:
    """Beam search over the choices of one request, the first of which has the prompt."""

    def __init__(self, search: BeamSearch) -> None:
        self.search = search
        self._logprobs: dict[int, Tensor] = {}  # of the beams that wait for the others

    @torch.inference_mode()
    def put(self, choice: Choice, logits: Tensor) -> None:
        """Take the logits (vocab,) after a beam's last token. Raises ArgumentError if they are NaN."""
        scores = torch.log_softmax(logits.float(), -1)[None]
        if scores.isnan().any():
            hint = "try dtype float32; if it stays, the weights are broken"
            raise ArgumentError("model", "logits that are numbers", "NaN", hint)
        assert choice.sequence is not None, "a beam without a sequence has no logits"
        if choice.chooser.processors:
            ids = torch.tensor([choice.sequence.tokens], device=logits.device)
            scores = choice.chooser.processors(ids, scores)
        self._logprobs[choice.index] = scores[0]

    @property
    def is_ready(self) -> bool:
        """True if all beams can go on."""
        return len(self._logprobs) == len(self.search.running)

    @torch.inference_mode()
    def advance(self, request: Request, scheduler: Scheduler) -> list[Hypothesis] | None:
        """Let the best continuations be the beams; returns the finished texts once the search is over."""
        logprobs = torch.stack([self._logprobs[index] for index in range(len(self._logprobs))])
        self._logprobs = {}
        chosen = self.search.advance(logprobs)
        if self.search.is_over:
            return self.search.best(request.sampling.num_return_sequences)
        first = request.choices[0].sequence
        assert first is not None, "the first beam has the prompt"
        for choice in request.choices[1:]:
            if choice.sequence is None:
                choice.sequence = scheduler.fork(first, (request.number, choice.index))
                choice.sequence.owner = choice
        sequences = [choice.sequence for choice in request.choices if choice.sequence is not None]
        before = [(one.holding, one.tokens) for one in sequences]
        for sequence, (beam, token) in zip(sequences, chosen, strict=True):
            holding, tokens = before[beam]
            sequence.holding, sequence.tokens = holding.fork(), [*tokens, token]
        for holding, _ in before:
            holding.free()
        return None


__all__ = ["Beams"]
