"""Decode kernel: a few query rows of each sequence over one part of its keys in a KV cache.

A program takes one unit of keys, or a whole group, of the tree of `decode_state.py`; `decode_merge` does the rest.
Where a key lies is `key_places`, which rows a program has `row_places`, what they see `row_bounds`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from hasten.ops.portable.cells import LOG2E, tanh
from hasten.ops.portable.decode_state import empty_state, finished, joined, key_span
from hasten.ops.portable.visits import load_inside, load_tile, sequence

SIZES = ("batch", "num_tiles", "num_parts", "part_stride", "first_part", "seqlen_q", "capacity", "prefix")


@triton.jit
def row_places(
    cu_seqlens_q, lengths, number, tile, batch, seqlen_q, q_strides,
    GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """(sequence, its length, its queries, query, first query's token, head in group, element of q, in range) by row.

    Rows are (query, head of the group) of one sequence, or with SHARED (sequence, query, head) of the batch.
    """
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = index // GROUP_SIZE, index % GROUP_SIZE
    if SHARED:
        number = token // seqlen_q
        inside, query, length_q, start = number < batch, token % seqlen_q, seqlen_q, number * seqlen_q
        length = tl.load(lengths + number, mask=inside, other=0)
        at = number.to(tl.int64) * q_strides[0]
    else:
        at, length_q = sequence(cu_seqlens_q, number, seqlen_q, q_strides)
        inside, query, length = token < length_q, token, tl.load(lengths + number)
        start = number * seqlen_q
        if cu_seqlens_q is not None:
            start = tl.load(cu_seqlens_q + number)
    return number, length, length_q, query, start, head, at + query.to(tl.int64) * q_strides[1], inside


@triton.jit
def row_bounds(length, length_q, query, band, capacity, prefix, RING: tl.constexpr, SHARED: tl.constexpr):
    """(position, first, end) by row: keys [first, end) are visible; with SHARED those of the prefix alone."""
    position = length - length_q + query
    first, end = position * 0, position * 0 + length
    if not RING:
        end = tl.minimum(end, capacity)
    if band[0] is not None:
        first = tl.maximum(first, position - band[0])
    if band[1] is not None:
        end = tl.minimum(end, position + band[1] + 1)
    if SHARED:
        end = tl.minimum(end, prefix)
    else:
        first = tl.maximum(first, prefix)
    return position, first, end


@triton.jit
def key_places(
    table, number, n0, columns, low, high, capacity, PAGE_SIZE: tl.constexpr, RING: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Where keys n0 + columns lie: (index of the page or batch entry, row in it), int64. `table`: the sequence's row.

    Entries are read as scalars: as a tensor they would be a level of the software pipeline, which halves its depth.
    """
    if table is None:
        row = n0 + columns
        if RING:
            row = row % capacity
        return tl.cast(number, tl.int64), row.to(tl.int64)
    else:
        page = tl.zeros([BLOCK_N], tl.int32)
        for index in tl.static_range((BLOCK_N + PAGE_SIZE - 1) // PAGE_SIZE):
            begin = n0 // PAGE_SIZE * PAGE_SIZE + index * PAGE_SIZE
            is_seen = (begin < high) & (begin + PAGE_SIZE > low)
            entry = tl.load(table + begin // PAGE_SIZE, mask=is_seen, other=0)
            if BLOCK_N <= PAGE_SIZE:
                page = entry
            else:
                page = tl.where(columns // PAGE_SIZE == index, entry, page)
        row = (n0 + columns) % PAGE_SIZE
        return page.to(tl.int64), row.to(tl.int64)


@triton.jit
def _scores(raw, k_scale, slope, positions, keys, terms):
    """Scores in units of log2; terms: (scale, softcap)."""
    if k_scale is not None:
        raw = raw * k_scale[None, :]
    if terms[1] is None:
        value = raw * (terms[0] * LOG2E)
    else:
        value = tanh(raw * terms[0] / terms[1]) * (terms[1] * LOG2E)
    if slope is not None:
        value -= (slope * LOG2E)[:, None] * tl.abs(positions[:, None] - keys[None, :]).to(tl.float32)
    return value


@triton.jit
def _key_tile(state, q, k, v, k_scale, v_scale, keep, slope, positions, keys, terms, PRECISION: tl.constexpr):
    """(acc, row_max, row_sum) after one more tile of keys. `keep`: bool tile, None if every cell is visible."""
    acc, row_max, row_sum = state
    value = _scores(
        tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION), k_scale, slope, positions, keys, terms
    )
    if keep is not None:
        value = tl.where(keep, value, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(value, 1))
    safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)
    p = tl.exp2(value - safe_max[:, None])
    rescale = tl.exp2(row_max - safe_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    if v_scale is not None:
        p = p * v_scale[None, :]
        if q.dtype != tl.float32:  # in float16 a small scale would leave p without bits
            high, wide_v = p.to(tl.bfloat16), v.to(tl.bfloat16)
            acc = tl.dot(high, wide_v, acc * rescale[:, None])
            if q.dtype == tl.float16:  # whose three bits more than bfloat16 are in what rounding left over
                acc = tl.dot((p - high.to(tl.float32)).to(tl.bfloat16), wide_v, acc)
            return acc, new_max, row_sum
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _visit(
    state, q, cache, strides, place, rows, terms, n0, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr, RING: tl.constexpr, ALIKE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after keys [n0, n0 + BLOCK_N); with MASKED those of them in [low, high) that a row may see.

    cache: (k, v, their scales, table) of the sequence and head; strides: of these (page, row); place: (sequence,
    capacity, low, high); rows: (position, first, end, slope).
    """
    columns, dims, dims_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    keys = n0 + columns
    low, high = place[2], place[3]
    page, row = key_places(cache[4], place[0], n0, columns, low, high, place[1], PAGE_SIZE, RING, BLOCK_N)
    k_at = page * strides[0][0] + row * strides[0][1]
    v_at = k_at
    if not ALIKE:
        v_at = page * strides[1][0] + row * strides[1][1]
    k_ptrs, v_ptrs = cache[0] + k_at[:, None] + dims[None, :], cache[1] + v_at[:, None] + dims_v[None, :]
    keep, k_scale, v_scale = None, None, None
    if MASKED:
        seen = (keys >= low) & (keys < high)
        k = load_inside(k_ptrs, seen, dims[None, :] < HEAD_DIM, BLOCK_D == HEAD_DIM)
        v = load_inside(v_ptrs, seen, dims_v[None, :] < HEAD_DIM_V, BLOCK_DV == HEAD_DIM_V)
        keep = (keys[None, :] >= tl.maximum(rows[1], low)[:, None]) & (
            keys[None, :] < tl.minimum(rows[2], high)[:, None]
        )
    else:
        k = load_tile(k_ptrs, dims[None, :] < HEAD_DIM, BLOCK_D == HEAD_DIM)
        v = load_tile(v_ptrs, dims_v[None, :] < HEAD_DIM_V, BLOCK_DV == HEAD_DIM_V)
    if cache[2] is not None:
        seen = (keys >= low) & (keys < high)
        k_scale = tl.load(cache[2] + page * strides[2][0] + row * strides[2][1], mask=seen, other=0.0)
        v_scale = tl.load(cache[3] + page * strides[3][0] + row * strides[3][1], mask=seen, other=0.0)
    return _key_tile(state, q, k, v, k_scale, v_scale, keep, rows[3], rows[0], keys, terms, PRECISION)


@triton.jit
def _next_unit(group, unit, starts):
    """(group, unit) before a tile; where it `starts` a unit, the last one goes into the group."""
    acc, row_max, row_sum = joined(group, unit)
    group = tl.where(starts, acc, group[0]), tl.where(starts, row_max, group[1]), tl.where(starts, row_sum, group[2])
    empty = tl.where(starts, -float("inf"), unit[1])
    return group, (tl.where(starts, 0.0, unit[0]), empty, tl.where(starts, 0.0, unit[2]))


@triton.jit(do_not_specialize=SIZES)
def decode_part(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, acc_ptr, max_ptr, sum_ptr,
    table, lengths, k_scales, v_scales, sinks, slopes, cu_seqlens_q, terms, band,
    q_strides, k_strides, v_strides, k_scale_strides, v_scale_strides, lse_strides, table_stride, slope_stride,
    batch, num_tiles, num_kv_heads, num_parts, part_stride, first_part, seqlen_q, capacity, prefix,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, RING: tl.constexpr, SHARED: tl.constexpr, DIRECT: tl.constexpr,
    ALIKE: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One part of the keys for BLOCK_M rows: its state into acc, max, sum, or out and lse if DIRECT.

    UNITS: 1 or GROUP units a part, 0: all keys in one part, which is no tree but one online softmax, as are the parts
    of a SHARED prefix. acc: float32 (tokens,
    num_heads, part_stride, HEAD_DIM_V), max and sum (tokens, num_heads, part_stride), parts from first_part on.
    ALIKE: whether keys and values have the same strides. OVERLAP: whether the next kernel is `decode_merge`.
    terms: (scale, softcap); band: (left, right). Strides in elements: (batch or page, row, head).
    """
    NESTED: tl.constexpr = UNITS > 1 and not SHARED
    if OVERLAP:  # the merge may be launched once every program here has begun; it waits for their end itself
        gdc_launch_dependents()
    program = tl.program_id(0)
    tile, kv_head = program % num_tiles, (program // num_tiles) % num_kv_heads
    part, number = program // num_tiles // num_kv_heads % num_parts, program // num_tiles // num_kv_heads // num_parts
    owner, length, length_q, query, start, head, q_at, inside = row_places(
        cu_seqlens_q, lengths, number, tile, batch, seqlen_q, q_strides, GROUP_SIZE, BLOCK_M, SHARED
    )
    head += kv_head * GROUP_SIZE
    position, first, end = row_bounds(length, length_q, query, band, capacity, prefix, RING, SHARED)
    low, high = tl.min(tl.where(inside, first, 2147483647)), tl.max(tl.where(inside, end, 0))
    is_needed = tl.max(inside.to(tl.int32)) > 0
    if UNITS > 0:
        base, stop = 0, prefix
        if not SHARED:
            base, stop = key_span(length, length_q, band[0], capacity, prefix, RING)
        begin = (base // (UNIT * UNITS) + part) * (UNIT * UNITS)
        low, high = tl.maximum(low, begin), tl.minimum(high, begin + UNIT * UNITS)
        if not DIRECT:
            is_needed = is_needed & (begin < stop)
    if is_needed:
        dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        q_rows = q_ptr + (q_at + head.to(tl.int64) * q_strides[2])[:, None]
        q = load_inside(q_rows + dims[None, :], inside, dims[None, :] < HEAD_DIM, BLOCK_D == HEAD_DIM)
        slope, k_scale, v_scale, own_table = None, None, None, None
        if slopes is not None:
            slope = tl.load(slopes + owner * slope_stride + head, mask=inside, other=0.0)
        if k_scales is not None:
            k_scale = k_scales + kv_head.to(tl.int64) * k_scale_strides[2]
            v_scale = v_scales + kv_head.to(tl.int64) * v_scale_strides[2]
        if table is not None:
            own_table = table + number.to(tl.int64) * table_stride
        wide_head = kv_head.to(tl.int64)
        cache = (k_ptr + wide_head * k_strides[2], v_ptr + wide_head * v_strides[2], k_scale, v_scale, own_table)
        strides = (k_strides, v_strides, k_scale_strides, v_scale_strides)
        place, rows = (number, capacity, low, high), (position, first, end, slope)
        state, group = empty_state(BLOCK_M, BLOCK_DV), empty_state(BLOCK_M, BLOCK_DV)
        tile_low = tl.minimum(low, high) // BLOCK_N
        full_low, full_high, tile_high = tile_low, tile_low, tl.cdiv(high, BLOCK_N)
        if UNITS == 0 or SHARED:  # many rows: masks cost more than a second loop, whose tiles are in no fixed order
            all_low = tl.maximum(tl.max(tl.where(inside, first, 0)), low)
            all_high = tl.minimum(tl.min(tl.where(inside, end, 2147483647)), high)
            full_low = tl.minimum(tl.maximum(tl.cdiv(all_low, BLOCK_N), tile_low), tile_high)
            full_high = tl.maximum(tl.minimum(tl.maximum(all_high, 0) // BLOCK_N, tile_high), full_low)
            for step in range(full_low, full_high):
                state = _visit(
                    state, q, cache, strides, place, rows, terms, step * BLOCK_N, False, HEAD_DIM, HEAD_DIM_V,
                    BLOCK_D, BLOCK_DV, BLOCK_N, PAGE_SIZE, RING, ALIKE, PRECISION,
                )  # fmt: skip
        num_left = full_low - tile_low
        for index in range(0, num_left + tile_high - full_high):
            step = tl.where(index < num_left, tile_low + index, full_high + index - num_left)
            if NESTED:
                group, state = _next_unit(group, state, step % (UNIT // BLOCK_N) == 0)
            state = _visit(
                state, q, cache, strides, place, rows, terms, step * BLOCK_N, True, HEAD_DIM, HEAD_DIM_V,
                BLOCK_D, BLOCK_DV, BLOCK_N, PAGE_SIZE, RING, ALIKE, PRECISION,
            )  # fmt: skip
        if NESTED:
            state = joined(group, state)

        flat = (start + query).to(tl.int64) * (num_kv_heads * GROUP_SIZE) + head
        if DIRECT:
            sink = None
            if sinks is not None:
                sink = tl.load(sinks + head, mask=inside, other=0.0)
            out, lse = finished(state, sink)
            out_ptrs = out_ptr + flat[:, None] * HEAD_DIM_V + dims_v[None, :]
            tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (dims_v[None, :] < HEAD_DIM_V))
            lse_at = owner.to(tl.int64) * lse_strides[0] + query * lse_strides[1] + head.to(tl.int64) * lse_strides[2]
            if cu_seqlens_q is not None:
                lse_at += start * lse_strides[1]
            tl.store(lse_ptr + lse_at, lse, mask=inside)
        else:
            at = flat * part_stride + first_part + part
            tl.store(
                acc_ptr + at[:, None] * HEAD_DIM_V + dims_v[None, :],
                state[0],
                mask=inside[:, None] & (dims_v[None, :] < HEAD_DIM_V),
            )
            tl.store(max_ptr + at, state[1], mask=inside)
            tl.store(sum_ptr + at, state[2], mask=inside)
