"""Gradient of a dense bias, summed over what the bias broadcasts, without a score matrix of its own."""

from __future__ import annotations

import triton
import triton.language as tl

from hasten.ops.portable.backward import row_statistics, score_gradient
from hasten.ops.portable.cells import band_cells, bit_cells, bias_matrix, key_bounds, key_tiles, listed


@triton.jit
def _add(dbias, ds, rows, keys, tile, strides, inside, ONE_ROW: tl.constexpr, ONE_KEY: tl.constexpr):
    """dbias += ds on the cells this program owns; a broadcast axis is summed first."""
    if ONE_ROW and ONE_KEY:
        at = dbias + tile * strides[0]
        tl.store(at, tl.load(at) + tl.sum(tl.sum(ds, 1), 0))
    elif ONE_ROW:
        at = dbias + tile * strides[0] + keys
        in_keys = tl.max(inside.to(tl.int32), 0) > 0
        tl.store(at, tl.load(at, mask=in_keys, other=0.0) + tl.sum(ds, 0), mask=in_keys)
    elif ONE_KEY:
        at = dbias + rows.to(tl.int64) * strides[0]
        in_rows = tl.max(inside.to(tl.int32), 1) > 0
        tl.store(at, tl.load(at, mask=in_rows, other=0.0) + tl.sum(ds, 1), mask=in_rows)
    else:
        at = dbias + rows[:, None].to(tl.int64) * strides[0] + keys[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + ds, mask=inside)
    tl.debug_barrier()  # the next tile may add to the same place from other threads


@triton.jit
def attention_dbias(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dbias_ptr,
    bias, seed, key_range, lists, band, terms,
    q_strides, k_strides, v_strides, dout_strides, dbias_strides, lse_strides,
    num_tiles, batch, num_heads, seqlen_q, seqlen_k,
    ONE_BATCH: tl.constexpr, ONE_HEAD: tl.constexpr, ONE_ROW: tl.constexpr, ONE_KEY: tl.constexpr,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows [m0, m0 + BLOCK_M) of dbias, float32 and zero before, for one (batch, head) of the bias.

    The program walks all members that share its bias, so that no other one writes where it does. If the
    bias has one row for all queries, dbias has a row for each program instead. Dense layout only.
    """
    program = tl.program_id(0)
    tile = program % num_tiles
    m0 = tile * BLOCK_M
    rows, columns = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    in_dims, in_dims_v = dims[None, :] < HEAD_DIM, dims_v[None, :] < HEAD_DIM_V
    in_rows = rows[:, None] < seqlen_q
    wide_rows, wide_columns = rows[:, None].to(tl.int64), columns[:, None].to(tl.int64)
    shift = seqlen_k - seqlen_q
    own = program // num_tiles
    num_members = (batch if ONE_BATCH else 1) * (num_heads if ONE_HEAD else 1)
    for member in range(0, num_members):
        head = member % num_heads if ONE_HEAD else own % num_heads
        number = (member // num_heads if ONE_HEAD else member) if ONE_BATCH else (own if ONE_HEAD else own // num_heads)
        wide_number, wide_head, kv_head = tl.cast(number, tl.int64), tl.cast(head, tl.int64), tl.cast(head // GROUP_SIZE, tl.int64)
        q_ptrs = q_ptr + wide_number * q_strides[0] + wide_head * q_strides[2] + wide_rows * q_strides[1] + dims[None, :]
        dout_ptrs = dout_ptr + wide_number * dout_strides[0] + wide_head * dout_strides[2] + wide_rows * dout_strides[1] + dims_v[None, :]
        k_ptrs = k_ptr + wide_number * k_strides[0] + kv_head * k_strides[2] + wide_columns * k_strides[1] + dims[None, :]
        v_ptrs = v_ptr + wide_number * v_strides[0] + kv_head * v_strides[2] + wide_columns * v_strides[1] + dims_v[None, :]
        q = tl.load(q_ptrs, mask=in_rows & in_dims, other=0.0)
        dout = tl.load(dout_ptrs, mask=in_rows & in_dims_v, other=0.0)
        row_at = wide_number * lse_strides[0] + wide_head * lse_strides[1]
        lse, delta = row_statistics(lse_ptr + row_at, delta_ptr + row_at, rows, seqlen_q)
        bias_at = bias_matrix(bias, number, head, terms[2])
        dbias_at = bias_matrix(dbias_ptr, own if ONE_HEAD else own // num_heads, 0 if ONE_HEAD else head, dbias_strides)
        first_key, end_key = key_bounds(key_range, number, seqlen_k)
        place = (seqlen_q, end_key, shift, number * num_heads + head)
        if lists is None:
            first, _, _, end = key_tiles(m0, tl.minimum(m0 + BLOCK_M, seqlen_q), shift, band[0], band[1], first_key, end_key, BLOCK_N)
        else:
            first, middle, end = listed(lists[0], tl.cast(number * lists[4] + head * lists[5] + tile, tl.int32))
        for step in range(first, end):
            if lists is None:
                n0 = step * BLOCK_N
                keep = band_cells(rows[:, None], (n0 + columns)[None, :], shift, band[0], band[1], first_key, end_key)
            else:
                n0 = tl.load(lists[1] + step) * BLOCK_N
                keep = bit_cells(lists[3], tl.load(lists[2] + step), (rows - m0)[:, None], columns[None, :], BLOCK_M, BLOCK_N) | (step < middle)
            keys = n0 + columns
            keep = keep & in_rows & (keys < seqlen_k)[None, :]
            k = tl.load(k_ptrs + tl.cast(n0, tl.int64) * k_strides[1], mask=(keys < seqlen_k)[:, None] & in_dims, other=0.0)
            v = tl.load(v_ptrs + tl.cast(n0, tl.int64) * v_strides[1], mask=(keys < seqlen_k)[:, None] & in_dims_v, other=0.0)
            raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            _met, ds, _inner = score_gradient(raw, dp, keep, rows[:, None], keys[None, :], lse[:, None], delta[:, None], terms, bias_at, None, seed, place, True)
            _add(dbias_at, ds, rows, keys, tile, (dbias_strides[2],), keep, ONE_ROW, ONE_KEY)
