"""Tokens for all rows of a batch at once, each as its own request asks; and the log probabilities that are asked for.

The tokens are those that each request's chooser (sampling.py) would choose alone: its settings, its history, its own
generator. Called by the engine; returns tensors and does not wait for the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from hasten.engine.batch import put
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
    """One token to choose: from which row of the logits, by whom, after which tokens.

    marks: if given, the state of the chooser's generator after the draw is added to it, so that later draws can be
    taken back. One chooser draws for its rows in their order.
    """

    row: int
    chooser: Chooser
    history: Sequence[int]
    marks: list[Tensor] | None = field(default=None, compare=False)


@torch.inference_mode()
def choose(logits: Tensor, wanted: Sequence[Wanted]) -> Tensor:
    """A token for each that is wanted, from logits (rows, vocab); int64 (wanted,), NO_TOKEN where they are NaN."""
    device = logits.device
    is_all = [one.row for one in wanted] == list(range(len(logits)))
    scores = logits if is_all else logits[put([one.row for one in wanted], torch.int64, device)]
    tokens = scores.argmax(-1)
    draws: list[tuple[Tensor, list[Wanted], Tensor]] = []
    for group in _groups(wanted):
        places, first = put(group, torch.int64, device), wanted[group[0]].chooser
        part = scores[places].float()
        if first.processors:
            history: Any = None
            if not is_free(first):
                history = put([list(wanted[place].history) for place in group], torch.int64, device)
            part = first.processors(history, part)
        if first.sampling.temperature == 0:
            tokens[places] = part.argmax(-1)
        else:
            draws.append((places, [wanted[place] for place in group], torch.softmax(part, -1)))
    for places, group_wanted, probabilities in draws:  # once nothing can fail
        generators, marks = [one.chooser.generator for one in group_wanted], [one.marks for one in group_wanted]
        tokens[places] = draw(probabilities, generators, marks)
    return torch.where(scores.isnan().any(-1), NO_TOKEN, tokens)


@torch.inference_mode()
def logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities of the model itself, for logits (rows, vocab) and tokens (rows,).

    Returns (of the tokens (rows,), of the likeliest (rows, count), and the likeliest (rows, count)), float32.
    """
    scores = torch.log_softmax(logits.float(), -1)
    values, ids = scores.topk(min(count, logits.shape[-1]), -1)
    return scores.gather(-1, tokens.clamp(min=0)[:, None])[:, 0], values, ids


def _groups(wanted: Sequence[Wanted]) -> list[list[int]]:
    """Places of `wanted` that are processed together: all but those that plainly take the likeliest token."""
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, one in enumerate(wanted):
        sampling = one.chooser.sampling
        if not one.chooser.processors and sampling.temperature == 0:
            continue
        bias = tuple(sorted(sampling.logit_bias.items()))
        settings: Hashable = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, bias)
        groups[settings if is_free(one.chooser) else place].append(place)
    return list(groups.values())


def is_free(chooser: Chooser) -> bool:
    """True if a request's choice does not depend on the tokens so far, but by the logits."""
    return all(isinstance(one, _WITHOUT_HISTORY) for one in chooser.processors)


__all__ = ["NO_TOKEN", "Wanted", "choose", "is_free", "logprobs"]
