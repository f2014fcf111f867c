"""Three-valued classification of every tile of a mask, by closed form and pooled tables, never cell by cell.

A tile is hidden if not `some`, visible if `every`, and undecided otherwise. `some` may be too large and `every`
too small, never the other way, so that `&` and `|` of masks are `&` and `|` of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hasten.masks import And, BlockSparse, Causal, Dense, Documents, Full, Global, Mask, Or, Padding, Window


@dataclass(frozen=True)
class Grid:
    """An attention matrix of seqlen_q x seqlen_k, both >= 1, cut into tiles of block_m x block_n."""

    seqlen_q: int
    seqlen_k: int
    block_m: int
    block_n: int
    device: torch.device

    @property
    def num_rows(self) -> int:
        """Rows of tiles."""
        return -(-self.seqlen_q // self.block_m)

    @property
    def num_cols(self) -> int:
        """Columns of tiles."""
        return -(-self.seqlen_k // self.block_n)

    @property
    def offset(self) -> int:
        """Key position of query 0."""
        return self.seqlen_k - self.seqlen_q

    def queries(self) -> tuple[Tensor, Tensor]:
        """int64 (num_rows, 1) each: first and last query of each row of tiles."""
        first = torch.arange(self.num_rows, device=self.device)[:, None] * self.block_m
        return first, (first + self.block_m - 1).clamp(max=self.seqlen_q - 1)

    def keys(self) -> tuple[Tensor, Tensor]:
        """int64 (num_cols,) each: first and last key of each column of tiles."""
        first = torch.arange(self.num_cols, device=self.device) * self.block_n
        return first, (first + self.block_n - 1).clamp(max=self.seqlen_k - 1)

    def inside(self) -> Tensor:
        """bool (num_rows, num_cols): tiles that do not overhang the matrix."""
        rows = torch.arange(1, self.num_rows + 1, device=self.device)[:, None] * self.block_m <= self.seqlen_q
        cols = torch.arange(1, self.num_cols + 1, device=self.device) * self.block_n <= self.seqlen_k
        return rows & cols


class Verdict(NamedTuple):
    """bool each, broadcastable to (batch, num_heads, num_rows, num_cols); about the cells inside the matrix."""

    some: Tensor
    every: Tensor


def classify(mask: Mask, grid: Grid) -> Verdict:
    """The verdict on every tile."""
    if isinstance(mask, And | Or):
        verdicts = [classify(part, grid) for part in mask.masks]
        join = torch.logical_and if isinstance(mask, And) else torch.logical_or
        return Verdict(reduce(join, [v.some for v in verdicts]), reduce(join, [v.every for v in verdicts]))
    return _KINDS[type(mask)](mask, grid)


def _full(mask: Full, grid: Grid) -> Verdict:
    yes = torch.ones((1, 1, grid.num_rows, grid.num_cols), dtype=torch.bool, device=grid.device)
    return Verdict(yes, yes)


def _causal(mask: Causal, grid: Grid) -> Verdict:
    return _window(Window(None, 0), grid)


def _window(mask: Window, grid: Grid) -> Verdict:
    """The distances key - position in a tile are an interval, all of whose values occur."""
    first_query, last_query = grid.queries()
    first_key, last_key = grid.keys()
    step = torch.as_tensor(mask.dilation, device=grid.device).reshape(1, -1, 1, 1)
    low = first_key - (last_query + grid.offset)
    high = last_key - (first_query + grid.offset)
    every = (step == 1) | ((low == high) & (low % step == 0))
    seen_low, seen_high = low, high
    if mask.left is not None:
        every = every & (low >= -mask.left * step)
        seen_low = torch.maximum(low, -mask.left * step)
    if mask.right is not None:
        every = every & (high <= mask.right * step)
        seen_high = torch.minimum(high, mask.right * step)
    some = seen_high.div(step, rounding_mode="floor") * step >= seen_low
    shape = (1, step.shape[1], grid.num_rows, grid.num_cols)
    return Verdict(some.expand(shape), every.expand(shape))


def _global(mask: Global, grid: Grid) -> Verdict:
    flags = mask.flags(grid.seqlen_k, grid.device)
    some = every = torch.zeros((1, 1, grid.num_rows, grid.num_cols), dtype=torch.bool, device=grid.device)
    if mask.keys:
        some = some | pool(flags, grid.block_n, torch.any)[:, None, None, :]
        every = every | pool(flags, grid.block_n, torch.all)[:, None, None, :]
    if mask.queries:
        flags = by_query(flags, grid, False)
        some = some | pool(flags, grid.block_m, torch.any)[:, None, :, None]
        every = every | pool(flags, grid.block_m, torch.all)[:, None, :, None]
    return Verdict(some, every)


def _block_sparse(mask: BlockSparse, grid: Grid) -> Verdict:
    """Counts of visible blocks under each tile, from the layout's table of sums."""
    layout = mask.layout.to(grid.device)
    layout = layout.reshape((1,) * (4 - layout.ndim) + layout.shape)
    sums = torch.nn.functional.pad(layout.to(torch.int32), (1, 0, 1, 0)).cumsum(-1).cumsum(-2)
    (top, bottom), (left, right) = grid.queries(), grid.keys()
    top, left = top // mask.block_size, left // mask.block_size
    bottom, right = bottom // mask.block_size + 1, right // mask.block_size + 1
    count = sums[..., bottom, right] - sums[..., top, right] - sums[..., bottom, left] + sums[..., top, left]
    return Verdict(count > 0, count == (bottom - top) * (right - left))


