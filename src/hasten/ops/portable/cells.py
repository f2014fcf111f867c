"""What an attention kernel computes in a cell: whether it is visible, its score, whether dropout keeps it.

Softmax is exp2 of scores times `score_unit`. Rows and keys come as tensors that broadcast to the
tile, so that the same helpers serve (rows, keys) tiles and (keys, rows) tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def visible(
    lists, entry, rows, keys, m0, n0, shift, band, first_key, end_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """bool tile: cells of a partial tile, by the compares of a band or the bit map of a listed tile."""
    if lists is None:
        keep = (keys >= first_key) & (keys < end_key)
        if band[0] is not None:
            keep = keep & (keys >= rows + (shift - band[0]))
        if band[1] is not None:
            keep = keep & (keys <= rows + (shift + band[1]))
        return keep
    else:
        words: tl.constexpr = BLOCK_N // 32
        bits = lists[3] + tl.load(lists[2] + entry).to(tl.int64) * (BLOCK_M * words)
        word = tl.load(bits + (rows - m0) * words + (keys - n0) // 32)
        return ((word >> ((keys - n0) % 32)) & 1) != 0


@triton.jit
def keys_seen(lists, keep, keys, first_key, end_key):
    """bool (keys,): those to read in a (rows, keys) tile; the others may hold anything, and 0 * NaN is NaN."""
    if lists is None:
        return (keys >= first_key) & (keys < end_key)
    else:
        return tl.max(keep.to(tl.int32), 0) > 0


@triton.jit
def tanh(x):
    """tanh without a device library: exp where it is accurate, a series where 1 - t would cancel."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - t) / (1.0 + t)
    square = x * x
    small = 1.0 - square * (0.33333333 - square * (0.13333333 - square * (0.053968254 - square * 0.021869489)))
    return tl.where(tl.abs(x) < 0.25, x * small, tl.where(x < 0, -large, large))


@triton.jit
def bias_matrix(bias, number, head, batch_stride, head_stride):
    """Pointer to the bias matrix of one head."""
    return bias + tl.cast(number, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def score_unit(terms, bias, slope):
    """What turns the first result of `score` into units of log2."""
    if (terms[1] is None) & (bias is None) & (slope is None):
        return terms[0] * LOG2E
    else:
        return LOG2E


@triton.jit
def score(raw, rows, keys, terms, bias, slope, place):
    """(scores, tanh(...) of a soft cap): q.k itself in the plain case, where `score_unit` holds the scale.

    terms: (scale, softcap, dropout threshold, 1 / (1 - p), four strides of the bias);
    place: (length_q, end_key, shift, sequence * heads + head).
    """
    scale, softcap, _threshold, _keep_scale, _batch, _head, bias_row, bias_key = terms
    if (softcap is None) & (bias is None) & (slope is None):
        return raw, raw
    else:
        value = raw * scale
        capped = value
        if softcap is not None:
            capped = tanh(value / softcap)
            value = capped * softcap
        if bias is not None:
            at = bias + rows.to(tl.int64) * bias_row + keys.to(tl.int64) * bias_key
            value += tl.load(at, mask=(rows < place[0]) & (keys < place[1]), other=0.0).to(tl.float32)
        if slope is not None:
            value -= slope * tl.abs(rows + place[2] - keys).to(tl.float32)
        return value, capped


@triton.jit
def exp_difference(value, reference, unit, bias):
    """exp of the difference of scores. With a bias the difference comes first: a bias may be the lowest finite
    number, which no unit can be multiplied to; without one the multiplication fuses with the subtraction."""
    if bias is None:
        return tl.exp2(value * unit - reference * unit)
    else:
        return tl.exp2((value - reference) * unit)


@triton.jit
def survivors(seed, sequence_head, rows, keys, threshold):
    """bool tile: cells that dropout keeps (ops/dropout.py states the same in PyTorch)."""
    none = 0 * (rows + keys)
    word, _, _, _ = tl.philox(tl.load(seed), keys + none, rows + none, sequence_head + none, none)
    return word.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32)


@triton.jit
def row_statistics(lse_ptr, delta_ptr, rows, length_q):
    """(lse with +inf where there is nothing to see, delta) of rows."""
    lse = tl.load(lse_ptr + rows, mask=rows < length_q, other=float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse), tl.load(delta_ptr + rows, mask=rows < length_q, other=0.0)


@triton.jit
def score_gradient(raw, dp, keep, rows, keys, lse, delta, terms, bias, slope, seed, place, MASKED: tl.constexpr):
    """(probabilities as they met V, gradient of bias and slope, gradient of q.k * scale) of one tile.

    `lse` is +inf for rows that see nothing. FlashAttention, arXiv 2205.14135, algorithm 4.
    """
    value, capped = score(raw, rows, keys, terms, bias, slope, place)
    if bias is None:
        p = tl.exp2(value * score_unit(terms, bias, slope) - lse * LOG2E)
    else:
        p = tl.exp2((value - lse) * LOG2E)
    if MASKED:
        p = tl.where(keep, p, 0.0)
    met = p
    if seed is not None:
        kept = survivors(seed, place[3], rows, keys, terms[2])
        met = tl.where(kept, p * terms[3], 0.0)
        dp = tl.where(kept, dp * terms[3], 0.0)
    ds = p * (dp - delta)
    if MASKED:  # dp of a hidden cell may be anything, and 0 * NaN is NaN
        ds = tl.where(keep, ds, 0.0)
    inner = ds
    if terms[1] is not None:
        inner = ds * (1.0 - capped * capped)
    return met, ds, inner
