"""Gradient of a dense bias, summed over what the bias broadcasts, without a score matrix of its own."""

from __future__ import annotations

import triton
import triton.language as tl

from hasten.ops.portable.cells import bias_matrix, row_statistics, score_gradient, visible
from hasten.ops.portable.visits import LENGTHS, key_bounds, key_visits, load_inside, tile_pointers, visited


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


@triton.jit(do_not_specialize=LENGTHS)
def attention_dbias(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dbias_ptr, bias, seed, key_range, lists, band, terms,
    q_strides, k_strides, v_strides, dout_strides, dbias_strides, lse_strides,
    num_tiles, batch, num_heads, seqlen_q, seqlen_k,
    ONE_BATCH: tl.constexpr, ONE_HEAD: tl.constexpr, ONE_ROW: tl.constexpr, ONE_KEY: tl.constexpr,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows [m0, m0 + BLOCK_M) of dbias, float32 and zero before, for one (batch, head) of the bias.

    The program walks all members that share its bias, so that no other one writes where it does. If the
    bias has one row for all queries, dbias has a row for each program instead. Dense layout only.
    """
    program = tl.program_id(0)
    tile, own = program % num_tiles, program // num_tiles
    m0 = tile * BLOCK_M
    rows, columns = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    in_rows, in_dims, in_dims_v = rows < seqlen_q, dims[None, :] < HEAD_DIM, dims_v[None, :] < HEAD_DIM_V
    shift = seqlen_k - seqlen_q
    num_members = (batch if ONE_BATCH else 1) * (num_heads if ONE_HEAD else 1)
    for member in range(0, num_members):
        head = member % num_heads if ONE_HEAD else own % num_heads
        number = (member // num_heads if ONE_HEAD else member) if ONE_BATCH else (own if ONE_HEAD else own // num_heads)
        wide, kv_head = tl.cast(number, tl.int64), head // GROUP_SIZE
        q_ptrs = tile_pointers(q_ptr, wide * q_strides[0], head, rows, dims, q_strides)
        dout_ptrs = tile_pointers(dout_ptr, wide * dout_strides[0], head, rows, dims_v, dout_strides)
        k_ptrs = tile_pointers(k_ptr, wide * k_strides[0], kv_head, columns, dims, k_strides)
        v_ptrs = tile_pointers(v_ptr, wide * v_strides[0], kv_head, columns, dims_v, v_strides)
        q = load_inside(q_ptrs, in_rows, in_dims, False)
        dout = load_inside(dout_ptrs, in_rows, in_dims_v, False)
        row_at = wide * lse_strides[0] + tl.cast(head, tl.int64) * lse_strides[2]
        lse, delta = row_statistics(lse_ptr + row_at, delta_ptr + row_at, rows, seqlen_q)
        bias_at = bias_matrix(bias, number, head, terms[4], terms[5])
        own_number, own_head = own if ONE_HEAD else own // num_heads, 0 if ONE_HEAD else head
        dbias_at = bias_matrix(dbias_ptr, own_number, own_head, dbias_strides[0], dbias_strides[1])
        first_key, end_key = key_bounds(key_range, number, seqlen_k)
        place = (seqlen_q, end_key, shift, number * num_heads + head)
        row_of_tiles = tile
        if lists is not None:
            row_of_tiles = number * lists[4] + head * lists[5] + tile
        m1 = tl.minimum(m0 + BLOCK_M, seqlen_q)
        full, num_full, first, _left, _others, num_partial = key_visits(
            lists, row_of_tiles, m0, m1, shift, band[0], band[1], first_key, end_key, BLOCK_N
        )
        for step in range(0, num_full + num_partial):
            # the visits of a band follow each other, and so do the entries of a list
            entry = (first if lists is None else full) + step
            n0 = visited(lists, entry) * BLOCK_N
            keys = n0 + columns
            keep = visible(
                lists, entry, rows[:, None], keys[None, :], m0, n0, shift, band, first_key, end_key, BLOCK_M, BLOCK_N
            )
            if lists is not None:
                keep = keep | (step < num_full)
            keep = keep & in_rows[:, None] & (keys < seqlen_k)[None, :]
            k = load_inside(k_ptrs + tl.cast(n0, tl.int64) * k_strides[1], keys < seqlen_k, in_dims, False)
            v = load_inside(v_ptrs + tl.cast(n0, tl.int64) * v_strides[1], keys < seqlen_k, in_dims_v, False)
            raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            _met, ds, _inner = score_gradient(
                raw, dp, keep, rows[:, None], keys[None, :], lse[:, None], delta[:, None],
                terms, bias_at, None, seed, place, True,
            )  # fmt: skip
            _add(dbias_at, ds, rows, keys, tile, (dbias_strides[2],), keep, ONE_ROW, ONE_KEY)