def _documents(mask: Documents, grid: Grid) -> Verdict:
    numbers = mask.numbers(grid.seqlen_k, grid.device)
    last = mask.cu_seqlens.shape[-1] - 1
    key_low = pool(numbers, grid.block_n, torch.amin)[:, None, None, :]
    key_high = pool(numbers, grid.block_n, torch.amax)[:, None, None, :]
    own = by_query(numbers, grid, -1)
    has_own = (own >= 0) & (own < last)
    low = pool(torch.where(has_own, own, last), grid.block_m, torch.amin)[:, None, :, None]
    high = pool(torch.where(has_own, own, -1), grid.block_m, torch.amax)[:, None, :, None]
    all_own = pool(has_own, grid.block_m, torch.all)[:, None, :, None]
    some = (low <= key_high) & (high >= key_low) & (low <= high)
    return Verdict(some, all_own & (low == high) & (key_low == low) & (key_high == high))


def _padding(mask: Padding, grid: Grid) -> Verdict:
    begin, end = mask.key_range(grid.seqlen_k, grid.device)[:, :, None, None, None].unbind(1)
    first, last = grid.keys()
    shape = (begin.shape[0], 1, grid.num_rows, grid.num_cols)
    some = torch.maximum(first, begin) <= torch.minimum(last, end - 1)
    return Verdict(some.expand(shape), ((first >= begin) & (last < end)).expand(shape))


def _dense(mask: Dense, grid: Grid) -> Verdict:
    matrix = mask.matrix.to(grid.device)
    matrix = matrix.reshape((1,) * (4 - matrix.ndim) + matrix.shape)
    shape = (*matrix.shape[:2], grid.num_rows, grid.num_cols)

    def pooled(reduce_dim: Callable[..., Tensor]) -> Tensor:
        rows = pool(matrix.transpose(-1, -2), grid.block_m, reduce_dim).transpose(-1, -2)
        return pool(rows, grid.block_n, reduce_dim).expand(shape)

    return Verdict(pooled(torch.any), pooled(torch.all))


def pool(values: Tensor, size: int, reduce_dim: Callable[..., Tensor]) -> Tensor:
    """Reduce runs of `size` values of the last dimension; the last run may be shorter."""
    whole = values.shape[-1] // size * size
    pooled = [reduce_dim(values[..., :whole].unflatten(-1, (-1, size)), dim=-1)] if whole else []
    if whole < values.shape[-1]:
        pooled.append(reduce_dim(values[..., whole:], dim=-1)[..., None])
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)


def by_query(by_key: Tensor, grid: Grid, before: int | bool) -> Tensor:
    """(..., seqlen_k) values of key positions -> (..., seqlen_q) of queries, `before` where they stand before key 0."""
    own = by_key[..., max(grid.offset, 0) :]
    return torch.nn.functional.pad(own, (max(-grid.offset, 0), 0), value=before)


_KINDS: dict[type[Mask], Callable[[Any, Grid], Verdict]] = {
    Full: _full,
    Causal: _causal,
    Window: _window,
    Global: _global,
    BlockSparse: _block_sparse,
    Documents: _documents,
    Padding: _padding,
    Dense: _dense,
}
