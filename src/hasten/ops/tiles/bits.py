"""The cells of chosen tiles as packed bits: bit n % 32 of word [tile, m, n // 32] is the cell (m, n) of the tile.

Most masks are evaluated a word of 32 keys at a time; those that are any matrix go cell by cell. Exact: equal
to `Mask.keep`, and 0 outside the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from hasten.masks import And, Causal, Cells, Documents, Full, Global, Mask, Or, Padding, Window
from hasten.ops.tiles.classify import Grid, by_query

WORD = 32


@dataclass(frozen=True)
class Chosen:
    """Tiles of a grid, int64 (num_tiles, 1, 1) each, and the queries and words of keys they hold."""

    grid: Grid
    batch: Tensor
    head: Tensor
    row: Tensor
    col: Tensor

    @property
    def query(self) -> Tensor:
        """int64 (num_tiles, block_m, 1); past the end of the matrix for tiles that overhang it."""
        return self.row * self.grid.block_m + torch.arange(self.grid.block_m, device=self.row.device)[:, None]

    @property
    def position(self) -> Tensor:
        """Key position of each query."""
        return self.query + self.grid.offset

    @property
    def word_key(self) -> Tensor:
        """int64 (num_tiles, 1, block_n // 32): the first key of each word."""
        return self.col * self.grid.block_n + torch.arange(0, self.grid.block_n, WORD, device=self.col.device)


def tile_bits(mask: Mask, tiles: Chosen) -> Tensor:
    """int32 (num_tiles, block_m, block_n // 32)."""
    inside = _run(tiles.word_key, 0, tiles.grid.seqlen_k) & _flag(tiles.query < tiles.grid.seqlen_q)
    return _words(mask, tiles) & inside


def _words(mask: Mask, tiles: Chosen) -> Tensor:
    """int32, broadcastable to the words of the tiles; anything outside the matrix."""
    if isinstance(mask, And | Or):
        join = torch.bitwise_and if isinstance(mask, And) else torch.bitwise_or
        return reduce(join, [_words(part, tiles) for part in mask.masks])
    return _KINDS.get(type(mask), _cell_by_cell)(mask, tiles)


def _full(mask: Full, tiles: Chosen) -> Tensor:
    return torch.full((1, 1, 1), -1, dtype=torch.int32, device=tiles.row.device)


def _causal(mask: Causal, tiles: Chosen) -> Tensor:
    return _run(tiles.word_key, None, tiles.position + 1)


def _window(mask: Window, tiles: Chosen) -> Tensor:
    steps = torch.as_tensor(mask.dilation, device=tiles.row.device).reshape(-1)
    number = tiles.head if len(steps) > 1 else torch.zeros_like(tiles.head)
    step, position = steps[number], tiles.position
    begin = None if mask.left is None else position - mask.left * step
    end = None if mask.right is None else position + mask.right * step + 1
    words = _run(tiles.word_key, begin, end)
    if mask.dilation == 1:
        return words
    largest = int(steps.max())
    phase = torch.arange(largest, device=steps.device)[:, None] + torch.arange(WORD, device=steps.device)
    combs = _pack(phase % steps[:, None, None] == 0)  # (steps, largest, 1): every step-th key
    return words & combs[number, (tiles.word_key - position) % step, 0]


def _global(mask: Global, tiles: Chosen) -> Tensor:
    flags = mask.flags(tiles.grid.seqlen_k, tiles.row.device)
    row = tiles.batch if flags.shape[0] > 1 else torch.zeros_like(tiles.batch)
    words = torch.zeros((1, 1, 1), dtype=torch.int32, device=tiles.row.device)
    if mask.keys:
        packed = _pack(torch.nn.functional.pad(flags, (0, -flags.shape[1] % tiles.grid.block_n)))
        words = words | packed[row, tiles.word_key // WORD]
    if mask.queries:
        query = tiles.query.clamp(max=tiles.grid.seqlen_q - 1)
        words = words | _flag(by_query(flags, tiles.grid, False)[row, query])
    return words


def _documents(mask: Documents, tiles: Chosen) -> Tensor:
    """Documents are runs of keys: from where the query's own begins to where it ends."""
    bounds = mask.cu_seqlens.to(tiles.row.device, torch.int64).reshape(-1, mask.cu_seqlens.shape[-1])
    numbers = mask.numbers(tiles.grid.seqlen_k, tiles.row.device)
    row = tiles.batch if numbers.shape[0] > 1 else torch.zeros_like(tiles.batch)
    last = bounds.shape[-1] - 1
    own = by_query(numbers, tiles.grid, -1)[row, tiles.query.clamp(max=tiles.grid.seqlen_q - 1)]
    begin, end = bounds[row, own.clamp(0, last)], bounds[row, (own + 1).clamp(0, last)]
    return _run(tiles.word_key, begin, end) & _flag((own >= 0) & (own < last))


def _padding(mask: Padding, tiles: Chosen) -> Tensor:
    begin, end = mask.key_range(tiles.grid.seqlen_k, tiles.row.device)[tiles.batch].unbind(-1)
    return _run(tiles.word_key, begin, end)


def _cell_by_cell(mask: Mask, tiles: Chosen) -> Tensor:
    grid = tiles.grid
    key = tiles.col * grid.block_n + torch.arange(grid.block_n, device=tiles.col.device)
    query, key = tiles.query.clamp(max=grid.seqlen_q - 1), key.clamp(max=grid.seqlen_k - 1)
    keep = mask.visible(Cells(tiles.batch, tiles.head, query, key, grid.seqlen_q, grid.seqlen_k))
    return _pack(keep.expand(len(tiles.row), grid.block_m, grid.block_n))


def _run(word_key: Tensor, begin: Tensor | int | None, end: Tensor | int | None) -> Tensor:
    """Words whose keys in [begin, end) are set; None is unlimited."""
    below = torch.tensor([(1 << n) - 1 for n in range(WORD + 1)], device=word_key.device).to(torch.int32)
    words = below[WORD:]
    if end is not None:
        words = below[(end - word_key).clamp(0, WORD)]
    if begin is not None:
        words = words & ~below[(begin - word_key).clamp(0, WORD)]
    return words


def _flag(flags: Tensor) -> Tensor:
    """All bits of a word where True."""
    return -flags.to(torch.int32)


def _pack(cells: Tensor) -> Tensor:
    """bool (..., n), n a multiple of 32 -> int32 (..., n // 32)."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=cells.device)
    octets = (cells.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32)


_KINDS: dict[type[Mask], Callable[[Any, Chosen], Tensor]] = {
    Full: _full,
    Causal: _causal,
    Window: _window,
    Global: _global,
    Documents: _documents,
    Padding: _padding,
}
