"""Index lists of the tiles to visit, for any mask: built once for a mask and a tile shape, and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from hasten.errors import ArgumentError
from hasten.masks import Mask
from hasten.ops.tiles.bits import WORD, Chosen, tile_bits
from hasten.ops.tiles.classify import Grid, classify
from hasten.ops.tiles.pieces import Pieces, cut_lines

_WORDS_AT_ONCE = 1 << 18  # of partial tiles under evaluation: 8 million cells
_CACHED_LISTS = 64


@dataclass(frozen=True)
class TileLists:
    """The tiles of a mask, twice: along rows of tiles (forward, dq) and along columns (dk, dv).

    Entries [ptr[i, 0], ptr[i, 1]) of `index` are the wholly visible tiles of row (column) i, in ascending order,
    [ptr[i, 1], ptr[i, 2]) the partial ones, also ascending; all other tiles are hidden. A tile that overhangs the
    matrix is always partial. `*_bits` gives the number of a partial entry's bit map, 0 for the others.
    i = (b * heads + h) * num_rows + row, or * num_cols + col; b is 0 if batch is 1, and h likewise (shared).

    row_ptr (batch * heads * num_rows, 3), col_ptr (batch * heads * num_cols, 3), index and bits (entries,),
    bits (maps, block_m, block_n // 32): bit n % 32 of word [., m, n // 32] is the cell (m, n). All int32.
    """

    batch: int
    heads: int
    num_rows: int
    num_cols: int
    block_m: int
    block_n: int
    row_ptr: Tensor
    row_index: Tensor
    row_bits: Tensor
    col_ptr: Tensor
    col_index: Tensor
    col_bits: Tensor
    bits: Tensor

    @cached_property
    def keys_seen(self) -> Tensor:
        """int32 (maps, block_n // 32): bit n % 32 of word [., n // 32] is whether any row sees key n of the tile."""
        return _any_row(self.bits)

    @cached_property
    def col_keys_seen(self) -> Tensor:
        """int32 (batch * heads * num_cols, block_n // 32): `keys_seen` of a whole column of tiles; 0 if it is empty."""
        begin, middle, end = self.col_ptr.long().unbind(1)
        line = torch.arange(len(begin), device=begin.device)
        line = line.repeat_interleave(end - begin, output_size=len(self.col_index))
        entry = torch.arange(len(line), device=begin.device)
        words = torch.where((entry < middle[line])[:, None], -1, self.keys_seen[self.col_bits.long()])
        step = 1  # an entry holds the keys of `step` entries from its own on, and a column has num_rows at most
        while step < self.num_rows and step < len(line):
            is_same = line[:-step] == line[step:]
            words[:-step] = words[:-step] | torch.where(is_same[:, None], words[step:], 0)
            step *= 2
        words = torch.cat([words, words.new_zeros(1, words.shape[1])])
        return torch.where((begin < end)[:, None], words[begin], 0)

    @cached_property
    def row_order(self) -> Tensor:
        """int32 (num_rows,): the rows of tiles, those with most visits over all tables first, equals ascending."""
        return _longest_first(self.row_ptr.view(self.batch * self.heads, self.num_rows, 3))

    @cached_property
    def col_order(self) -> Tensor:
        """int32 (num_cols,): the columns of tiles, ordered like the rows."""
        return _longest_first(self.col_ptr.view(self.batch * self.heads, self.num_cols, 3))

    def row_pieces(self, num_heads: int, num_processors: int) -> Pieces | None:
        """The rows of tiles with the long ones cut, for a launch over `num_heads` heads of all sequences, or None."""
        return self._cut(self.row_ptr, self.num_rows, (num_heads, 1, num_processors))

    def col_pieces(self, num_heads: int, group_size: int, num_processors: int) -> Pieces | None:
        """The columns of tiles with the long ones cut; an item visits what `group_size` heads visit together."""
        return self._cut(self.col_ptr, self.num_cols, (num_heads, group_size, num_processors))

    def _cut(self, ptr: Tensor, lines: int, key: tuple[int, int, int]) -> Pieces | None:
        """Waits for the device to know the visits, once for each key."""
        found: dict[tuple[Any, ...], Pieces | None] = self._pieces
        if (ptr is self.col_ptr, key) not in found:
            num_heads, group_size, num_processors = key
            tables = self.batch * self.heads
            most: list[int] = (ptr[:, 2] - ptr[:, 0]).view(tables, lines).amax(0).tolist()
            total = len(self.row_index) * num_heads // tables
            visits = [group_size * count for count in most]
            pieces = cut_lines(visits, total, num_heads // group_size, num_processors, ptr.device)
            found[ptr is self.col_ptr, key] = pieces
        return found[ptr is self.col_ptr, key]

    @cached_property
    def _pieces(self) -> dict[tuple[Any, ...], Pieces | None]:
        return {}

    @property
    def density(self) -> float:
        """Tiles visited / all tiles."""
        return len(self.row_index) / max(1, self.batch * self.heads * self.num_rows * self.num_cols)


def tile_lists(
    mask: Mask,
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    block_m: int,
    block_n: int,
    device: torch.device,
) -> TileLists:
    """The lists of a mask, from the cache if its tensors are the same objects and were not written to since."""
    tables = batch if mask.varies_by_batch else 1, num_heads if mask.varies_by_head else 1
    return _cache.get(mask, (*tables, seqlen_q, seqlen_k, block_m, block_n, torch.device(device)))


def build_tile_lists(
    mask: Mask,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    block_m: int,
    block_n: int,
    device: torch.device,
) -> TileLists:
    """The lists, made anew. `batch` and `heads` are 1 where the mask is the same for all."""
    if block_n % WORD or block_n < WORD or block_m < 1:
        raise ArgumentError("block_n", f"a multiple of {WORD}", block_n, "choose another tile")
    grid = Grid(seqlen_q, seqlen_k, block_m, block_n, device)
    shape = (batch, heads, grid.num_rows, grid.num_cols)
    if 0 in shape:
        full = partial = torch.zeros(shape, dtype=torch.bool, device=device)
        tile, bits = torch.zeros(0, dtype=torch.int64, device=device), _no_bits(grid)
        numbers = tile
    else:
        verdict = classify(mask, grid)
        full = (verdict.every & grid.inside()).expand(shape).contiguous()
        partial = (verdict.some & ~full).expand(shape).contiguous()
        tile, numbers, bits = _decide(mask, grid, full, partial)
    rows = _layout(full, partial, tile, numbers, by_column=False)
    cols = _layout(full, partial, tile, numbers, by_column=True)
    return TileLists(*shape, block_m, block_n, *rows, *cols, bits)


def _longest_first(ptr: Tensor) -> Tensor:
    visits = (ptr[..., 2] - ptr[..., 0]).sum(0)
    return visits.argsort(descending=True, stable=True).to(torch.int32)


def _any_row(bits: Tensor) -> Tensor:
    """The `or` of the rows of bit maps (maps, rows, words), by halves."""
    while bits.shape[1] > 1:
        half = bits.shape[1] // 2
        rest = bits[:, 2 * half :]
        bits = torch.cat([bits[:, :half] | bits[:, half : 2 * half], rest], dim=1)
    return bits[:, 0].contiguous()


def _no_bits(grid: Grid) -> Tensor:
    return torch.zeros((1, grid.block_m, grid.block_n // WORD), dtype=torch.int32, device=grid.device)


def _decide(mask: Mask, grid: Grid, full: Tensor, partial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate the undecided tiles; moves those that are hidden or visible out of `partial`, in place.

    Returns the partial tiles (numbered along the tables), the bit map number of each, and the bit maps.
    """
    tile = partial.flatten().nonzero().squeeze(1)
    at_once = max(1, _WORDS_AT_ONCE // (grid.block_m * grid.block_n // WORD))
    kept_tiles, kept_bits, kept_numbers, num_maps = [], [], [], 0
    for chunk in tile.split(at_once):
        bits = tile_bits(mask, _chosen(chunk, grid, partial.shape)).flatten(1)
        hidden, visible = (bits == 0).all(1), (bits == -1).all(1)
        full.view(-1)[chunk] = visible
        keep = (~(hidden | visible)).nonzero().squeeze(1)
        maps, numbers = _distinct(bits[keep])
        kept_tiles.append(chunk[keep])
        kept_bits.append(maps)
        kept_numbers.append(numbers + num_maps)
        num_maps += len(maps)
    partial.zero_()
    if not num_maps:
        return tile[:0], tile[:0], _no_bits(grid)
    tile = torch.cat(kept_tiles)
    partial.view(-1)[tile] = True
    maps, again = _distinct(torch.cat(kept_bits))
    numbers = again[torch.cat(kept_numbers)]
    return tile, numbers, maps.view(-1, grid.block_m, grid.block_n // WORD)


def _chosen(tile: Tensor, grid: Grid, shape: torch.Size) -> Chosen:
    tile = tile[:, None, None]
    row = tile // shape[3]
    head = row // shape[2]
    return Chosen(grid, head // shape[1], head % shape[1], row % shape[2], tile % shape[3])


def _distinct(bits: Tensor) -> tuple[Tensor, Tensor]:
    """(maps, number): the different rows of `bits`, and which of them each row is.

    Rows are told apart by a 64-bit hash, which is then verified: sorting whole rows costs ten times more.
    """
    numbers = torch.arange(len(bits), device=bits.device)
    factors = torch.randint(-(2**63), 2**63 - 1, bits.shape[1:], generator=torch.Generator().manual_seed(1))
    hashes = (bits * factors.to(bits.device)).sum(-1)
    values, same = torch.unique(hashes, return_inverse=True)
    first = numbers.new_empty(len(values)).scatter_(0, same, numbers)
    maps = bits[first]
    return (maps, same) if torch.equal(maps[same], bits) else (bits, numbers)


def _layout(
    full: Tensor, partial: Tensor, tile: Tensor, numbers: Tensor, *, by_column: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(ptr, index, bits) along rows or columns of tiles; `numbers` are the bit maps of the ascending `tile`."""
    num_rows, num_cols = full.shape[2:]
    if by_column:
        full, partial = full.mT, partial.mT
    lines, cells = full.shape[:3].numel(), full.shape[3]
    both = torch.stack([full, partial], dim=-2).view(lines, 2, cells)
    counts = both.sum(-1).flatten()
    ends = counts.cumsum(0).view(lines, 2)
    ptr = torch.stack([ends[:, 0] - counts.view(lines, 2)[:, 0], ends[:, 0], ends[:, 1]], dim=1)
    entry = both.flatten().nonzero().squeeze(1)
    index, is_partial, line = entry % max(1, cells), entry // max(1, cells) % 2, entry // max(1, 2 * cells)
    if by_column:
        table, col = line // max(1, num_cols), line % max(1, num_cols)
        place = (table * num_rows + index) * num_cols + col
    else:
        place = line * num_cols + index
    maps = torch.zeros_like(index)
    if len(tile):
        found = numbers[torch.searchsorted(tile, place).clamp(max=len(tile) - 1)]
        maps = torch.where(is_partial == 1, found, 0)
    return ptr.to(torch.int32), index.to(torch.int32), maps.to(torch.int32)


class _Entry(NamedTuple):
    tensors: list[TensorWeakRef]
    versions: list[int | Tensor]
    lists: TileLists


class _Cache:
    """Lists by mask and sizes, the least recently used dropped first.

    A mask without tensors is known by its value. A tensor is known by its identity, held weakly, and by the
    version that every in-place write counts up; inference tensors have none, so a copy of their values is kept.
    """

    def __init__(self) -> None:
        self._lists: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, mask: Mask, sizes: tuple[Any, ...]) -> TileLists:
        """The lists of that mask for (batch, heads, seqlen_q, seqlen_k, block_m, block_n, device)."""
        text, tensors = mask.parts()
        key = (text, tuple(id(tensor) for tensor in tensors), *sizes)
        with self._lock:
            entry = self._lists.get(key)
            if entry is not None and _unchanged(tensors, entry):
                self._lists.move_to_end(key)
                return entry.lists
        versions = [_version(tensor) for tensor in tensors]
        lists = build_tile_lists(mask, *sizes)
        with self._lock:
            self._lists[key] = _Entry([TensorWeakRef(tensor) for tensor in tensors], versions, lists)
            self._lists.move_to_end(key)
            while len(self._lists) > _CACHED_LISTS:
                self._lists.popitem(last=False)
        return lists


def _version(tensor: Tensor) -> int | Tensor:
    return tensor.clone() if tensor.is_inference() else tensor._version


def _unchanged(tensors: list[Tensor], entry: _Entry) -> bool:
    for tensor, reference, version in zip(tensors, entry.tensors, entry.versions, strict=True):
        if reference() is not tensor:
            return False
        if not (torch.equal(tensor, version) if isinstance(version, Tensor) else tensor._version == version):
            return False
    return True


_cache = _Cache()
