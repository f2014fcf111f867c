"""What the Hopper backward does to rows before and after its main kernel: statistics in, dQ out.

Both are bound by memory and hold no matrix product, so they are plain Triton. Blocks of rows: every sequence begins a
new block; block i of a packed sequence b is number cu_seqlens_q[b] // BLOCK_M + b + i, so that blocks never overlap.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LENGTHS = ("num_tiles", "num_heads", "seqlen_q", "num_blocks")


@triton.jit
def _place(cu_seqlens_q, program, num_tiles, num_heads, seqlen_q, BLOCK_M: tl.constexpr):
    """(sequence, head, first row of the block in its sequence, first row of the sequence, length, first block)."""
    tile, pair = program % num_tiles, program // num_tiles
    head, number = pair % num_heads, pair // num_heads
    if cu_seqlens_q is None:
        return number, head, tile * BLOCK_M, 0, seqlen_q, number * num_tiles + tile
    else:
        start = tl.load(cu_seqlens_q + number)
        length = tl.load(cu_seqlens_q + number + 1) - start
        return 0, head, tile * BLOCK_M, start, length, start // BLOCK_M + number + tile


@triton.jit
def _rows_at(batch, row, head, strides):
    """int64 offset of one row of one head; strides: (batch, row, head)."""
    at = tl.cast(batch, tl.int64) * strides[0] + tl.cast(row, tl.int64) * strides[1]
    return at + tl.cast(head, tl.int64) * strides[2]


@triton.jit(do_not_specialize=LENGTHS)
def backward_before(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, stats_ptr, turns_ptr, counter_ptr, cu_seqlens_q,
    out_strides, dout_strides, lse_strides, dlse_strides, num_tiles, num_heads, seqlen_q, num_blocks,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Row statistics of one block of one head; 0 for how many have added to its dQ.

    stats (heads, blocks, 2, BLOCK_M): lse in units of log2, +inf for rows that see nothing or do not exist (so that
    their probabilities are 0), and delta = rowsum(dout * out) - dlse. turns (heads, blocks), counter (1,): 0.
    """
    batch, head, m0, first, length, block = _place(
        cu_seqlens_q, tl.program_id(0), num_tiles, num_heads, seqlen_q, BLOCK_M
    )
    if tl.program_id(0) == 0:
        tl.store(counter_ptr, 0)
    if m0 < length:
        lines, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
        inside = m0 + lines < length
        row = first + m0
        cells = inside[:, None] & (dims < HEAD_DIM_V)[None, :]
        out_at = _rows_at(batch, row, head, out_strides)
        out_at = out_at + lines[:, None].to(tl.int64) * out_strides[1] + dims[None, :]
        dout_at = _rows_at(batch, row, head, dout_strides)
        dout_at = dout_at + lines[:, None].to(tl.int64) * dout_strides[1] + dims[None, :]
        out = tl.load(out_ptr + out_at, mask=cells, other=0.0)
        dout = tl.load(dout_ptr + dout_at, mask=cells, other=0.0)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        lse = tl.load(lse_ptr + _rows_at(batch, row, head, lse_strides) + lines, mask=inside, other=float("inf"))
        lse = tl.where(lse == -float("inf"), float("inf"), lse)
        if dlse_ptr is not None:
            dlse_at = _rows_at(batch, row, head, dlse_strides) + lines.to(tl.int64) * dlse_strides[1]
            delta -= tl.load(dlse_ptr + dlse_at, mask=inside, other=0.0)
        at = tl.cast(head, tl.int64) * num_blocks + block
        tl.store(stats_ptr + at * (2 * BLOCK_M) + lines, lse * LOG2E)
        tl.store(stats_ptr + at * (2 * BLOCK_M) + BLOCK_M + lines, delta)
        tl.store(turns_ptr + at, 0)


@triton.jit(do_not_specialize=LENGTHS)
def backward_after(
    dq_sum_ptr, turns_ptr, dq_ptr, cu_seqlens_q, dq_strides, scale, num_tiles, num_heads, seqlen_q, num_blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dq of one piece of a block of one head: what was summed in float32, times the softmax scale.

    A piece is 64 rows by N columns in the order of `backward_tiles.fragments`: 64 rows of a block of 128, or N columns
    of a block of 64.
    """
    N: tl.constexpr = min(64, BLOCK_M * BLOCK_D // 128)
    PIECES: tl.constexpr = BLOCK_M * BLOCK_D // (64 * N)
    piece = tl.program_id(0) % PIECES
    batch, head, m0, first, length, block = _place(
        cu_seqlens_q, tl.program_id(0) // PIECES, num_tiles, num_heads, seqlen_q, BLOCK_M
    )
    row0, dim0 = m0, piece * N
    if BLOCK_M == 128:
        row0, dim0 = m0 + piece * 64, 0
    if row0 < length:
        at = tl.cast(head, tl.int64) * num_blocks + block
        cells = (at * PIECES + piece) * (64 * N) + tl.arange(0, 64 * N)
        ordered = tl.load(dq_sum_ptr + cells, mask=tl.load(turns_ptr + at) != 0, other=0.0)
        tile = tl.permute(tl.reshape(ordered, [4, N // 8, 8, 4, 2, 2]), (0, 4, 2, 1, 3, 5))
        dq = (tl.reshape(tile, [64, N]) * scale).to(dq_ptr.dtype.element_ty)
        lines, dims = tl.arange(0, 64), dim0 + tl.arange(0, N)
        dq_at = _rows_at(batch, first + row0, head, dq_strides)
        dq_at = dq_at + lines[:, None].to(tl.int64) * dq_strides[1] + dims[None, :]
        tl.store(dq_ptr + dq_at, dq, mask=(row0 + lines < length)[:, None] & (dims < HEAD_DIM)[None, :])
