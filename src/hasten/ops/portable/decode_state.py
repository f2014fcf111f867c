"""The state of some keys for some rows, and the tree that joins states: one definition for both decode kernels.

A state is (acc (..., dims), max, sum) of an online softmax in units of log2. Keys fall into units of UNIT keys, units
into groups of GROUP, groups into runs of CHUNK, by absolute position; who computes which part changes no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hasten.ops.portable.cells import LOG2E

# units in a group: a part of the definition of the answer, as UNIT and CHUNK are (decode_launch.py)
GROUP = tl.constexpr(8)


@triton.jit
def key_span(length, length_q, left, capacity, prefix, RING: tl.constexpr):
    """[first, end) of the keys that any query of a sequence sees, those of a shared prefix left out."""
    first, end = prefix, length
    if not RING:
        end = tl.minimum(length, capacity)
    if left is not None:
        first = tl.maximum(first, length - length_q - left)
    return tl.maximum(first, 0), end


@triton.jit
def empty_state(SHAPE: tl.constexpr, DIMS: tl.constexpr):
    """The state of no keys."""
    acc = tl.zeros([SHAPE, DIMS], tl.float32)
    return acc, tl.full([SHAPE], -float("inf"), tl.float32), tl.zeros([SHAPE], tl.float32)


@triton.jit
def joined(total, part):
    """The state of two disjoint sets of keys, `part` after `total`; states are (acc (..., dims), max, sum).

    The products are fused by hand: both kernels have to give the same bits.
    """
    new_max = tl.maximum(total[1], part[1])
    safe = tl.where(new_max == -float("inf"), 0.0, new_max)
    old, new = tl.exp2(total[1] - safe), tl.exp2(part[1] - safe)
    acc = tl.fma(part[0], tl.expand_dims(new, -1), total[0] * tl.expand_dims(old, -1))
    return acc, new_max, tl.fma(part[2], new, total[2] * old)


@triton.jit
def finished(state, sink):
    """(out, lse) of a state; `sink`: one more score of each row, without a value, or None."""
    acc, row_max, row_sum = state
    if sink is not None:
        top = tl.maximum(row_max, sink * LOG2E)
        safe = tl.where(top == -float("inf"), 0.0, top)
        share = tl.exp2(row_max - safe)
        acc, row_sum, row_max = (
            acc * tl.expand_dims(share, -1),
            tl.fma(row_sum, share, tl.exp2(sink * LOG2E - safe)),
            top,
        )
    is_empty = row_sum == 0.0
    row_sum = tl.where(is_empty, 1.0, row_sum)
    lse = tl.where(is_empty, -float("inf"), (row_max + tl.log2(row_sum)) / LOG2E)
    return acc / tl.expand_dims(row_sum, -1), lse
