"""Backward kernels: delta; dK and dV by tiles of keys; dQ by tiles of rows.

Each gradient is summed by the one program that owns it (FlashAttention-2, arXiv 2307.08691, alg. 2,
with dQ in a pass of its own instead of atomics), so that results do not depend on scheduling. Seven matrix
products instead of five is the price.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hasten.ops.portable.cells import bias_matrix, keys_seen, row_statistics, score_gradient, visible
from hasten.ops.portable.visits import (
    LENGTHS,
    key_bounds,
    key_visits,
    load_inside,
    load_tile,
    query_visits,
    sequence,
    tile_pointers,
    visited,
)


@triton.jit(do_not_specialize=LENGTHS)
def attention_delta(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, cu_seqlens_q, out_strides, dout_strides, lse_strides, dlse_strides,
    num_tiles, num_heads, seqlen_q, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, float32, laid out as lse. Strides: (batch, row, head)."""
    program = tl.program_id(0)
    head, number = (program // num_tiles) % num_heads, program // num_tiles // num_heads
    out_at, length_q = sequence(cu_seqlens_q, number, seqlen_q, out_strides)
    dout_at, _ = sequence(cu_seqlens_q, number, seqlen_q, dout_strides)
    lse_at, _ = sequence(cu_seqlens_q, number, seqlen_q, lse_strides)
    rows, dims = (program % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    in_rows, in_dims = rows < length_q, dims[None, :] < HEAD_DIM_V
    out = load_inside(tile_pointers(out_ptr, out_at, head, rows, dims, out_strides), in_rows, in_dims, False)
    dout = load_inside(tile_pointers(dout_ptr, dout_at, head, rows, dims, dout_strides), in_rows, in_dims, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        dlse_at, _ = sequence(cu_seqlens_q, number, seqlen_q, dlse_strides)
        at = dlse_ptr + dlse_at + head.to(tl.int64) * dlse_strides[2] + rows.to(tl.int64) * dlse_strides[1]
        delta -= tl.load(at, mask=in_rows, other=0.0)
    tl.store(delta_ptr + lse_at + head.to(tl.int64) * lse_strides[2] + rows, delta, mask=in_rows)


@triton.jit
def _add_key_tile(
    dk, dv, k, v, q, dout, keep, rows, keys, statistics, terms, bias, slope, seed, place,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of rows adds to dK and dV of one tile of keys; tiles are (keys, rows)."""
    raw = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    lse, delta = statistics[0][None, :], statistics[1][None, :]
    met, _, inner = score_gradient(
        raw, dp, keep, rows[None, :], keys[:, None], lse, delta, terms, bias, slope, seed, place, MASKED
    )
    dv = tl.dot(met.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dk = tl.dot(inner.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def attention_dkdv(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    bias, slopes, seed, cu_seqlens_q, cu_seqlens_k, key_range, lists, band, terms,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides, lse_strides, slope_stride,
    num_tiles, num_kv_heads, seqlen_q, seqlen_k,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of keys [n0, n0 + BLOCK_N) of one K/V head, summed over the query heads of its group.

    Arguments as in `attention_forward`; `lists` are the columns of tiles.
    """
    program = tl.program_id(0)
    tile, pair = program % num_tiles, program // num_tiles
    kv_head, number = pair % num_kv_heads, pair // num_kv_heads
    q_at, length_q = sequence(cu_seqlens_q, number, seqlen_q, q_strides)
    k_at, length_k = sequence(cu_seqlens_k, number, seqlen_k, k_strides)
    n0 = tile * BLOCK_N
    if n0 < length_k:
        v_at, _ = sequence(cu_seqlens_k, number, seqlen_k, v_strides)
        dout_at, _ = sequence(cu_seqlens_q, number, seqlen_q, dout_strides)
        lse_at, _ = sequence(cu_seqlens_q, number, seqlen_q, lse_strides)
        keys, lines = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
        dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        in_keys, in_dims, in_dims_v = keys < length_k, dims[None, :] < HEAD_DIM, dims_v[None, :] < HEAD_DIM_V
        EVEN: tl.constexpr = BLOCK_D == HEAD_DIM
        EVEN_V: tl.constexpr = BLOCK_DV == HEAD_DIM_V
        APART: tl.constexpr = (GROUP_SIZE > 1) & (k_ptr.dtype.element_ty == tl.float32)
        k = load_inside(tile_pointers(k_ptr, k_at, kv_head, keys, dims, k_strides), in_keys, in_dims, EVEN)
        v = load_inside(tile_pointers(v_ptr, v_at, kv_head, keys, dims_v, v_strides), in_keys, in_dims_v, EVEN_V)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        first_key, end_key = key_bounds(key_range, number, length_k)
        shift = length_k - length_q
        for member in range(0, GROUP_SIZE):
            # one sum over all heads of a large group would lose bits that float32 inputs still have
            before_dk, before_dv = dk, dv
            if APART:
                dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
                dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
            head = kv_head * GROUP_SIZE + member
            q_ptrs = tile_pointers(q_ptr, q_at, head, lines, dims, q_strides)
            dout_ptrs = tile_pointers(dout_ptr, dout_at, head, lines, dims_v, dout_strides)
            row_at = lse_at + head.to(tl.int64) * lse_strides[2]
            place = (length_q, end_key, shift, number * (num_kv_heads * GROUP_SIZE) + head)
            bias_at, slope = bias, slopes
            if bias is not None:
                bias_at = bias_matrix(bias, number, head, terms[4], terms[5])
            if slopes is not None:
                slope = tl.load(slopes + number * slope_stride + head)
            column = tile
            if lists is not None:
                column = number * lists[4] + head * lists[5] + tile
            n1 = tl.minimum(n0 + BLOCK_N, length_k)
            full, num_full, partial, num_left, others, num_partial = query_visits(
                lists, column, n0, n1, shift, band[0], band[1], first_key, end_key, length_q, BLOCK_M
            )
            for step in range(0, num_full):
                m0 = visited(lists, full + step) * BLOCK_M
                q = load_tile(q_ptrs + m0.to(tl.int64) * q_strides[1], in_dims, EVEN)
                dout = load_tile(dout_ptrs + m0.to(tl.int64) * dout_strides[1], in_dims_v, EVEN_V)
                rows = m0 + lines
                statistics = row_statistics(lse_ptr + row_at, delta_ptr + row_at, rows, length_q)
                dk, dv = _add_key_tile(
                    dk, dv, k, v, q, dout, None, rows, keys, statistics,
                    terms, bias_at, slope, seed, place, False, PRECISION
                )  # fmt: skip
            for step in tl.range(0, num_partial, num_stages=2):  # a third stage spills here
                entry = tl.where(step < num_left, partial + step, others + step - num_left)
                m0 = visited(lists, entry) * BLOCK_M
                rows = m0 + lines
                keep = visible(
                    lists, entry, rows[None, :], keys[:, None],
                    m0, n0, shift, band, first_key, end_key, BLOCK_M, BLOCK_N,
                ) & (rows < length_q)[None, :]  # fmt: skip
                q = load_inside(q_ptrs + m0.to(tl.int64) * q_strides[1], rows < length_q, in_dims, EVEN)
                dout = load_inside(dout_ptrs + m0.to(tl.int64) * dout_strides[1], rows < length_q, in_dims_v, EVEN_V)
                statistics = row_statistics(lse_ptr + row_at, delta_ptr + row_at, rows, length_q)
                dk, dv = _add_key_tile(
                    dk, dv, k, v, q, dout, keep, rows, keys, statistics,
                    terms, bias_at, slope, seed, place, True, PRECISION
                )  # fmt: skip
            if APART:
                dk += before_dk
                dv += before_dv
        dk_at, _ = sequence(cu_seqlens_k, number, seqlen_k, dk_strides)
        dv_at, _ = sequence(cu_seqlens_k, number, seqlen_k, dv_strides)
        dk_ptrs = tile_pointers(dk_ptr, dk_at, kv_head, keys, dims, dk_strides)
        dv_ptrs = tile_pointers(dv_ptr, dv_at, kv_head, keys, dims_v, dv_strides)
        tl.store(dk_ptrs, (dk * terms[0]).to(dk_ptr.dtype.element_ty), mask=in_keys[:, None] & in_dims)
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=in_keys[:, None] & in_dims_v)


@triton.jit
def _add_row_tile(
    dq, dslope, q, k, v, dout, keep, rows, keys, statistics, terms, bias, slope, seed, place,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dslope of one tile of rows after one more tile of keys."""
    raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    lse, delta = statistics[0][:, None], statistics[1][:, None]
    _, ds, inner = score_gradient(
        raw, dp, keep, rows[:, None], keys[None, :], lse, delta, terms, bias, slope, seed, place, MASKED
    )
    if slope is not None:
        dslope -= tl.sum(ds * tl.abs(rows[:, None] + place[2] - keys[None, :]).to(tl.float32), 1)
    dq = tl.dot(inner.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, dslope


@triton.jit(do_not_specialize=LENGTHS)
def attention_dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dslope_ptr,
    bias, slopes, seed, cu_seqlens_q, cu_seqlens_k, key_range, lists, band, terms,
    q_strides, k_strides, v_strides, dout_strides, dq_strides, lse_strides, slope_stride,
    num_tiles, num_heads, seqlen_q, seqlen_k,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of rows [m0, m0 + BLOCK_M) of one head, and each row's share of dslope (laid out as lse).

    Arguments as in `attention_forward`.
    """
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles
    head, number = (program // num_tiles) % num_heads, program // num_tiles // num_heads
    q_at, length_q = sequence(cu_seqlens_q, number, seqlen_q, q_strides)
    k_at, length_k = sequence(cu_seqlens_k, number, seqlen_k, k_strides)
    m0 = tile * BLOCK_M
    if m0 < length_q:
        v_at, _ = sequence(cu_seqlens_k, number, seqlen_k, v_strides)
        dq_at, _ = sequence(cu_seqlens_q, number, seqlen_q, dq_strides)
        dout_at, _ = sequence(cu_seqlens_q, number, seqlen_q, dout_strides)
        lse_at, _ = sequence(cu_seqlens_q, number, seqlen_q, lse_strides)
        rows, columns = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        in_rows, in_dims, in_dims_v = rows < length_q, dims[None, :] < HEAD_DIM, dims_v[None, :] < HEAD_DIM_V
        EVEN: tl.constexpr = BLOCK_D == HEAD_DIM
        EVEN_V: tl.constexpr = BLOCK_DV == HEAD_DIM_V
        q = load_inside(tile_pointers(q_ptr, q_at, head, rows, dims, q_strides), in_rows, in_dims, EVEN)
        dout_ptrs = tile_pointers(dout_ptr, dout_at, head, rows, dims_v, dout_strides)
        dout = load_inside(dout_ptrs, in_rows, in_dims_v, EVEN_V)
        k_ptrs = tile_pointers(k_ptr, k_at, head // GROUP_SIZE, columns, dims, k_strides)
        v_ptrs = tile_pointers(v_ptr, v_at, head // GROUP_SIZE, columns, dims_v, v_strides)
        row_at = lse_at + head.to(tl.int64) * lse_strides[2]
        statistics = row_statistics(lse_ptr + row_at, delta_ptr + row_at, rows, length_q)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dslope = tl.zeros([BLOCK_M], tl.float32)
        bias_at, slope = bias, slopes
        if bias is not None:
            bias_at = bias_matrix(bias, number, head, terms[4], terms[5])
        if slopes is not None:
            slope = tl.load(slopes + number * slope_stride + head)
        first_key, end_key = key_bounds(key_range, number, length_k)
        shift = length_k - length_q
        place = (length_q, end_key, shift, number * num_heads + head)
        row_of_tiles = tile
        if lists is not None:
            row_of_tiles = number * lists[4] + head * lists[5] + tile
        full, num_full, partial, num_left, others, num_partial = key_visits(
            lists,
            row_of_tiles,
            m0,
            tl.minimum(m0 + BLOCK_M, length_q),
            shift,
            band[0],
            band[1],
            first_key,
            end_key,
            BLOCK_N,
        )
        for step in range(0, num_full):
            n0 = visited(lists, full + step) * BLOCK_N
            k = load_tile(k_ptrs + n0.to(tl.int64) * k_strides[1], in_dims, EVEN)
            v = load_tile(v_ptrs + n0.to(tl.int64) * v_strides[1], in_dims_v, EVEN_V)
            keys = n0 + columns
            dq, dslope = _add_row_tile(
                dq, dslope, q, k, v, dout, None, rows, keys, statistics,
                terms, bias_at, slope, seed, place, False, PRECISION
            )  # fmt: skip
        for step in tl.range(0, num_partial, num_stages=2):
            entry = tl.where(step < num_left, partial + step, others + step - num_left)
            n0 = visited(lists, entry) * BLOCK_N
            keys = n0 + columns
            keep = visible(
                lists, entry, rows[:, None], keys[None, :], m0, n0, shift, band, first_key, end_key, BLOCK_M, BLOCK_N
            )
            seen = keys_seen(lists, keep, keys, first_key, end_key)
            k = load_inside(k_ptrs + n0.to(tl.int64) * k_strides[1], seen, in_dims, EVEN)
            v = load_inside(v_ptrs + n0.to(tl.int64) * v_strides[1], seen, in_dims_v, EVEN_V)
            dq, dslope = _add_row_tile(
                dq, dslope, q, k, v, dout, keep, rows, keys, statistics,
                terms, bias_at, slope, seed, place, True, PRECISION
            )  # fmt: skip
        dq_ptrs = tile_pointers(dq_ptr, dq_at, head, rows, dims, dq_strides)
        tl.store(dq_ptrs, (dq * terms[0]).to(dq_ptr.dtype.element_ty), mask=in_rows[:, None] & in_dims)
        if dslope_ptr is not None:
            tl.store(dslope_ptr + row_at + rows, dslope, mask=in_rows)
