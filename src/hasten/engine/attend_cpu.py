"""Attention over pages on a CPU: sequences with one new token all at once, prompts one after the other.

A CPU has no kernel that follows a page table, so pages are gathered: one copy of what is seen, for all sequences, and
one call of PyTorch's attention with it. Called by attend_pages.py; knows lengths on the host and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.cache.paged import PagedLayer, Tables
from hasten.engine.attend import HALVES
from hasten.masks import Mask
from hasten.ops.attention import attention


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """The pages that single new tokens see, as rows to gather.

    pages: int64 (batch * columns,). hidden: float32 (batch, 1, 1, columns * page_size), -inf where a token does not
    see, None if every token sees everything. unseen: int64, which of the gathered rows were never written.
    """

    pages: Tensor
    hidden: Tensor | None
    unseen: Tensor
    batch: int
    buffers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of one layer, used by the next again


def plan(rows: Sequence[Sequence[int]], lengths: Sequence[int], window: int | None, page_size: int) -> DecodePlan:
    """What to gather for sequences of these lengths in the pages `rows`, each with one new token, its last."""
    first_seen = [0 if window is None else max(0, length - 1 - window) for length in lengths]
    first_pages = [first // page_size for first in first_seen]
    seen = [list(pages[first:]) for pages, first in zip(rows, first_pages, strict=True)]
    columns = max(map(len, seen))
    table = torch.tensor([pages + [0] * (columns - len(pages)) for pages in seen])
    position = torch.arange(columns * page_size)
    begins, ends = (
        torch.tensor([token - page * page_size for token, page in zip(tokens, first_pages, strict=True)])[:, None]
        for tokens in (first_seen, lengths)
    )
    is_seen = (position >= begins) & (position < ends)
    hidden = None if is_seen.all() else torch.zeros(is_seen.shape).masked_fill_(~is_seen, -torch.inf)[:, None, None]
    unseen = (position >= ends).flatten().nonzero()[:, 0]
    return DecodePlan(table.flatten(), hidden, unseen, len(lengths))


def decode(
    q: Tensor, layer: PagedLayer, plan: DecodePlan, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of one new token of each sequence; q and what is returned (batch, num_heads, head_dim)."""
    k, v = _gather(layer, plan)
    if softcap is not None or sinks is not None:
        options: dict[str, Any] = {"softmax_scale": scale, "softcap": softcap, "sinks": sinks}
        out = attention(q[:, None], k, v, bias=plan.hidden, **options)
        assert isinstance(out, Tensor)
        return out[:, 0]
    batch, num_heads, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[2], -1, head_dim)  # the heads of a group are rows over the same keys
    dtype, hidden = q.dtype, plan.hidden
    if dtype in HALVES:  # as in attend.py
        grouped, k, v = grouped.float(), k.float(), v.float()
    elif hidden is not None:
        hidden = hidden.to(dtype)
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=hidden, scale=scale)
    return out.to(dtype).reshape(batch, num_heads, -1)


def extend(
    q: Tensor,
    layer: PagedLayer,
    tables: Tables,
    rows: Sequence[tuple[int, int]],
    first_row: int,
    mask: Mask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> list[Tensor]:
    """Attention of several new tokens a sequence: (new, all) tokens of each, from `first_row` of the table on.

    q (total, num_heads, head_dim), packed. Returns one tensor a sequence.
    """
    outs, start = [], 0
    for row, (count, length) in enumerate(rows, first_row):
        table = tables.block_table[row, : -(-length // layer.key_pages.shape[1])].long()
        k, v = (pages.flatten(0, 1)[None, :length] for pages in layer.gather(table))
        options: dict[str, Any] = {"softmax_scale": scale, "softcap": softcap, "sinks": sinks}
        out = attention(q[None, start : start + count], k, v, mask, **options)
        assert isinstance(out, Tensor)
        outs.append(out[0])
        start += count
    return outs


def _gather(layer: PagedLayer, plan: DecodePlan) -> tuple[Tensor, Tensor]:
    """Two of (batch, columns * page_size, num_kv_heads, dim); what was never written is 0: it may have been NaN."""
    # fresh memory costs more than the copy: the kernel hands it out page by page, so one layer leaves it to the next
    found = plan.buffers["kv"] = layer.gather(plan.pages, plan.buffers.get("kv"))
    rows = [pages.flatten(0, 1) for pages in found]
    for one in rows:
        one.index_fill_(0, plan.unseen, 0)
    keys, values = (one.unflatten(0, (plan.batch, -1)) for one in rows)
    return keys, values


__all__ = ["DecodePlan", "decode", "extend", "plan"]
