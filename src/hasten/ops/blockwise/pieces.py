"""A mask as pieces of work: runs of query rows, the keys they visit, and what is hidden among those.

Each (batch, head, query) that sees a key is in exactly one piece; the rest are in none. Both engines of
blockwise (flash, scores) work through these; neither knows masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.masks import And, Mask, Padding
from hasten.ops.tiles import Band, TileLists, as_band, tile_lists

_ROWS = 128  # of a piece that needs a matrix of hidden cells
_BLOCK_N = 64  # keys of a tile in index lists
_CELLS_UNPACKED = 1 << 22  # bit maps unpacked at once; above, those of one row of tiles at a time
_FEW_KEYS = 2048  # up to here, for at most _ROWS queries, the mask itself is cheaper than lists of its tiles


@dataclass(frozen=True)
class Piece:
    """Query rows and the keys they visit, for a run of batch entries and query heads.

    key: a run of keys, or int64 key numbers. hidden: (batch or 1, heads or 1, rows, keys), 0 where visible and -inf
    where not, in the dtype of the computation; None if all is visible. is_causal: row i sees the first i + 1 of as
    many keys.
    """

    batch: slice
    head: slice
    query: slice
    key: slice | Tensor
    hidden: Tensor | None = None
    is_causal: bool = False

    @property
    def rows(self) -> int:
        """Number of query rows."""
        return int(self.query.stop - self.query.start)

    @property
    def num_keys(self) -> int:
        """Number of keys visited."""
        return int(self.key.stop - self.key.start) if isinstance(self.key, slice) else len(self.key)

    def positions(self, device: torch.device) -> Tensor:
        """int64 (keys,): the keys visited."""
        return torch.arange(self.key.start, self.key.stop, device=device) if isinstance(self.key, slice) else self.key


@dataclass(frozen=True)
class Sizes:
    """The attention to cut up. `dtype` is that of the computation."""

    batch: int
    num_heads: int
    seqlen_q: int
    seqlen_k: int
    dtype: torch.dtype
    device: torch.device


def pieces(mask: Mask, sizes: Sizes, *, allow_causal: bool) -> Iterator[Piece]:
    """The pieces of a mask; ones with `is_causal` only if `allow_causal`."""
    if 0 in (sizes.batch, sizes.seqlen_q, sizes.seqlen_k):
        return
    band = as_band(mask)
    if band is None:
        is_small = sizes.seqlen_q <= _ROWS and sizes.seqlen_k <= _FEW_KEYS
        yield from [_outright(mask, sizes)] if is_small else _listed(tile_lists_of(mask, sizes), sizes)
        return
    for batch, key_begin, key_end in _key_ranges(band, sizes):
        for piece in _of_band(band, sizes, key_begin, key_end, allow_causal):
            yield replace(piece, batch=batch)


def split(piece: Piece, group_size: int, cells: int) -> Iterator[Piece]:
    """The same piece as smaller ones of about that many cells, batch first, then heads, then rows."""
    rows = min(piece.rows, _ROWS)
    width = piece.num_keys * (piece.head.stop - piece.head.start)
    batch_step = max(1, cells // (width * rows))
    whole_groups = piece.head.stop - piece.head.start > 1
    head_unit = group_size if whole_groups else 1
    head_step = max(1, cells // (piece.num_keys * rows * head_unit)) * head_unit
    row_step = max(1, min(rows, cells // (piece.num_keys * head_unit)))
    for b in range(0, piece.batch.stop - piece.batch.start, batch_step):
        for h in range(0, piece.head.stop - piece.head.start, head_step):
            for row in range(0, piece.rows, row_step):
                yield _part(piece, (b, h, row), (batch_step, head_step, row_step))


def _part(piece: Piece, starts: tuple[int, int, int], steps: tuple[int, int, int]) -> Piece:
    """The part of a piece from `starts` on, of at most `steps`, in batch entries, heads and rows."""
    whole = piece.batch, piece.head, piece.query
    batch, head, query = (
        slice(own.start + start, min(own.start + start + step, own.stop))
        for own, start, step in zip(whole, starts, steps, strict=True)
    )
    hidden = piece.hidden
    if hidden is not None:
        first = (slice(start, start + step) for start, step in zip(starts, steps, strict=True))
        hidden = hidden[tuple(own if size > 1 else slice(None) for own, size in zip(first, hidden.shape, strict=False))]
    return replace(piece, batch=batch, head=head, query=query, hidden=hidden)


def without_padding(mask: Mask, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v (batch, seqlen_k, ...) with 0 where padding hides a key, for masks whose tiles may hold such keys.

    What stands there may be NaN, and 0 * NaN would come through a hidden cell.
    """
    paddings = [part for part in mask.masks if isinstance(part, Padding)] if isinstance(mask, And) else []
    if not paddings or as_band(mask) is not None:
        return k, v
    key = torch.arange(k.shape[1], device=k.device)
    for padding in paddings:
        first, end = padding.key_range(k.shape[1], k.device)[:, :, None].unbind(1)
        gone = ((key < first) | (key >= end))[:, :, None, None]
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    return k, v


