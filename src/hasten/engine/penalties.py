"""Logits processors that transformers does not have, in its form: a bias by token, and penalties for what was said."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Bias:
    """Adds {token id: bias} to the logits. Raises nothing: ids are checked where the vocabulary is known."""

    def __init__(self, bias: Mapping[int, float], device: torch.device) -> None:
        self._ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    def __call__(self, ids: Tensor | None, scores: Tensor) -> Tensor:
        """Scores (batch, vocab), biased; what was said does not matter."""
        return scores.index_add(1, self._ids, self._values.to(scores).expand(len(scores), -1))


class Penalties:
    """Takes `presence` from the logits of tokens that are in the new text, and `frequency` as often as they are.

    Tokens of the prompt, the first `num_prompt`, do not count, as in OpenAI's interface.
    """

    def __init__(self, num_prompt: int, presence: float, frequency: float) -> None:
        self._num_prompt, self._presence, self._frequency = num_prompt, presence, frequency

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (batch, vocab) after the tokens ids (batch, length)."""
        said = ids[:, self._num_prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
        return scores - self._presence * (counts > 0) - self._frequency * counts


__all__ = ["Bias", "Penalties"]
