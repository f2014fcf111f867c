"""What the pieces of a long line of tiles come to: the results that each has left become one.

Bound by memory and without a matrix product, so plain Triton. `tiles.Pieces` says how lines are cut.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("num_heads", "seqlen_q", "num_slots"))
def merge_pieces(
    cut_ptr, parts_ptr, out_ptr, lse_ptr, num_heads, seqlen_q, num_slots,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out (batch, seqlen_q, num_heads, HEAD_DIM_V) and lse (batch, num_heads, seqlen_q) of ROWS rows of a line.

    parts float32 (pairs, num_slots, BLOCK_M * (BLOCK_D + 1)): out of a piece and then its lse; pair = batch * num_heads
    + head. cut: `tiles.Pieces`. Grid: (cut lines * BLOCK_M / ROWS, pairs).
    """
    chunk, pair = tl.program_id(0) % (BLOCK_M // ROWS), tl.program_id(1)
    own = cut_ptr + tl.program_id(0) // (BLOCK_M // ROWS) * 3
    tile, slot, parts = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    lines, dims = chunk * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    own = parts_ptr + (tl.cast(pair, tl.int64) * num_slots + slot) * (BLOCK_M * (BLOCK_D + 1))
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = total - float("inf")
    for _ in range(parts):
        lse = tl.load(own + BLOCK_M * BLOCK_D + lines)
        new_top = tl.maximum(top, lse)
        safe = tl.where(new_top == -float("inf"), 0.0, new_top)
        before, weight = tl.exp(top - safe), tl.exp(lse - safe)
        acc = acc * before[:, None] + tl.load(own + lines[:, None] * BLOCK_D + dims[None, :]) * weight[:, None]
        total, top = total * before + weight, new_top
        own += BLOCK_M * (BLOCK_D + 1)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    row = tile * BLOCK_M + lines
    out_at = (pair // num_heads).to(tl.int64) * seqlen_q + row
    out_at = (out_at * num_heads + pair % num_heads)[:, None] * HEAD_DIM_V + dims[None, :]
    cells = (row < seqlen_q)[:, None] & (dims < HEAD_DIM_V)[None, :]
    tl.store(out_ptr + out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=cells)
    lse_at = tl.cast(pair, tl.int64) * seqlen_q + row
    tl.store(lse_ptr + lse_at, tl.where(empty, -float("inf"), top + tl.log(total)), mask=row < seqlen_q)


@triton.jit(do_not_specialize=("num_kv_heads", "seqlen_k", "num_slots"))
def add_pieces(
    cut_ptr, dk_parts_ptr, dv_parts_ptr, dk_ptr, dv_ptr, num_kv_heads, seqlen_k, num_slots,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dk and dv (batch, seqlen_k, num_kv_heads, dims) of ROWS keys of a column of tiles, in the order of its pieces.

    Parts (pairs, num_slots, BLOCK_N, BLOCK_D) float32; pair = batch * num_kv_heads + K/V head. Grid as above.
    """
    chunk, pair = tl.program_id(0) % (BLOCK_N // ROWS), tl.program_id(1)
    own = cut_ptr + tl.program_id(0) // (BLOCK_N // ROWS) * 3
    tile, slot, parts = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    lines, dims = chunk * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    at = ((tl.cast(pair, tl.int64) * num_slots + slot) * BLOCK_N + lines)[:, None] * BLOCK_D + dims[None, :]
    dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dv = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for _ in range(parts):
        dk += tl.load(dk_parts_ptr + at)
        dv += tl.load(dv_parts_ptr + at)
        at += BLOCK_N * BLOCK_D
    key = tile * BLOCK_N + lines
    line = ((pair // num_kv_heads).to(tl.int64) * seqlen_k + key) * num_kv_heads + pair % num_kv_heads
    inside = (key < seqlen_k)[:, None]
    dk_at, dv_at = line[:, None] * HEAD_DIM + dims[None, :], line[:, None] * HEAD_DIM_V + dims[None, :]
    tl.store(dk_ptr + dk_at, dk.to(dk_ptr.dtype.element_ty), mask=inside & (dims < HEAD_DIM)[None, :])
    tl.store(dv_ptr + dv_at, dv.to(dv_ptr.dtype.element_ty), mask=inside & (dims < HEAD_DIM_V)[None, :])