def _key_ranges(band: Band, sizes: Sizes) -> list[tuple[slice, int, int]]:
    """(batch entries, first key, one past the last key) of runs of batch entries with the same padding."""
    if band.padding is None:
        return [(slice(0, sizes.batch), 0, sizes.seqlen_k)]
    ranges: list[tuple[slice, int, int]] = []
    for number, (begin, end) in enumerate(band.padding.key_range(sizes.seqlen_k, torch.device("cpu")).tolist()):
        if ranges and ranges[-1][1:] == (begin, end):
            ranges[-1] = (slice(ranges[-1][0].start, number + 1), begin, end)
        else:
            ranges.append((slice(number, number + 1), begin, end))
    return ranges


def _of_band(band: Band, sizes: Sizes, key_begin: int, key_end: int, allow_causal: bool) -> Iterator[Piece]:
    """Pieces of a band for batch entries whose real keys are [key_begin, key_end)."""
    offset = sizes.seqlen_k - sizes.seqlen_q
    left = None if band.left is None or band.left >= sizes.seqlen_k - 1 else band.left
    right = None if band.right is None or band.right >= sizes.seqlen_q - 1 else band.right
    everywhere, heads = slice(0, sizes.batch), slice(0, sizes.num_heads)
    start, step = 0, _ROWS
    if left is None and right is None:
        step = sizes.seqlen_q
    elif left is None and right == 0 and allow_causal and key_begin >= offset:
        start = max(0, key_end - offset)
        first = key_begin - offset
        if first < start:
            yield Piece(everywhere, heads, slice(first, start), slice(key_begin, key_end), is_causal=True)
        step = max(1, sizes.seqlen_q - start)
    hidden: dict[tuple[int, int, int], Tensor] = {}
    for q0 in range(start, sizes.seqlen_q, step):
        q1 = min(q0 + step, sizes.seqlen_q)
        keys = Band(left, right).keys(q0, q1, sizes.seqlen_q, sizes.seqlen_k, key_begin, key_end)
        if keys.begin >= keys.end:
            continue
        piece = Piece(everywhere, heads, slice(q0, q1), slice(keys.begin, keys.end))
        if (keys.begin, keys.end) != (keys.full_begin, keys.full_end):
            shape = q0 + offset - keys.begin, q1 - q0, keys.end - keys.begin
            if shape not in hidden:
                hidden = {shape: _hidden_by_band(left, right, *shape, sizes)}
            piece = replace(piece, hidden=hidden[shape])
        yield piece


