"""Where an attention kernel goes: the rows of a sequence, the tiles to visit, and loading them.

One vocabulary for dense and packed layouts, bands and index lists, so that kernels do not branch on either.
`lists` is None for a band, or (ptr, index, bits of entries, bit maps, batch stride, head stride in rows of tiles).
"""

from __future__ import annotations

import triton
import triton.language as tl

# sizes for which a kernel compiled for "1" or "a multiple of 16" gains nothing and costs seconds
LENGTHS = ("num_tiles", "batch")


@triton.jit
def sequence(cu_seqlens, number, seqlen, strides):
    """(element offset of the first row, length) of one sequence; int64 offset: tensors pass 2^31 elements."""
    if cu_seqlens is None:
        return number.to(tl.int64) * strides[0], seqlen
    else:
        start = tl.load(cu_seqlens + number)
        return start.to(tl.int64) * strides[1], tl.load(cu_seqlens + number + 1) - start


@triton.jit
def tile_pointers(tensor, at, head, rows, dims, strides):
    """Pointers to (rows, dims) of one head of the sequence that begins at element `at`."""
    return tensor + at + tl.cast(head, tl.int64) * strides[2] + rows[:, None].to(tl.int64) * strides[1] + dims[None, :]


@triton.jit
def load_tile(pointers, in_dims, EVEN: tl.constexpr):
    """A tile that lies wholly inside the tensor but for the padding of head_dim to a power of two."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=in_dims, other=0.0)


@triton.jit
def load_inside(pointers, inside, in_dims, EVEN: tl.constexpr):
    """The rows of a tile that are `inside` (rows,), zero for the others."""
    if EVEN:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & in_dims, other=0.0)


@triton.jit
def key_bounds(key_range, number, seqlen_k):
    """[first, end) of the keys that are not padding."""
    if key_range is None:
        return 0, seqlen_k
    else:
        return tl.load(key_range + 2 * number), tl.load(key_range + 2 * number + 1)


@triton.jit
def _runs(first, full_first, full_end, end):
    """The visits of a band as `key_visits` returns them, from the ends of its three runs of tiles."""
    full_first = tl.minimum(full_first, end)
    full_end = tl.maximum(tl.minimum(full_end, end), full_first)
    num_left = full_first - first
    return full_first, full_end - full_first, first, num_left, full_end, num_left + end - full_end


@triton.jit
def _listed(lists, number):
    """The visits of a row or column of tiles in a list."""
    at = lists[0] + number.to(tl.int64) * 3
    begin, middle, end = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    return begin, middle - begin, middle, 0, middle, end - middle


@triton.jit
def key_visits(lists, number, m0, m1, shift, left, right, first_key, end_key, BLOCK_N: tl.constexpr):
    """Tiles of keys that rows [m0, m1) see: (first full, how many, first of the left partial, how many of
    them, first of the other partial, how many partial in all). Entries of `lists`, or tiles of the band."""
    if lists is not None:
        return _listed(lists, number)
    else:
        low, high, full_low, full_high = first_key, end_key, first_key, end_key
        if left is not None:
            low = tl.maximum(first_key, m0 + shift - left)
            full_low = tl.maximum(first_key, m1 - 1 + shift - left)
        if right is not None:
            high = tl.minimum(end_key, m1 + shift + right)
            full_high = tl.minimum(end_key, m0 + shift + right + 1)
        first = low // BLOCK_N
        end = tl.where(high > low, tl.cdiv(tl.maximum(high, 0), BLOCK_N), first)
        return _runs(first, tl.cdiv(full_low, BLOCK_N), tl.maximum(full_high, 0) // BLOCK_N, end)


@triton.jit
def query_visits(lists, number, n0, n1, shift, left, right, first_key, end_key, seqlen_q, BLOCK_M: tl.constexpr):
    """Tiles of rows that see keys [n0, n1); as `key_visits`."""
    if lists is not None:
        return _listed(lists, number)
    else:
        low, high, full_low, full_high = 0, seqlen_q, 0, seqlen_q
        if right is not None:
            low = tl.maximum(0, n0 - shift - right)
            full_low = tl.maximum(0, n1 - 1 - shift - right)
        if left is not None:
            high = tl.minimum(seqlen_q, n1 - shift + left)
            full_high = tl.minimum(seqlen_q, n0 - shift + left + 1)
        seen = (high > low) & (n1 > first_key) & (n0 < end_key)
        first = low // BLOCK_M
        end = tl.where(seen, tl.cdiv(tl.maximum(high, 0), BLOCK_M), first)
        whole = (n0 >= first_key) & (n1 <= end_key)  # a tile of keys with padding in it is full for no row
        full_end = tl.where(whole, tl.maximum(full_high, 0) // BLOCK_M, 0)
        return _runs(first, tl.cdiv(full_low, BLOCK_M), full_end, end)


@triton.jit
def visited(lists, entry):
    """The tile that an entry stands for."""
    if lists is None:
        return entry
    else:
        return tl.load(lists[1] + entry)
