"""Backward kernels: dK and dV by tiles of keys, dQ and the bias gradient by tiles of rows.

Each gradient is summed by the one program that owns it (FlashAttention-2, arXiv 2307.08691, alg. 2,
with dQ in a pass of its own instead of atomics), so that results do not depend on scheduling. Seven matrix
products instead of five is the price.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hasten.ops.portable.cells import (
    LOG2E,
    band_cells,
    bias_matrix,
    bit_cells,
    key_bounds,
    key_tiles,
    listed,
    load_tile,
    query_tiles,
    score,
    sequence,
    survivors,
)


@triton.jit
def attention_delta(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, cu_seqlens_q, out_strides, dout_strides, lse_strides, dlse_strides,
    num_tiles, num_heads, seqlen_q,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, float32, laid out as lse (dlse: (batch, head, row) strides)."""
    program = tl.program_id(0)
    tile, head, number = program % num_tiles, (program // num_tiles) % num_heads, program // num_tiles // num_heads
    out_at, length_q = sequence(cu_seqlens_q, number, seqlen_q, out_strides[0], out_strides[1])
    dout_at, _ = sequence(cu_seqlens_q, number, seqlen_q, dout_strides[0], dout_strides[1])
    lse_at, _ = sequence(cu_seqlens_q, number, seqlen_q, lse_strides[0], 1)
    rows, dims = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    in_rows = rows < length_q
    inside = in_rows[:, None] & (dims[None, :] < HEAD_DIM_V)
    wide, head = rows[:, None].to(tl.int64), head.to(tl.int64)
    out = tl.load(out_ptr + out_at + head * out_strides[2] + wide * out_strides[1] + dims[None, :], mask=inside, other=0.0)
    at = dout_ptr + dout_at + head * dout_strides[2] + wide * dout_strides[1] + dims[None, :].to(tl.int64) * dout_strides[3]
    delta = tl.sum(out.to(tl.float32) * tl.load(at, mask=inside, other=0.0).to(tl.float32), 1)
    if dlse_ptr is not None:
        dlse_at, _ = sequence(cu_seqlens_q, number, seqlen_q, dlse_strides[0], dlse_strides[2])
        delta -= tl.load(dlse_ptr + dlse_at + head * dlse_strides[1] + rows.to(tl.int64) * dlse_strides[2], mask=in_rows, other=0.0)
    tl.store(delta_ptr + lse_at + head * lse_strides[1] + rows, delta, mask=in_rows)


@triton.jit
def score_gradient(raw, dp, keep, rows, keys, lse, delta, terms, bias, slope, seed, place, MASKED: tl.constexpr):
    """(probabilities as they met V, gradient of bias and slope, gradient of q.k * scale) of one tile.

    All tiles in one orientation, either; `lse` in log2, +inf for rows that see nothing.
    """
    scale, softcap, bias_strides, threshold, keep_scale = terms
    row_limit, end_key, shift, sequence_head = place
    value, unit, capped = score(raw, rows, keys, row_limit, shift, scale, softcap, bias, bias_strides, end_key, slope)
    p = tl.exp2(value * unit - lse)
    if MASKED:
        p = tl.where(keep, p, 0.0)
    met = p
    if seed is not None:
        kept = survivors(tl.load(seed), sequence_head, rows, keys, threshold)
        met = tl.where(kept, p * keep_scale, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    if MASKED:  # dp of a hidden cell may be anything, and 0 * NaN is NaN
        ds = tl.where(keep, ds, 0.0)
    inner = ds
    if softcap is not None:
        inner = ds * (1.0 - capped * capped)
    return met, ds, inner


@triton.jit
def row_statistics(lse_ptr, delta_ptr, rows, length_q):
    """(lse in log2 with +inf where there is nothing to see, delta) of rows."""
    lse = tl.load(lse_ptr + rows, mask=rows < length_q, other=float("inf")) * LOG2E
    return tl.where(lse == -float("inf"), float("inf"), lse), tl.load(delta_ptr + rows, mask=rows < length_q, other=0.0)


@triton.jit
def _key_tile(dk, dv, k, v, q, dout, keep, rows, keys, lse, delta, terms, bias, slope, seed, place, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """What one tile of rows adds to dK and dV of one tile of keys; tiles are (keys, rows)."""
    raw = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    met, _, inner = score_gradient(raw, dp, keep, rows[None, :], keys[:, None], lse[None, :], delta[None, :], terms, bias, slope, seed, place, MASKED)
    dv = tl.dot(met.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dk = tl.dot(inner.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def attention_dkdv(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    bias, slopes, seed, cu_seqlens_q, cu_seqlens_k, key_range, lists, band, terms,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides, lse_strides, slope_stride,
    num_tiles, num_kv_heads, seqlen_q, seqlen_k,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of keys [n0, n0 + BLOCK_N) of one K/V head, summed over the query heads of its group.

    Arguments as in `attention_forward`; `lists` are the columns of tiles.
    """
    program = tl.program_id(0)
    tile, kv_head, number = program % num_tiles, (program // num_tiles) % num_kv_heads, program // num_tiles // num_kv_heads
    q_at, length_q = sequence(cu_seqlens_q, number, seqlen_q, q_strides[0], q_strides[1])
    k_at, length_k = sequence(cu_seqlens_k, number, seqlen_k, k_strides[0], k_strides[1])
    v_at, _ = sequence(cu_seqlens_k, number, seqlen_k, v_strides[0], v_strides[1])
    dk_at, _ = sequence(cu_seqlens_k, number, seqlen_k, dk_strides[0], dk_strides[1])
    dv_at, _ = sequence(cu_seqlens_k, number, seqlen_k, dv_strides[0], dv_strides[1])
    dout_at, _ = sequence(cu_seqlens_q, number, seqlen_q, dout_strides[0], dout_strides[1])
    lse_at, _ = sequence(cu_seqlens_q, number, seqlen_q, lse_strides[0], 1)
    n0 = tile * BLOCK_N
    if n0 < length_k:
        keys, lines = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
        dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        in_dims, in_dims_v = dims[None, :] < HEAD_DIM, dims_v[None, :] < HEAD_DIM_V
        in_keys = keys[:, None] < length_k
        wide_keys, wide_lines, kv_wide = keys[:, None].to(tl.int64), lines[:, None].to(tl.int64), kv_head.to(tl.int64)
        k = tl.load(k_ptr + k_at + kv_wide * k_strides[2] + wide_keys * k_strides[1] + dims[None, :], mask=in_keys & in_dims, other=0.0)
        v = tl.load(v_ptr + v_at + kv_wide * v_strides[2] + wide_keys * v_strides[1] + dims_v[None, :], mask=in_keys & in_dims_v, other=0.0)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        first_key, end_key = key_bounds(key_range, number, length_k)
        shift = length_k - length_q
        EVEN: tl.constexpr = BLOCK_D == HEAD_DIM
        EVEN_V: tl.constexpr = BLOCK_DV == HEAD_DIM_V
        for member in range(0, GROUP_SIZE):
            head = kv_head * GROUP_SIZE + member
            q_ptrs = q_ptr + q_at + head.to(tl.int64) * q_strides[2] + wide_lines * q_strides[1] + dims[None, :]
            dout_ptrs = dout_ptr + dout_at + head.to(tl.int64) * dout_strides[2] + wide_lines * dout_strides[1] + dims_v[None, :]
            row_at = lse_at + head.to(tl.int64) * lse_strides[1]
            bias_at, slope = bias, slopes
            if bias is not None:
                bias_at = bias_matrix(bias, number, head, terms[2])
            if slopes is not None:
                slope = tl.load(slopes + number * slope_stride + head)
            place = (length_q, end_key, shift, number * (num_kv_heads * GROUP_SIZE) + head)
            if lists is None:
                first, full_first, full_end, end = query_tiles(n0, tl.minimum(n0 + BLOCK_N, length_k), shift, band[0], band[1], first_key, end_key, length_q, BLOCK_M)
                num_full, num_left, num_partial = full_end - full_first, full_first - first, full_first - first + end - full_end
            else:
                full_first, middle, end = listed(lists[0], number * lists[4] + head * lists[5] + tile)
                num_full, num_partial = middle - full_first, end - middle
            for step in range(0, num_full):
                m0 = (full_first + step) * BLOCK_M if lists is None else tl.load(lists[1] + full_first + step) * BLOCK_M
                q = load_tile(q_ptrs + m0.to(tl.int64) * q_strides[1], in_dims, EVEN)
                dout = load_tile(dout_ptrs + m0.to(tl.int64) * dout_strides[1], in_dims_v, EVEN_V)
                lse, delta = row_statistics(lse_ptr + row_at, delta_ptr + row_at, m0 + lines, length_q)
                dk, dv = _key_tile(dk, dv, k, v, q, dout, None, m0 + lines, keys, lse, delta, terms, bias_at, slope, seed, place, False, PRECISION)  # fmt: skip
            for step in range(0, num_partial):
                if lists is None:
                    m0 = tl.where(step < num_left, first + step, full_end + step - num_left) * BLOCK_M
                    keep = band_cells((m0 + lines)[None, :], keys[:, None], shift, band[0], band[1], first_key, end_key) & ((m0 + lines) < length_q)[None, :]
                else:
                    m0 = tl.load(lists[1] + middle + step) * BLOCK_M
                    keep = bit_cells(lists[3], tl.load(lists[2] + middle + step), lines[None, :], (keys - n0)[:, None], BLOCK_M, BLOCK_N)
                in_rows = (m0 + lines)[:, None] < length_q
                q = tl.load(q_ptrs + m0.to(tl.int64) * q_strides[1], mask=in_rows & in_dims, other=0.0)
                dout = tl.load(dout_ptrs + m0.to(tl.int64) * dout_strides[1], mask=in_rows & in_dims_v, other=0.0)
                lse, delta = row_statistics(lse_ptr + row_at, delta_ptr + row_at, m0 + lines, length_q)
                dk, dv = _key_tile(dk, dv, k, v, q, dout, keep, m0 + lines, keys, lse, delta, terms, bias_at, slope, seed, place, True, PRECISION)  # fmt: skip
        dk_ptrs = dk_ptr + dk_at + kv_wide * dk_strides[2] + wide_keys * dk_strides[1] + dims[None, :]
        dv_ptrs = dv_ptr + dv_at + kv_wide * dv_strides[2] + wide_keys * dv_strides[1] + dims_v[None, :]
        tl.store(dk_ptrs, (dk * terms[0]).to(dk_ptr.dtype.element_ty), mask=in_keys & in_dims)
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=in_keys & in_dims_v)


@triton.jit
def _row_tile(dq, dslope, q, k, v, dout, keep, rows, keys, lse, delta, terms, bias, slope, seed, place, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """(dq, dslope, gradient of the bias) after one tile of keys for one tile of rows."""
    raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    _, ds, inner = score_gradient(raw, dp, keep, rows[:, None], keys[None, :], lse[:, None], delta[:, None], terms, bias, slope, seed, place, MASKED)
    if slope is not None:
        dslope -= tl.sum(ds * tl.abs(rows[:, None] + place[2] - keys[None, :]).to(tl.float32), 1)
    dq = tl.dot(inner.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, dslope, ds


@triton.jit
def attention_dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dslope_ptr,
    bias, slopes, seed, cu_seqlens_q, cu_seqlens_k, key_range, lists, band, terms,
    q_strides, k_strides, v_strides, dout_strides, dq_strides, lse_strides, slope_stride,
    num_tiles, num_heads, seqlen_q, seqlen_k,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of rows [m0, m0 + BLOCK_M) of one head, and each row's share of dslope (laid out as lse).

    Arguments as in `attention_forward`.
    """
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles
    head, number = (program // num_tiles) % num_heads, program // num_tiles // num_heads
    q_at, length_q = sequence(cu_seqlens_q, number, seqlen_q, q_strides[0], q_strides[1])
    k_at, length_k = sequence(cu_seqlens_k, number, seqlen_k, k_strides[0], k_strides[1])
    v_at, _ = sequence(cu_seqlens_k, number, seqlen_k, v_strides[0], v_strides[1])
    dq_at, _ = sequence(cu_seqlens_q, number, seqlen_q, dq_strides[0], dq_strides[1])
    dout_at, _ = sequence(cu_seqlens_q, number, seqlen_q, dout_strides[0], dout_strides[1])
    lse_at, _ = sequence(cu_seqlens_q, number, seqlen_q, lse_strides[0], 1)
    m0 = tile * BLOCK_M
    if m0 < length_q:
        rows, columns = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        in_dims, in_dims_v = dims[None, :] < HEAD_DIM, dims_v[None, :] < HEAD_DIM_V
        in_rows = rows[:, None] < length_q
        wide_rows, wide_columns = rows[:, None].to(tl.int64), columns[:, None].to(tl.int64)
        wide_head, kv_head = head.to(tl.int64), (head // GROUP_SIZE).to(tl.int64)
        q = tl.load(q_ptr + q_at + wide_head * q_strides[2] + wide_rows * q_strides[1] + dims[None, :], mask=in_rows & in_dims, other=0.0)
        dout = tl.load(dout_ptr + dout_at + wide_head * dout_strides[2] + wide_rows * dout_strides[1] + dims_v[None, :], mask=in_rows & in_dims_v, other=0.0)
        k_ptrs = k_ptr + k_at + kv_head * k_strides[2] + wide_columns * k_strides[1] + dims[None, :]
        v_ptrs = v_ptr + v_at + kv_head * v_strides[2] + wide_columns * v_strides[1] + dims_v[None, :]
        row_at = lse_at + wide_head * lse_strides[1]
        lse, delta = row_statistics(lse_ptr + row_at, delta_ptr + row_at, rows, length_q)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dslope = tl.zeros([BLOCK_M], tl.float32)
        bias_at, slope = bias, slopes
        if bias is not None:
            bias_at = bias_matrix(bias, number, head, terms[2])
        if slopes is not None:
            slope = tl.load(slopes + number * slope_stride + head)
        first_key, end_key = key_bounds(key_range, number, length_k)
        shift = length_k - length_q
        place = (length_q, end_key, shift, number * num_heads + head)
        EVEN: tl.constexpr = BLOCK_D == HEAD_DIM
        EVEN_V: tl.constexpr = BLOCK_DV == HEAD_DIM_V
        if lists is None:
            first, full_first, full_end, end = key_tiles(m0, tl.minimum(m0 + BLOCK_M, length_q), shift, band[0], band[1], first_key, end_key, BLOCK_N)
            num_full, num_left, num_partial = full_end - full_first, full_first - first, full_first - first + end - full_end
        else:
            full_first, middle, end = listed(lists[0], number * lists[4] + head * lists[5] + tile)
            num_full, num_partial = middle - full_first, end - middle
        for step in range(0, num_full):
            n0 = (full_first + step) * BLOCK_N if lists is None else tl.load(lists[1] + full_first + step) * BLOCK_N
            k = load_tile(k_ptrs + n0.to(tl.int64) * k_strides[1], in_dims, EVEN)
            v = load_tile(v_ptrs + n0.to(tl.int64) * v_strides[1], in_dims_v, EVEN_V)
            dq, dslope, _ds = _row_tile(dq, dslope, q, k, v, dout, None, rows, n0 + columns, lse, delta, terms, bias_at, slope, seed, place, False, PRECISION)  # fmt: skip
        for step in range(0, num_partial):
            if lists is None:
                n0 = tl.where(step < num_left, first + step, full_end + step - num_left) * BLOCK_N
                keep = band_cells(rows[:, None], (n0 + columns)[None, :], shift, band[0], band[1], first_key, end_key)
                seen = (n0 + columns >= first_key) & (n0 + columns < end_key)
            else:
                n0 = tl.load(lists[1] + middle + step) * BLOCK_N
                keep = bit_cells(lists[3], tl.load(lists[2] + middle + step), (rows - m0)[:, None], columns[None, :], BLOCK_M, BLOCK_N)
                seen = tl.max(keep.to(tl.int32), 0) > 0
            k = tl.load(k_ptrs + n0.to(tl.int64) * k_strides[1], mask=seen[:, None] & in_dims, other=0.0)
            v = tl.load(v_ptrs + n0.to(tl.int64) * v_strides[1], mask=seen[:, None] & in_dims_v, other=0.0)
            dq, dslope, _ds = _row_tile(dq, dslope, q, k, v, dout, keep, rows, n0 + columns, lse, delta, terms, bias_at, slope, seed, place, True, PRECISION)  # fmt: skip
        dq_ptrs = dq_ptr + dq_at + wide_head * dq_strides[2] + wide_rows * dq_strides[1] + dims[None, :]
        tl.store(dq_ptrs, (dq * terms[0]).to(dq_ptr.dtype.element_ty), mask=in_rows & in_dims)
        if dslope_ptr is not None:
            tl.store(dslope_ptr + row_at + rows, dslope, mask=rows < length_q)