def _outright(mask: Mask, sizes: Sizes) -> Piece:
    """All of a small attention as one piece."""
    batch = sizes.batch if mask.varies_by_batch else 1
    heads = sizes.num_heads if mask.varies_by_head else 1
    keep = mask.keep(sizes.seqlen_q, sizes.seqlen_k, batch=batch, num_heads=heads, device=sizes.device)
    hidden = torch.zeros(keep.shape, dtype=sizes.dtype, device=sizes.device).masked_fill_(~keep, -torch.inf)
    rows, keys = slice(0, sizes.seqlen_q), slice(0, sizes.seqlen_k)
    return Piece(slice(0, sizes.batch), slice(0, sizes.num_heads), rows, keys, hidden)


def _hidden_by_band(left: int | None, right: int | None, position: int, rows: int, keys: int, sizes: Sizes) -> Tensor:
    """(1, 1, rows, keys): 0 or -inf; the first row stands at `position`, counted from the first key."""
    distance = (
        torch.arange(keys, device=sizes.device) - torch.arange(position, position + rows, device=sizes.device)[:, None]
    )
    hidden = torch.zeros(rows, keys, dtype=sizes.dtype, device=sizes.device)
    if left is not None:
        hidden.masked_fill_(distance < -left, -torch.inf)
    if right is not None:
        hidden.masked_fill_(distance > right, -torch.inf)
    return hidden[None, None]


def tile_lists_of(mask: Mask, sizes: Sizes) -> TileLists:
    """Index lists at the tile shape of this implementation."""
    shape = sizes.batch, sizes.num_heads, sizes.seqlen_q, sizes.seqlen_k
    return tile_lists(mask, *shape, _ROWS, _BLOCK_N, sizes.device)


def _listed(lists: TileLists, sizes: Sizes) -> Iterator[Piece]:
    """One piece for each row of tiles that visits any; keys that do not stand together are listed by number."""
    unpacked = _unpack(lists.bits, sizes.dtype) if lists.bits.numel() * 32 <= _CELLS_UNPACKED else None
    within = torch.arange(_BLOCK_N, device=sizes.device)
    hidden: dict[tuple[int, ...], Tensor] = {}
    for line, (begin, partial, end) in enumerate(lists.row_ptr.tolist()):
        if begin == end:
            continue
        table, row = divmod(line, lists.num_rows)
        b, h = divmod(table, lists.heads)
        query = slice(row * _ROWS, min((row + 1) * _ROWS, sizes.seqlen_q))
        cols, order = lists.row_index[begin:end].sort()
        first, last = int(cols[0]), int(cols[-1])
        key: slice | Tensor = slice(first * _BLOCK_N, min((last + 1) * _BLOCK_N, sizes.seqlen_k))
        if last - first + 1 != len(cols):
            key = (cols[:, None].long() * _BLOCK_N + within).flatten()
            key = key[: len(key) - max(0, (last + 1) * _BLOCK_N - sizes.seqlen_k)]
        piece = Piece(
            slice(b, b + 1) if lists.batch > 1 else slice(0, sizes.batch),
            slice(h, h + 1) if lists.heads > 1 else slice(0, sizes.num_heads),
            query,
            key,
        )
        if partial < end:
            maps = lists.row_bits[partial:end]
            same = (partial - begin, piece.rows, piece.num_keys, *order.tolist(), *maps.tolist())
            if same not in hidden:  # inside a band, row after row is the same
                tiles = _unpack(lists.bits[maps], sizes.dtype) if unpacked is None else unpacked[maps]
                tiles = torch.cat([tiles.new_zeros(partial - begin, *tiles.shape[1:]), tiles])[order]
                cells = tiles.transpose(0, 1).reshape(_ROWS, -1)[: piece.rows, : piece.num_keys]
                hidden = {same: cells[None, None]}
            piece = replace(piece, hidden=hidden[same])
        yield piece


def _unpack(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """int32 (maps, block_m, block_n // 32) -> (maps, block_m, block_n): 0 where the bit is set, else -inf."""
    cells = ((bits[..., None] >> torch.arange(32, dtype=torch.int32, device=bits.device)) & 1).flatten(-2)
    return torch.zeros(cells.shape, dtype=dtype, device=bits.device).masked_fill_(cells == 0, -torch.inf)
