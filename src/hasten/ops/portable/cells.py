"""The four questions of an attention kernel, one helper each, shared by forward and backward.

Which rows (dense or packed), which tiles (closed-form range of a band, or an index list), which cells
(compares of a band, or the bit map of a listed tile), and what a score is (scale, softcap, bias, ALiBi).
Scores are in units of log2 so that the softmax is exp2; `UNIT` scores still have to be multiplied by it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence(cu_seqlens, number, seqlen, batch_stride, row_stride):
    """(element offset of the first row, length) of one sequence; int64 offset: tensors pass 2^31 elements."""
    if cu_seqlens is None:
        return number.to(tl.int64) * batch_stride, seqlen
    else:
        start = tl.load(cu_seqlens + number)
        return start.to(tl.int64) * row_stride, tl.load(cu_seqlens + number + 1) - start


@triton.jit
def key_bounds(key_range, number, seqlen_k):
    """[first, end) of the keys that are not padding."""
    if key_range is None:
        return 0, seqlen_k
    else:
        return tl.load(key_range + 2 * number), tl.load(key_range + 2 * number + 1)


@triton.jit
def key_tiles(m0, m1, shift, left, right, first_key, end_key, BLOCK_N: tl.constexpr):
    """Tiles of keys that rows [m0, m1) see through a band: (first, full_first, full_end, end)."""
    low, high, full_low, full_high = first_key, end_key, first_key, end_key
    if left is not None:
        low = tl.maximum(first_key, m0 + shift - left)
        full_low = tl.maximum(first_key, m1 - 1 + shift - left)
    if right is not None:
        high = tl.minimum(end_key, m1 + shift + right)
        full_high = tl.minimum(end_key, m0 + shift + right + 1)
    first = low // BLOCK_N
    end = tl.maximum(first, tl.cdiv(tl.maximum(high, 0), BLOCK_N))
    end = tl.where(high > low, end, first)
    full_first = tl.minimum(tl.cdiv(full_low, BLOCK_N), end)
    full_end = tl.maximum(tl.minimum(tl.maximum(full_high, 0) // BLOCK_N, end), full_first)
    return first, full_first, full_end, end


@triton.jit
def query_tiles(n0, n1, shift, left, right, first_key, end_key, seqlen_q, BLOCK_M: tl.constexpr):
    """Tiles of rows that see keys [n0, n1) through a band: (first, full_first, full_end, end)."""
    low, high = 0, seqlen_q
    full_low, full_high = 0, seqlen_q
    if right is not None:
        low = tl.maximum(0, n0 - shift - right)
        full_low = tl.maximum(0, n1 - 1 - shift - right)
    if left is not None:
        high = tl.minimum(seqlen_q, n1 - shift + left)
        full_high = tl.minimum(seqlen_q, n0 - shift + left + 1)
    seen = (high > low) & (n1 > first_key) & (n0 < end_key)
    whole = (n0 >= first_key) & (n1 <= end_key)
    first = low // BLOCK_M
    end = tl.where(seen, tl.cdiv(tl.maximum(high, 0), BLOCK_M), first)
    full_first = tl.minimum(tl.cdiv(full_low, BLOCK_M), end)
    full_end = tl.maximum(tl.minimum(tl.maximum(full_high, 0) // BLOCK_M, end), full_first)
    return first, full_first, tl.where(whole, full_end, full_first), end


@triton.jit
def listed(pointer, number):
    """(begin of the full tiles, begin of the partial ones, end) of a row or column of tiles."""
    at = pointer + number.to(tl.int64) * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def band_cells(rows, keys, shift, left, right, first_key, end_key):
    """bool tile: the cells of a band; rows and keys broadcast against each other."""
    keep = (keys >= first_key) & (keys < end_key)
    if left is not None:
        keep = keep & (keys >= rows + (shift - left))
    if right is not None:
        keep = keep & (keys <= rows + (shift + right))
    return keep


@triton.jit
def bit_cells(bits, which, rows, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """bool tile: the cells of a listed partial tile; rows and keys count from the corner of the tile."""
    words: tl.constexpr = BLOCK_N // 32
    word = tl.load(bits + which.to(tl.int64) * (BLOCK_M * words) + rows * words + keys // 32)
    return ((word >> (keys % 32)) & 1) != 0


@triton.jit
def tanh(x):
    """tanh without a device library: exp where it is accurate, a series where 1 - t would cancel."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - t) / (1.0 + t)
    square = x * x
    small = 1.0 - square * (0.33333333 - square * (0.13333333 - square * (0.053968254 - square * 0.021869489)))
    return tl.where(tl.abs(x) < 0.25, x * small, tl.where(x < 0, -large, large))


@triton.jit
def score(raw, rows, keys, row_limit, shift, scale, softcap, bias, bias_strides, end_key, slope):
    """(scores to be multiplied by the second result, that unit, tanh(...) for the backward or raw).

    `rows`, `keys` broadcast to the tile. The plain case leaves the multiplication to the caller, who
    fuses it with the subtraction of the row maximum.
    """
    if (softcap is None) & (bias is None) & (slope is None):
        return raw, scale * LOG2E, raw
    else:
        value = raw * scale
        capped = value
        if softcap is not None:
            capped = tanh(value / softcap)
            value = capped * softcap
        if bias is not None:
            at = bias + rows.to(tl.int64) * bias_strides[2] + keys.to(tl.int64) * bias_strides[3]
            value += tl.load(at, mask=(rows < row_limit) & (keys < end_key), other=0.0).to(tl.float32)
        if slope is not None:
            value -= slope * tl.abs(rows + shift - keys).to(tl.float32)
        return value * LOG2E, 1.0, capped


@triton.jit
def survivors(seed, sequence_head, rows, keys, threshold):
    """bool tile: cells that dropout keeps (ops/dropout.py states the same in PyTorch)."""
    word, _, _, _ = tl.philox(seed, keys + 0 * rows, rows + 0 * keys, sequence_head + 0 * (rows + keys), 0 * (rows + keys))
    return word.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32)


@triton.jit
def bias_matrix(bias, number, head, bias_strides):
    """Pointer to the bias matrix of one head."""
    return bias + tl.cast(number, tl.int64) * bias_strides[0] + tl.cast(head, tl.int64) * bias_strides[1]


@triton.jit
def load_tile(pointers, in_dims, EVEN: tl.constexpr):
    """A tile that lies wholly inside the tensor but for the padding of head_dim to a power of two."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=in_dims, other=0.0)
