"""Long lines of tiles in pieces: which visits a piece has, and where it leaves its result; `sums` makes them one.

`tiles.Pieces` says how lines are cut. Forward: parts (pairs, slots, BLOCK_M * (BLOCK_D + 1)), out of all rows and then
their lse; pair = batch * num_heads + head. Backward, sums: (dk, dv (pairs, slots, BLOCK_N, BLOCK_D), slots, K/V heads),
with pairs of K/V heads. All float32.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def share_of(visits, share):
    """The visits of a piece, of those of a listed line; share 0 is all of them."""
    parts, part = gl.maximum(share & 63, 1), (share >> 6) & 63
    full, full_end = visits[1] * part // parts, visits[1] * (part + 1) // parts
    partial, partial_end = visits[5] * part // parts, visits[5] * (part + 1) // parts
    first = visits[4] + partial
    return visits[0] + full, full_end - full, first, 0, first, partial_end - partial


@gluon.jit
def store_piece(acc, lse, parts, slot, FIRST: gl.constexpr, BLOCK_M: gl.constexpr):
    """out (64, BLOCK_D) and lse (64,) of rows [FIRST, FIRST + 64) of a piece, to its slot (int64, of all pairs)."""
    BLOCK_D: gl.constexpr = acc.shape[1]
    own = parts + slot * (BLOCK_M * (BLOCK_D + 1))
    gl.store(own + BLOCK_M * BLOCK_D + FIRST + gl.arange(0, 64, lse.type.layout), lse)
    _store_rows(acc, own + FIRST * BLOCK_D, BLOCK_D)


@gluon.jit
def store_sums(dk, dv, scale, sums, place, kv_head, FIRST: gl.constexpr, COLUMN: gl.constexpr, BLOCK_N: gl.constexpr,
               BLOCK_D: gl.constexpr):  # fmt: skip
    """dk and dv (64, columns) of a piece, rows from FIRST and columns from COLUMN on, to its slot."""
    dk_parts, dv_parts, num_slots, num_kv_heads = sums
    slot = gl.cast(place[0] * num_kv_heads + kv_head, gl.int64) * num_slots + (place[2] >> 12)
    at = (slot * BLOCK_N + FIRST) * BLOCK_D + COLUMN
    _store_rows(dv, dv_parts + at, BLOCK_D)
    _store_rows(dk * scale, dk_parts + at, BLOCK_D)


@gluon.jit
def _store_rows(tile, pointer, STRIDE: gl.constexpr):
    """A float32 tile to rows STRIDE apart. Offsets have 64 bits: constants then become part of the instructions."""
    rows = gl.arange(0, tile.shape[0], gl.SliceLayout(1, tile.type.layout)).to(gl.int64) * STRIDE
    dims = gl.arange(0, tile.shape[1], gl.SliceLayout(0, tile.type.layout)).to(gl.int64)
    gl.store(pointer + (rows[:, None] + dims[None, :]), tile)
