"""Where an attention kernel goes: the rows of a sequence, the keys that are no padding, the tiles to visit.

The same answers as everywhere, in Gluon: one vocabulary for dense and packed layouts, bands and index lists.
`lists` is None for a band, or begins with (ptr, index, bits of entries, bit maps) of `tiles.TileLists`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def sequence(cu_seqlens, number, seqlen):
    """(batch coordinate, first row, length) of one sequence: packed sequences lie in one batch entry."""
    if cu_seqlens is None:
        return number, 0, seqlen
    else:
        start = gl.load(cu_seqlens + number)
        return 0, start, gl.load(cu_seqlens + number + 1) - start


@gluon.jit
def key_bounds(key_range, number, seqlen_k):
    """[first, end) of the keys that are not padding."""
    if key_range is None:
        return 0, seqlen_k
    else:
        return gl.load(key_range + 2 * number), gl.load(key_range + 2 * number + 1)


@gluon.jit
def _runs(first, full_first, full_end, end):
    """The visits of a band as `key_visits` returns them, from the ends of its three runs of tiles."""
    full_first = gl.minimum(full_first, end)
    full_end = gl.maximum(gl.minimum(full_end, end), full_first)
    num_left = full_first - first
    return full_first, full_end - full_first, first, num_left, full_end, num_left + end - full_end


@gluon.jit
def _listed(lists, number):
    """The visits of a row or column of tiles in a list."""
    at = lists[0] + gl.cast(number, gl.int64) * 3
    begin, middle, end = gl.load(at), gl.load(at + 1), gl.load(at + 2)
    return begin, middle - begin, middle, 0, middle, end - middle


@gluon.jit
def key_visits(lists, number, m0, m1, shift, left, right, first_key, end_key, BLOCK_N: gl.constexpr):
    """Tiles of keys that rows [m0, m1) see: (first full, how many, first of the left partial, how many of
    them, first of the other partial, how many partial in all). Entries of `lists`, or tiles of the band."""
    if lists is not None:
        return _listed(lists, number)
    else:
        low, high, full_low, full_high = first_key, end_key, first_key, end_key
        if left is not None:
            low = gl.maximum(first_key, m0 + shift - left)
            full_low = gl.maximum(first_key, m1 - 1 + shift - left)
        if right is not None:
            high = gl.minimum(end_key, m1 + shift + right)
            full_high = gl.minimum(end_key, m0 + shift + right + 1)
        first = low // BLOCK_N
        end = gl.where(high > low, gl.cdiv(gl.maximum(high, 0), BLOCK_N), first)
        return _runs(first, gl.cdiv(full_low, BLOCK_N), gl.maximum(full_high, 0) // BLOCK_N, end)


@gluon.jit
def query_visits(lists, number, n0, n1, shift, left, right, first_key, end_key, seqlen_q, BLOCK_M: gl.constexpr):
    """Tiles of rows that see keys [n0, n1); as `key_visits`."""
    if lists is not None:
        return _listed(lists, number)
    else:
        low, high, full_low, full_high = 0, seqlen_q, 0, seqlen_q
        if right is not None:
            low = gl.maximum(0, n0 - shift - right)
            full_low = gl.maximum(0, n1 - 1 - shift - right)
        if left is not None:
            high = gl.minimum(seqlen_q, n1 - shift + left)
            full_high = gl.minimum(seqlen_q, n0 - shift + left + 1)
        seen = (high > low) & (n1 > first_key) & (n0 < end_key)
        first = low // BLOCK_M
        end = gl.where(seen, gl.cdiv(gl.maximum(high, 0), BLOCK_M), first)
        whole = (n0 >= first_key) & (n1 <= end_key)  # a tile of keys with padding in it is full for no row
        full_end = gl.where(whole, gl.maximum(full_high, 0) // BLOCK_M, 0)
        return _runs(first, gl.cdiv(full_low, BLOCK_M), full_end, end)


@gluon.jit
def partial_entry(visits, step):
    """The step-th partial entry of `visits`: first those on the left, then the others."""
    return gl.where(step < visits[3], visits[2] + step, visits[4] + step - visits[3])


@gluon.jit
def visited(lists, entry):
    """The tile that an entry stands for."""
    if lists is None:
        return entry
    else:
        return gl.load(lists[1] + entry)
