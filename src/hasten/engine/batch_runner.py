"""Runs a transformers model over a packed batch: logits of the rows that are wanted, K and V into their pages.

The page tables travel as a keyword of the model's own forward (attend_pages.py). Called by the engine; knows no
request and no sampling.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.cache.paged import PagedCache
from hasten.engine.attend_pages import KEYWORD, NAME, Pages
from hasten.engine.batch import Batch, Piece, copies_of, pack
from hasten.engine.compiled import CompiledForward
from hasten.engine.decode_steps import DecodeSteps
from hasten.engine.graphs import Capture
from hasten.engine.runner import FEW_TOKENS
from hasten.models import accelerate


class BatchRunner:
    """A model that reads and writes a paged cache.

    Sets the model's attention implementation, through `hasten.accelerate` and its checks; `close` puts back what it
    was. step_threads: CPU threads of PyTorch for forwards of at most 64 tokens, None leaves its number as it is.
    capture: of decode steps of at most `most_rows` sequences (decode_steps.py), None for no such steps. context: the
    most tokens of a sequence. backend: of torch.compile, for these steps; None leaves the model as it is.
    """

    def __init__(
        self,
        model: Any,
        cache: PagedCache,
        *,
        step_threads: int | None = None,
        capture: Capture | None = None,
        most_rows: int = 1,
        context: int | None = None,
        backend: str | None = None,
    ) -> None:
        self._before = model.config._attn_implementation
        self.model, self.cache, self.step_threads = accelerate(model), cache, step_threads
        self.model.set_attn_implementation(NAME)
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.compiled = None if backend is None else CompiledForward(self._all_logits, backend)
        self.steps: DecodeSteps | None = None
        if capture is not None:
            forward = self._all_logits if self.compiled is None else self.compiled
            self.steps = DecodeSteps(forward, cache, self.device, most_rows, context, capture)

    def close(self) -> None:
        """Give the model its own attention back, and the memory of captured steps."""
        if self.steps is not None:
            self.steps.close()
        self.model.set_attn_implementation(self._before)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def run(self, pieces: Sequence[Piece], chosen: Tensor | None = None) -> Tensor:
        """Logits (rows, vocab), in the order of the pieces and their rows. Does not wait for the device.

        chosen: int64 (any,), the tokens that the step before has chosen, for the pieces whose last is among them.
        The logits are good until the next call.
        """
        threads = torch.get_num_threads()
        is_small = sum(len(piece.ids) for piece in pieces) <= FEW_TOKENS
        if self.step_threads is not None and is_small:
            torch.set_num_threads(self.step_threads)
        try:
            with torch.inference_mode():
                if self.steps is not None and self.steps.takes(pieces, chosen):
                    self.cache.copy(copies_of(pieces, len(self.cache.kinds)))
                    return self.steps.run(pieces, chosen)
                batch = pack(pieces, self.cache, self.device)
                if batch.pending is not None:
                    assert chosen is not None, "a token is pending, and none was chosen"
                    sources, places = batch.pending
                    batch.ids[0, places] = chosen[sources].clamp(min=0)  # what is below 0 is no token, and nobody's
                return self._forward(batch)
        finally:
            torch.set_num_threads(threads)

    def _forward(self, batch: Batch) -> Tensor:
        self.cache.copy(batch.copies)
        if self._takes_rows:
            return self._all_logits(batch.ids, batch.positions, batch.pages, logits_to_keep=batch.rows)[0]
        return self._all_logits(batch.ids, batch.positions, batch.pages)[0, batch.rows]

    def _all_logits(self, ids: Tensor, positions: Tensor, pages: Pages, **options: Any) -> Tensor:
        """Logits (1, total, vocab) of packed tokens, or of those that `options` ask the model for."""
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **{KEYWORD: pages},
            **options,
        ).logits
        return logits


__all__ = ["BatchRunner"]
