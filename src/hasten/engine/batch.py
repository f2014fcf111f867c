"""From chunks of sequences to the packed tensors of one forward. Called by the engine; runs nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.cache.ledger import Holding
from hasten.cache.paged import PagedCache, Tables
from hasten.cache.pages import Copy
from hasten.engine import attend_cpu, attend_tiles
from hasten.engine.attend_cpu import DecodePlan
from hasten.engine.attend_pages import Pages, Part
from hasten.engine.attend_tiles import TilePlan


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one sequence gives to a forward: tokens `ids` at positions `start` and on.

    pending: the place, among the tokens that the step before has chosen, of the last of `ids`, where that has not been
    read from the device. holding: has room for them. rows: those of its tokens, counted from the first of `ids`, whose
    logits are wanted. copies: pages to copy first, by kind.
    """

    ids: Sequence[int]
    start: int
    holding: Holding
    rows: Sequence[int]
    copies: tuple[Sequence[Copy], ...] = ()
    pending: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """One forward: `ids` and `positions` (1, total), where K and V lie, and which rows give logits, int64 (rows,).

    pending: which of the tokens that the step before has chosen go where in `ids`, int64 (2, any), None for none.
    """

    ids: Tensor
    positions: Tensor
    pages: Pages
    rows: Tensor
    copies: tuple[tuple[Copy, ...], ...]
    pending: Tensor | None


def pack(pieces: Sequence[Piece], cache: PagedCache, device: torch.device, *, in_tiles: bool = False) -> Batch:
    """The tensors of one forward over these pieces, in their order; logits come in the order of pieces and rows.

    in_tiles: attention on a CPU is that of attend_tiles.py, for pieces of one token.
    """
    ids = [token for piece in pieces for token in piece.ids]
    positions = [position for piece in pieces for position in range(piece.start, piece.start + len(piece.ids))]
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece.ids))
    rows = [first + row for first, piece in zip(ends, pieces, strict=False) for row in piece.rows]
    pending = [
        (piece.pending, end - 1) for piece, end in zip(pieces, ends[1:], strict=True) if piece.pending is not None
    ]
    lengths = tuple((len(piece.ids), piece.start + len(piece.ids)) for piece in pieces)
    kinds, is_gathered = range(len(cache.kinds)), _is_gathered(cache, device)
    return Batch(
        ids=put([ids], torch.int64, device),
        positions=put([positions], torch.int64, device),
        pages=Pages(
            cache=cache,
            tables=tuple(_tables(pieces, kind, cache, device) for kind in kinds),
            cache_seqlens=put([length for _, length in lengths], torch.int32, device),
            cu_seqlens_q=put(ends, torch.int32, device) if ends[-1] > len(pieces) else None,
            lengths=lengths,
            plans=tuple(_plan(pieces, lengths, kind, cache, in_tiles) if is_gathered else None for kind in kinds),
            parts=() if is_gathered else parts(lengths, cache.page_size, device),
        ),
        rows=put(rows, torch.int64, device),
        copies=copies_of(pieces, len(cache.kinds)),
        pending=put(pending, torch.int64, device).t() if pending else None,
    )


def copies_of(pieces: Sequence[Piece], num_kinds: int) -> tuple[tuple[Copy, ...], ...]:
    """Pages to copy before a forward of these pieces, by kind."""
    return tuple(
        tuple(copy for piece in pieces if piece.copies for copy in piece.copies[kind]) for kind in range(num_kinds)
    )


def parts(lengths: Sequence[tuple[int, int]], page_size: int, device: torch.device) -> tuple[Part, ...]:
    """The calls of attention for sequences with these (new tokens, all tokens), at least one new token each.

    The first sequences that have one new token attend in one call, chunks of prompts in another.
    """
    num_single, batch = _num_single(lengths), len(lengths)
    made = []
    for begin, end in ((0, num_single), (num_single, batch)):
        own = lengths[begin:end]
        if not own:
            continue
        num_pages = -(-max(length for _, length in own) // page_size)
        if begin < num_single:
            made.append(Part(begin, end, begin, end, num_pages))
            continue
        ends = [0, *itertools.accumulate(count for count, _ in own)]
        most, starts = max(count for count, _ in own), put(ends, torch.int32, device)
        made.append(Part(begin, end, num_single, num_single + ends[-1], num_pages, starts, most))
    return tuple(made)


def put(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor on a device, which the host does not wait for."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _is_gathered(cache: PagedCache, device: torch.device) -> bool:
    """True if attention is that of attend_cpu.py; 8-bit pages go the way of a GPU also on a CPU."""
    return device.type == "cpu" and not cache.is_quantized


def _tables(pieces: Sequence[Piece], kind: int, cache: PagedCache, device: torch.device) -> Tables:
    """Page tables as long as the longest sequence; where pages are gathered, also the place of every new token."""
    rows = [piece.holding.tables[kind].pages for piece in pieces]
    longest = max(map(len, rows))
    block_table = put([pages + [0] * (longest - len(pages)) for pages in rows], torch.int32, device)
    if not _is_gathered(cache, device):
        return Tables(block_table)
    size, num_layers = cache.page_size, cache.pools[kind][0].shape[1]
    places = [
        pages[position // size] * num_layers * size + position % size
        for piece, pages in zip(pieces, rows, strict=True)
        for position in range(piece.start, piece.start + len(piece.ids))
    ]
    return Tables(block_table, torch.tensor(places))


def _num_single(lengths: Sequence[tuple[int, int]]) -> int:
    """How many sequences at the beginning have one new token each."""
    return next((index for index, (count, _) in enumerate(lengths) if count > 1), len(lengths))


def _plan(
    pieces: Sequence[Piece], lengths: Sequence[tuple[int, int]], kind: int, cache: PagedCache, in_tiles: bool
) -> DecodePlan | TilePlan | None:
    """For the first pieces, as long as they have one token each."""
    num_single = _num_single(lengths)
    if num_single == 0:
        return None
    rows = [piece.holding.tables[kind].pages for piece in pieces[:num_single]]
    ends = [length for _, length in lengths[:num_single]]
    make = attend_tiles.plan if in_tiles else attend_cpu.plan
    return make(rows, ends, cache.kinds[kind].window, cache.page_size)


__all__ = ["Batch", "Piece", "copies_of", "pack", "parts", "put"]
