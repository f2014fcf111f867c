"""Tokens for all rows of a batch at once, each as its own request asks; and the log probabilities that are asked for.

The tokens are those that each request's chooser (sampling.py) would choose alone: its settings, its history, its own
generator. Called by the engine; returns tensors and does not wait for the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from hasten.engine.penalties import Bias
from hasten.engine.sampling import Chooser, draw

#: in the place of a token for a row whose logits are no numbers
NO_TOKEN = -1

# processors that look at the logits alone, so that rows with the same settings go through them together
_WITHOUT_HISTORY = (
    Bias,
    transformers.TemperatureLogitsWarper,
    transformers.TopKLogitsWarper,
    transformers.TopPLogitsWarper,
    transformers.MinPLogitsWarper,
    transformers.SuppressTokensLogitsProcessor,
)


@dataclass(frozen=True)
class Wanted:
    """One token to choose: from which row of the logits, by whom, after which tokens."""

    row: int
    chooser: Chooser
    history: Sequence[int]


@torch.inference_mode()
def choose(logits: Tensor, wanted: Sequence[Wanted]) -> Tensor:
    """A token for each that is wanted, from logits (rows, vocab); int64 (wanted,), NO_TOKEN where they are NaN."""
    rows = torch.tensor([one.row for one in wanted], device=logits.device)
    scores = logits if len(wanted) == len(logits) and _in_order(wanted) else logits[rows]
    tokens = scores.argmax(-1)
    draws: list[tuple[list[int], Tensor]] = []
    for places in _groups(wanted):
        first = wanted[places[0]].chooser
        part = scores[places].float()
        if first.processors:
            history: Any = None
            if not _is_free(first):
                history = torch.tensor([list(wanted[place].history) for place in places], device=logits.device)
            part = first.processors(history, part)
        if first.sampling.temperature == 0:
            tokens[places] = part.argmax(-1)
        else:
            draws.append((places, torch.softmax(part, -1)))
    for places, probabilities in draws:  # once nothing can fail any more: a draw cannot be taken back
        tokens[places] = draw(probabilities, [wanted[place].chooser.generator for place in places])
    return torch.where(scores.isnan().any(-1), NO_TOKEN, tokens)


@torch.inference_mode()
def logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities of the model itself, for logits (rows, vocab) and tokens (rows,).

    Returns (of the tokens (rows,), of the likeliest (rows, count), and the likeliest (rows, count)), float32.
    """
    scores = torch.log_softmax(logits.float(), -1)
    values, ids = scores.topk(min(count, logits.shape[-1]), -1)
    return scores.gather(-1, tokens.clamp(min=0)[:, None])[:, 0], values, ids


def _in_order(wanted: Sequence[Wanted]) -> bool:
    return all(place == one.row for place, one in enumerate(wanted))


def _groups(wanted: Sequence[Wanted]) -> list[list[int]]:
    """Places of `wanted` that are processed together: all but those that plainly take the likeliest token."""
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, one in enumerate(wanted):
        sampling = one.chooser.sampling
        if not one.chooser.processors and sampling.temperature == 0:
            continue
        bias = tuple(sorted(sampling.logit_bias.items()))
        settings: Hashable = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, bias)
        groups[settings if _is_free(one.chooser) else place].append(place)
    return list(groups.values())


def _is_free(chooser: Chooser) -> bool:
    return all(isinstance(one, _WITHOUT_HISTORY) for one in chooser.processors)


__all__ = ["NO_TOKEN", "Wanted", "choose", "logprobs"]
