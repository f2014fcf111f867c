"""Forward kernel: one program computes one tile of rows for one head (FlashAttention-2, arXiv 2307.08691, alg. 1)."""

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
    score,
    sequence,
    survivors,
)


@triton.jit
def _accumulate(acc, row_max, row_sum, q, k, v, keep, rows, keys, terms, bias, slope, seed, place, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys: online softmax and acc += P V. `terms` and `place` are as in `attention_forward`."""
    scale, softcap, bias_strides, threshold, keep_scale = terms
    row_limit, end_key, shift, sequence_head = place
    raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    value, unit, _ = score(raw, rows[:, None], keys[None, :], row_limit, shift, scale, softcap, bias, bias_strides, end_key, slope)
    if MASKED:
        value = tl.where(keep, value, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(value, 1) * unit)
    safe_max = new_max
    if MASKED or bias is not None:  # a row may have seen nothing yet: -inf - -inf
        safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)
    p = tl.exp2(value * unit - safe_max[:, None])
    rescale = tl.exp2(row_max - safe_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None]
    if seed is not None:
        p = tl.where(survivors(tl.load(seed), sequence_head, rows[:, None], keys[None, :], threshold), p * keep_scale, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    sinks, bias, slopes, seed,
    cu_seqlens_q, cu_seqlens_k, key_range, lists, band, terms,
    q_strides, k_strides, v_strides, out_strides, lse_strides, slope_stride,
    num_tiles, num_heads, seqlen_q, seqlen_k,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of rows [m0, m0 + BLOCK_M) of one head of one sequence.

    lists: None, or (row_ptr, row_index, row_bits, bits, batch stride, head stride in rows of tiles).
    band: (left, right), None where unlimited. terms: (scale, softcap, bias strides, dropout threshold, 1 / (1 - p)).
    Strides are in elements: (batch, row, head); dimension stride 1.
    """
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles  # under a causal mask the last rows have the most to do: first
    head = (program // num_tiles) % num_heads
    number = program // num_tiles // num_heads
    q_at, length_q = sequence(cu_seqlens_q, number, seqlen_q, q_strides[0], q_strides[1])
    k_at, length_k = sequence(cu_seqlens_k, number, seqlen_k, k_strides[0], k_strides[1])
    v_at, _ = sequence(cu_seqlens_k, number, seqlen_k, v_strides[0], v_strides[1])
    out_at, _ = sequence(cu_seqlens_q, number, seqlen_q, out_strides[0], out_strides[1])
    lse_at, _ = sequence(cu_seqlens_q, number, seqlen_q, lse_strides[0], 1)
    m0 = tile * BLOCK_M
    if m0 < length_q:
        rows = m0 + tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_N)
        dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        in_dims, in_dims_v = dims[None, :] < HEAD_DIM, dims_v[None, :] < HEAD_DIM_V
        in_rows = rows[:, None] < length_q
        kv_head = head // GROUP_SIZE
        q_ptrs = q_ptr + q_at + head.to(tl.int64) * q_strides[2] + rows[:, None].to(tl.int64) * q_strides[1] + dims[None, :]
        q = tl.load(q_ptrs, mask=in_rows & in_dims, other=0.0)
        k_ptrs = k_ptr + k_at + kv_head.to(tl.int64) * k_strides[2] + columns[:, None].to(tl.int64) * k_strides[1] + dims[None, :]
        v_ptrs = v_ptr + v_at + kv_head.to(tl.int64) * v_strides[2] + columns[:, None].to(tl.int64) * v_strides[1] + dims_v[None, :]

        row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        if sinks is not None:  # a score without a value: the softmax starts from it
            row_max = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head) * LOG2E
            row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
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
            acc, row_max, row_sum = _accumulate(acc, row_max, row_sum, q, k, v, None, rows, n0 + columns, terms, bias_at, slope, seed, place, False, PRECISION)  # fmt: skip
        for step in range(0, num_partial):
            if lists is None:
                n0 = tl.where(step < num_left, first + step, full_end + step - num_left) * BLOCK_N
                keys = n0 + columns
                keep = band_cells(rows[:, None], keys[None, :], shift, band[0], band[1], first_key, end_key)
                seen = (keys >= first_key) & (keys < end_key)
            else:
                n0 = tl.load(lists[1] + middle + step) * BLOCK_N
                keys = n0 + columns
                keep = bit_cells(lists[3], tl.load(lists[2] + middle + step), (rows - m0)[:, None], columns[None, :], BLOCK_M, BLOCK_N)
                seen = tl.max(keep.to(tl.int32), 0) > 0
            # keys that nobody sees are not read: what is there may be anything, and 0 * NaN is NaN
            k = tl.load(k_ptrs + n0.to(tl.int64) * k_strides[1], mask=seen[:, None] & in_dims, other=0.0)
            v = tl.load(v_ptrs + n0.to(tl.int64) * v_strides[1], mask=seen[:, None] & in_dims_v, other=0.0)
            acc, row_max, row_sum = _accumulate(acc, row_max, row_sum, q, k, v, keep, rows, keys, terms, bias_at, slope, seed, place, True, PRECISION)  # fmt: skip

        empty = row_sum == 0.0
        out = acc / tl.where(empty, 1.0, row_sum)[:, None]
        lse = tl.where(empty, -float("inf"), (row_max + tl.log2(tl.where(empty, 1.0, row_sum))) / LOG2E)
        out_ptrs = out_ptr + out_at + head.to(tl.int64) * out_strides[2] + rows[:, None].to(tl.int64) * out_strides[1] + dims_v[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_rows & in_dims_v)
        tl.store(lse_ptr + lse_at + head.to(tl.int64) * lse_strides[1] + rows, lse, mask=rows < length_q)
