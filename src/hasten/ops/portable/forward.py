"""Forward kernel: one program computes one tile of rows of one head (FlashAttention-2, arXiv 2307.08691, alg. 1)."""

from __future__ import annotations

import triton
import triton.language as tl

from hasten.ops.portable.cells import (
    LOG2E,
    bias_matrix,
    exp_difference,
    keys_seen,
    score,
    score_unit,
    survivors,
    visible,
)
from hasten.ops.portable.visits import (
    LENGTHS,
    key_bounds,
    key_visits,
    load_inside,
    load_tile,
    sequence,
    tile_pointers,
    visited,
)


@triton.jit
def _key_tile(
    state, q, k, v, keep, rows, keys, terms, bias, slope, seed, place, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """(acc, row_max, row_sum) after one more tile of keys: online softmax, acc += P V; row_max is of `score`."""
    acc, row_max, row_sum = state
    raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    value, _ = score(raw, rows[:, None], keys[None, :], terms, bias, slope, place)
    unit = score_unit(terms, bias, slope)
    if MASKED:
        value = tl.where(keep, value, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(value, 1))
    safe_max = new_max
    if MASKED or bias is not None:  # a row may have seen nothing yet: -inf - -inf
        safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)
    p = exp_difference(value, safe_max[:, None], unit, bias)
    rescale = tl.exp2((row_max - safe_max) * unit)  # exactly 1 while the maximum stands, however large it is
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None]
    if seed is not None:
        p = tl.where(survivors(seed, place[3], rows[:, None], keys[None, :], terms[2]), p * terms[3], 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    sinks, bias, slopes, seed, cu_seqlens_q, cu_seqlens_k, key_range, lists, band, terms,
    q_strides, k_strides, v_strides, out_strides, lse_strides, slope_stride,
    num_tiles, num_heads, seqlen_q, seqlen_k,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of rows [m0, m0 + BLOCK_M) of one head of one sequence.

    band: (left, right), None where unlimited; `lists` as in visits.py, `terms` as in cells.py.
    Strides are in elements: (batch, row, head), that of a dimension is 1; lse_strides: (batch, row, head) too.
    """
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles  # under a causal mask the last rows have the most to do: first
    head, number = (program // num_tiles) % num_heads, program // num_tiles // num_heads
    q_at, length_q = sequence(cu_seqlens_q, number, seqlen_q, q_strides)
    k_at, length_k = sequence(cu_seqlens_k, number, seqlen_k, k_strides)
    m0 = tile * BLOCK_M
    if m0 < length_q:
        v_at, _ = sequence(cu_seqlens_k, number, seqlen_k, v_strides)
        out_at, _ = sequence(cu_seqlens_q, number, seqlen_q, out_strides)
        lse_at, _ = sequence(cu_seqlens_q, number, seqlen_q, lse_strides)
        rows, columns = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        in_dims, in_dims_v = dims[None, :] < HEAD_DIM, dims_v[None, :] < HEAD_DIM_V
        EVEN: tl.constexpr = BLOCK_D == HEAD_DIM
        EVEN_V: tl.constexpr = BLOCK_DV == HEAD_DIM_V
        q = load_inside(tile_pointers(q_ptr, q_at, head, rows, dims, q_strides), rows < length_q, in_dims, EVEN)
        k_ptrs = tile_pointers(k_ptr, k_at, head // GROUP_SIZE, columns, dims, k_strides)
        v_ptrs = tile_pointers(v_ptr, v_at, head // GROUP_SIZE, columns, dims_v, v_strides)

        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        row_max = tl.full([BLOCK_M], -float("inf") if sinks is None else 0.0, tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        if sinks is not None:  # a score without a value: the softmax starts from it
            row_max += tl.load(sinks + head) * LOG2E / score_unit(terms, bias, slopes)
            row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
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
            state = (acc, row_max, row_sum)
            acc, row_max, row_sum = _key_tile(
                state, q, k, v, None, rows, n0 + columns, terms, bias_at, slope, seed, place, False, PRECISION
            )
        for step in range(0, num_partial):
            entry = tl.where(step < num_left, partial + step, others + step - num_left)
            n0 = visited(lists, entry) * BLOCK_N
            keys = n0 + columns
            keep = visible(
                lists, entry, rows[:, None], keys[None, :], m0, n0, shift, band, first_key, end_key, BLOCK_M, BLOCK_N
            )
            seen = keys_seen(lists, keep, keys, first_key, end_key)
            k = load_inside(k_ptrs + n0.to(tl.int64) * k_strides[1], seen, in_dims, EVEN)
            v = load_inside(v_ptrs + n0.to(tl.int64) * v_strides[1], seen, in_dims_v, EVEN_V)
            state = (acc, row_max, row_sum)
            acc, row_max, row_sum = _key_tile(
                state, q, k, v, keep, rows, keys, terms, bias_at, slope, seed, place, True, PRECISION
            )

        empty = row_sum == 0.0
        out = acc / tl.where(empty, 1.0, row_sum)[:, None]
        top = row_max
        if bias is None:
            top = row_max * (score_unit(terms, bias, slopes) / LOG2E)
        lse = tl.where(empty, -float("inf"), top + tl.log2(tl.where(empty, 1.0, row_sum)) / LOG2E)
        out_ptrs = tile_pointers(out_ptr, out_at, head, rows, dims_v, out_strides)
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(rows < length_q)[:, None] & in_dims_v)
        tl.store(lse_ptr + lse_at + head.to(tl.int64) * lse_strides[2] + rows, lse, mask=rows < length_q)
