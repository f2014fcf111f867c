"""Masks of every class, and Longformer attention written out as n x n matrices: the truth of our layer's tests."""

from __future__ import annotations

import torch
from torch import Tensor

MASKS = ("plain", "right", "left", "holes", "one_global", "all_global", "different", "different_right", "padded_global")


def codes(name: str, batch: int, seqlen: int) -> Tensor:
    """int64 (batch, seqlen): 0 padding, 1 local, 2 global. Rows differ where the name does not forbid it."""
    made = torch.ones(batch, seqlen, dtype=torch.int64)
    if name in ("right", "different_right", "padded_global"):
        made[0, seqlen - seqlen // 4 :] = 0
    if name == "left":
        made[-1, : seqlen // 3] = 0
        made[0, -1] = 2
    if name == "holes":
        made[0, 2:4], made[-1, 5] = 0, 0
    if name in ("one_global", "holes", "right"):
        made[:, 0] = 2
    if name == "all_global":
        made[:] = 2
    if name.startswith("different"):
        made[0, 0] = made[0, 7] = made[1, seqlen // 2] = made[1, 3] = made[1, 4] = 2  # and none in a third row
    if name == "padded_global":  # marked by the user, but it is padding
        made[0, 1] = 2
    return made


def user_masks(name: str, batch: int, seqlen: int) -> tuple[Tensor, Tensor]:
    """The same as transformers' users give it: (attention_mask, global_attention_mask), of 0 and 1 each."""
    made = codes(name, batch, seqlen)
    is_global = (made == 2).long()
    if name == "padded_global":
        is_global[0, -1] = 1
    return (made > 0).long(), is_global


def truth(layer, hidden_states: Tensor, made: Tensor, left: int, right: int, dilation: Tensor, causal: bool) -> Tensor:
    """What a layer with six projections gives, (batch, seqlen, hidden_size); dilation (num_heads,)."""
    seqlen = hidden_states.shape[1]

    def heads(name: str) -> Tensor:
        return getattr(layer, name)(hidden_states).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)

    place = torch.arange(seqlen)
    distance = (place[None, :] - place[:, None]).expand(layer.num_heads, seqlen, seqlen)
    step = dilation[:, None, None]
    window = (distance % step == 0) & (distance >= -left * step) & (distance <= right * step)
    real, is_global = (made > 0)[:, None, None, :], (made == 2)[:, None, None, :]
    before = distance <= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    outs = []
    for suffix, keep in (("", (window | is_global) & real & before), ("_global", real & before)):
        q, k, v = (heads(name + suffix) for name in ("query", "key", "value"))
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
        probs = scores.softmax(-1).nan_to_num(0.0)
        outs.append((probs @ v).transpose(1, 2).flatten(2))
    out = torch.where((made == 2)[..., None], outs[1], outs[0])
    return out.masked_fill((made == 0)[..., None], 0.0)
