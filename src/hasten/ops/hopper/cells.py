"""What an attention kernel computes in a cell: whether it is visible and its score; and one step of the softmax.

Softmax is exp2 of scores times `score_unit`. The layouts are those of a wgmma accumulator of 64 rows by 4 warps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def accumulator(columns):
    """Layout of a (64, columns) accumulator of one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def quarters():
    """Layout of (64, 4): of every row of an `accumulator`, what each of its four threads has summed up for itself."""
    return gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )


@gluon.constexpr_function
def folded(inner, outer):
    """Layout of (64, outer, inner) whose reshape to (64, outer * inner) is `accumulator`: cells keep their thread."""
    columns = [[0, 0, 1 << bit] for bit in range(inner.bit_length() - 1)]
    columns += [[0, 1 << bit, 0] for bit in range(outer.bit_length() - 1)]
    registers = [columns[0], [8, 0, 0], *columns[3:]]
    lanes = [columns[1], columns[2], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, outer, inner])


@gluon.jit
def band_cells(row, n0, shift, band, key_range, first_key, end_key, BLOCK_N: gl.constexpr):
    """bool (64, BLOCK_N): the cells of a band, of rows from `row` and keys from `n0` on.

    Folded in octets of keys, so that what a cell is compared to is one of four numbers of its thread, and the cell
    itself a constant: the compiler keeps 64 hoisted numbers alive otherwise, and spills.
    """
    layout: gl.constexpr = folded(8, BLOCK_N // 8)
    rows = row + shift - n0 + gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    octet = 8 * gl.arange(0, BLOCK_N // 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    inner = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    high = rows * 0 + (end_key - n0)
    if band[1] is not None:
        high = gl.minimum(high, rows + (band[1] + 1))
    keep = octet < high[:, None, None] - inner
    if (band[0] is not None) | (key_range is not None):
        low = rows * 0 + (first_key - n0)
        if band[0] is not None:
            low = gl.maximum(low, rows - band[0])
        keep = keep & (octet >= low[:, None, None] - inner)
    return gl.convert_layout(gl.reshape(keep, [64, BLOCK_N]), accumulator(BLOCK_N), assert_trivial=True)


@gluon.jit
def map_of(lists, visits, step):
    """Number of the bit map of the step-th partial tile, or of the last one; 0 for a band, which has none.

    Read a visit before its words are: two reads of global memory one after the other take longer than a product.
    """
    if lists is None:
        return 0
    else:
        entry = visits[4] + gl.minimum(step, visits[5] - 1)
        return gl.load(lists[2] + entry, mask=visits[5] > 0, other=0)


@gluon.jit
def map_words(lists, number, row, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """int32 (64, BLOCK_N / 32): bits of a map from its row `row` on, at most 8 words a thread; 0 for a band."""
    if lists is None:
        return 0
    else:
        WORDS: gl.constexpr = BLOCK_N // 32
        words_of: gl.constexpr = gl.SliceLayout(2, folded(32, WORDS))
        at = lists[3] + gl.cast(number, gl.int64) * (BLOCK_M * WORDS) + row * WORDS
        rows = gl.arange(0, 64, gl.SliceLayout(1, words_of))
        columns = gl.arange(0, WORDS, gl.SliceLayout(0, words_of))
        return gl.load(at + (rows[:, None] * WORDS + columns[None, :]))


@gluon.jit
def keys_seen(lists, number, PART: gl.constexpr, BLOCK_N: gl.constexpr):
    """int64: bit i is whether any row of a map sees its key 64 * PART + i; all ones for a band."""
    if (lists is None) or (64 * PART >= BLOCK_N):
        return gl.cast(-1, gl.int64)
    else:
        words = gl.cast(lists[4], gl.pointer_type(gl.int64))
        return gl.load(words + gl.cast(number, gl.int64) * (BLOCK_N // 64) + PART)


@gluon.jit
def listed_cells(word, is_partial, BLOCK_N: gl.constexpr):
    """bool (64, BLOCK_N): the cells of `map_words`, all of them unless `is_partial`."""
    word = gl.where(is_partial, word, -1)
    bit = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, folded(32, BLOCK_N // 32))))
    seen = ((word[:, :, None] >> bit[None, None, :]) & 1) != 0
    return gl.convert_layout(gl.reshape(seen, [64, BLOCK_N]), accumulator(BLOCK_N), assert_trivial=True)


@gluon.jit
def tanh(x):
    """tanh without a device library: exp where it is accurate, a series where 1 - t would cancel."""
    t = gl.exp2(gl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - t) / (1.0 + t)
    square = x * x
    small = 1.0 - square * (0.33333333 - square * (0.13333333 - square * (0.053968254 - square * 0.021869489)))
    return gl.where(gl.abs(x) < 0.25, x * small, gl.where(x < 0, -large, large))


@gluon.jit
def score_unit(scale, softcap):
    """What turns the result of `score` into units of log2."""
    if softcap is None:
        return scale * LOG2E
    else:
        return LOG2E


@gluon.jit
def score(raw, scale, softcap):
    """Scores: q.k itself in the plain case, where `score_unit` holds the scale."""
    if softcap is None:
        return raw
    else:
        return tanh(raw * scale / softcap) * softcap


@gluon.jit
def softmax_step(value, row_max, row_sum, unit, MASKED: gl.constexpr):
    """(p, factor of what was summed before, row_max, row_sum) after one more tile of scores.

    row_sum (64, 4) stays apart for the four threads of a row: they add up once, when the item ends.
    """
    new_max = gl.maximum(row_max, gl.max(value, 1))
    safe_max = new_max
    if MASKED:  # a row may have seen nothing yet: -inf - -inf
        safe_max = gl.where(new_max == -float("inf"), 0.0, new_max)
    p = gl.exp2(value * unit - (safe_max * unit)[:, None])
    rescale = gl.exp2((row_max - safe_max) * unit)  # exactly 1 while the maximum stands, however large it is
    own = gl.sum(gl.sum(gl.reshape(p, [64, p.shape[1] // 8, 4, 2]), 3), 1)
    factor = gl.convert_layout(rescale, gl.SliceLayout(1, quarters()))[:, None]
    row_sum = row_sum * factor + gl.convert_layout(own, quarters(), assert_trivial=True)
    return p, rescale, new_max, row_sum


@gluon.jit
def pack(p, DTYPE: gl.constexpr):
    """int32 (64, N / 2): two neighbours of p (64, N) float32 rounded to a 16-bit DTYPE, the first in the low half.

    Kept over a loop as 16-bit values, the compiler takes every pair apart and puts it together again.
    """
    COLUMNS: gl.constexpr = p.shape[1] // 2
    low, high = gl.split(gl.reshape(p, [64, COLUMNS, 2]))
    ASM: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if gl.bfloat16 == DTYPE else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(ASM, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack(words, DTYPE: gl.constexpr, BLOCK_D: gl.constexpr):
    """What `pack` packed, (64, N) as the left operand of a product of BLOCK_D columns."""
    COLUMNS: gl.constexpr = words.shape[1] * 2
    low = words.to(gl.int16).to(DTYPE, bitcast=True)
    high = (words >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    p = gl.reshape(gl.join(low, high), [64, COLUMNS])
    return gl.convert_layout(p, gl.DotOperandLayout(0, accumulator(BLOCK_D), 2))


@gluon.jit
def keys_word(n0, first_key, end_key, PART: gl.constexpr):
    """int32: bit i is whether key n0 + 32 * PART + i lies in [first_key, end_key)."""
    low = gl.minimum(gl.maximum(first_key - n0 - 32 * PART, 0), 32)
    high = gl.minimum(gl.maximum(end_key - n0 - 32 * PART, 0), 32)
    ones = gl.cast(-1, gl.uint64)
    word = (ones << gl.cast(low, gl.uint64)) & ~(ones << gl.cast(high, gl.uint64))
    return word.to(gl.uint32).to(gl.int32, bitcast=True)


@gluon.jit
def hide_values(v, word, PART: gl.constexpr, BLOCK_D: gl.constexpr):
    """Zero the rows of shared memory `v` (BLOCK_N, BLOCK_D) whose bit in `word` is 0, of the 32 from 32 * PART on.

    A key that nobody sees may hold anything, and 0 * NaN is NaN. All consumers write the same zeros. Then comes a
    fence, before a product reads them.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    ROWS: gl.constexpr = 2048 // BLOCK_D  # at a time: 16 values a thread
    for part in gl.static_range(32 // ROWS):
        rows = v.slice(32 * PART + ROWS * part, ROWS)
        bit = ROWS * part + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        value = rows.load(layout)
        rows.store(gl.where((((word >> bit) & 1) != 0)[:, None], value, gl.zeros_like(value)))
