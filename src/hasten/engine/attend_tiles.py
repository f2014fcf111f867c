"""Attention on a CPU whose bits depend on a token's own sequence alone: tiles of keys at fixed positions, in order.

Every product has the same shape whatever the sequences are, and a tile that a token does not see changes no bit of it.
Called by attend_pages.py for reproducible engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.cache.paged import PagedLayer

# keys of a tile, or a page's if those are more
TILE = 64


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The pages that single tokens see, a tile after the other.

    pages: int64 (tiles, batch * pages of a tile). is_seen: bool (tiles, batch, keys of a tile).
    """

    pages: Tensor
    is_seen: Tensor

    @property
    def batch(self) -> int:
        """How many tokens."""
        return self.is_seen.shape[1]


def plan(rows: Sequence[Sequence[int]], lengths: Sequence[int], window: int | None, page_size: int) -> TilePlan:
    """What to gather for sequences of these lengths in the pages `rows`, each with one new token, its last."""
    tile = max(TILE, page_size)
    each = tile // page_size
    first_seen = [0 if window is None else max(0, length - 1 - window) for length in lengths]
    begin, end = min(first_seen) // tile, -(-max(lengths) // tile)
    padded = [[*pages, *[0] * (end * each - len(pages))][begin * each : end * each] for pages in rows]
    table = torch.tensor(padded).unflatten(1, (end - begin, each)).transpose(0, 1)
    position = torch.arange(begin * tile, end * tile)
    first, last = torch.tensor(first_seen)[:, None], torch.tensor(lengths)[:, None]
    is_seen = ((position >= first) & (position < last)).unflatten(1, (end - begin, tile)).transpose(0, 1)
    return TilePlan(table.flatten(1), is_seen)


def decode(
    q: Tensor, layer: PagedLayer, plan: TilePlan, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of one token of each sequence; q and what is returned (batch, num_heads, head_dim)."""
    batch, num_heads, _ = q.shape
    num_kv_heads, dim_v = layer.value_pages.shape[2:]
    group, tile = num_heads // num_kv_heads, plan.is_seen.shape[2]
    rows = q.float().reshape(batch * num_kv_heads, group, -1) * scale
    top = torch.full((batch * num_kv_heads, group, 1), -torch.inf)
    total = torch.zeros_like(top)
    if sinks is not None:
        top = sinks.float().reshape(num_kv_heads, group, 1).repeat(batch, 1, 1)
        total = torch.ones_like(top)
    out = torch.zeros(batch * num_kv_heads, group, dim_v)
    for pages, is_seen in zip(plan.pages, plan.is_seen, strict=True):
        k, v = (each.float().reshape(batch, tile, num_kv_heads, -1) for each in layer.gather(pages))
        v = v.masked_fill(~is_seen[..., None, None], 0.0)  # what was never written may be NaN
        scores = torch.bmm(rows, k.permute(0, 2, 3, 1).reshape(batch * num_kv_heads, -1, tile))
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        hidden = ~is_seen[:, None, None].expand(batch, num_kv_heads, group, tile).reshape(scores.shape)
        scores = scores.masked_fill(hidden, -torch.inf)
        now = torch.maximum(top, scores.amax(-1, keepdim=True))
        base = torch.where(now == -torch.inf, 0.0, now)
        # as wide as a tile: PyTorch computes what is left over of a vector by other instructions
        fade = torch.exp((top - base).expand(scores.shape))[..., :1]
        weights = torch.exp(scores - base)
        total = total * fade + weights.sum(-1, keepdim=True)
        out = out * fade + torch.bmm(weights, v.transpose(1, 2).reshape(batch * num_kv_heads, tile, dim_v))
        top = now
    return (out / total).to(q.dtype).reshape(batch, num_heads, dim_v)


__all__ = ["TILE", "TilePlan", "decode", "plan"]
