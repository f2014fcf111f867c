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

    tiles: of each (which of the tokens, int64 (rows,), their pages, int64 (rows * pages of a tile), what they see of
    it, bool (rows, keys of a tile)). Who sees nothing of a tile is left out: products of many small matrices compute
    each by itself. batch: how many tokens.
    """

    tiles: tuple[tuple[Tensor, Tensor, Tensor], ...]
    batch: int


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
    rows_of = [_rows(seen.any(-1)) for seen in is_seen]
    tiles = zip(rows_of, table, is_seen, strict=True)
    found = [(rows, pages[rows].flatten(), seen[rows]) for rows, pages, seen in tiles if len(rows)]
    return TilePlan(tuple(found), len(lengths))


def _rows(is_wanted: Tensor) -> Tensor:
    """The rows that are wanted, and others up to a multiple of the threads, which then share whole vectors."""
    count = int(is_wanted.sum())
    whole = min(-(-count // torch.get_num_threads()) * torch.get_num_threads(), len(is_wanted))
    return is_wanted.int().argsort(descending=True, stable=True)[:whole]


def decode(
    q: Tensor, layer: PagedLayer, plan: TilePlan, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of one token of each sequence; q and what is returned (batch, num_heads, head_dim)."""
    batch, num_heads, _ = q.shape
    num_kv_heads, dim_v = layer.value_pages.shape[2:]
    group = num_heads // num_kv_heads
    queries = q.float().reshape(batch, num_kv_heads, group, -1) * scale
    top = torch.full((batch, num_kv_heads, group, 1), -torch.inf)
    total = torch.zeros_like(top)
    if sinks is not None:
        top = sinks.float().reshape(num_kv_heads, group, 1).repeat(batch, 1, 1, 1)
        total = torch.ones_like(top)
    out = torch.zeros(batch, num_kv_heads, group, dim_v)
    for rows, pages, is_seen in plan.tiles:
        count, tile = is_seen.shape
        k, v = (each.float().reshape(count, tile, num_kv_heads, -1) for each in layer.gather(pages))
        v = v.masked_fill(~is_seen[..., None, None], 0.0)  # what was never written may be NaN
        scores = _products(queries[rows], k.permute(0, 2, 3, 1))
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~is_seen[:, None, None], -torch.inf)
        before = top[rows]
        now = torch.maximum(before, scores.amax(-1, keepdim=True))
        base = torch.where(now == -torch.inf, 0.0, now)
        # as wide as a tile: PyTorch computes what is left over of a vector by other instructions
        fade = torch.exp((before - base).expand(scores.shape))[..., :1]
        weights = torch.exp(scores - base)
        total[rows] = total[rows] * fade + weights.sum(-1, keepdim=True)
        out[rows] = out[rows] * fade + _products(weights, v.transpose(1, 2))
        top[rows] = now
    return (out / total).to(q.dtype).reshape(batch, num_heads, dim_v)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Matrix products of (rows, heads, m, k) and (rows, heads, k, n), each computed as if it were the only one."""
    # contiguous whatever the sizes: a view in another order is another kernel
    found = torch.bmm(*(each.contiguous().flatten(0, 1) for each in (a, b)))
    return found.unflatten(0, a.shape[:2])


__all__ = ["TILE", "TilePlan", "decode", "plan"]
