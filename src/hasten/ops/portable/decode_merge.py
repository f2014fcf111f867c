"""Merging the parts of a decode: the rest of the tree of `decode_state.py`, above what `decode_part` computed."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from hasten.ops.portable.decode_state import GROUP, empty_state, finished, joined, key_span

SIZES = ("part_stride", "first_part", "seqlen_q", "capacity", "prefix")


@triton.jit
def _load_parts(acc_ptr, max_ptr, sum_ptr, at, parts, valid, dims, in_dims, HEAD_DIM_V: tl.constexpr):
    """The states of parts (CHUNK,) of one row; of no keys where not `valid`."""
    at += parts
    acc = tl.load(acc_ptr + at[:, None] * HEAD_DIM_V + dims[None, :], mask=valid[:, None] & in_dims, other=0.0)
    row_max = tl.load(max_ptr + at, mask=valid, other=-float("inf"))
    return acc, row_max, tl.load(sum_ptr + at, mask=valid, other=0.0)


@triton.jit
def merged_parts(
    state, acc_ptr, max_ptr, sum_ptr, at, base, stop, dims, in_dims,
    HEAD_DIM_V: tl.constexpr, DIMS: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`state` joined with the parts of keys [base, stop), stored from element `at` of max and sum on.

    Groups are taken CHUNK at a time, at absolute places, so that empty ones before and after change no bit.
    """
    first_part = base // (UNIT * UNITS)
    end_part = tl.cdiv(stop, UNIT * UNITS)
    for chunk in range(base // (UNIT * GROUP * CHUNK), tl.cdiv(stop, UNIT * GROUP * CHUNK)):
        groups = chunk * CHUNK + tl.arange(0, CHUNK)
        if UNITS == 1:
            total = empty_state(CHUNK, DIMS)
            for unit in tl.static_range(GROUP):
                parts = groups * GROUP + unit
                valid = (parts >= first_part) & (parts < end_part)
                total = joined(
                    total,
                    _load_parts(acc_ptr, max_ptr, sum_ptr, at, parts - first_part, valid, dims, in_dims, HEAD_DIM_V),
                )
        else:
            valid = (groups >= first_part) & (groups < end_part)
            total = _load_parts(acc_ptr, max_ptr, sum_ptr, at, groups - first_part, valid, dims, in_dims, HEAD_DIM_V)
        top = tl.max(total[1], 0, keep_dims=True)
        weight = tl.exp2(total[1] - tl.where(top == -float("inf"), 0.0, top))
        acc = tl.sum(total[0] * weight[:, None], 0, keep_dims=True)
        state = joined(state, (acc, top, tl.sum(total[2] * weight, 0, keep_dims=True)))
    return state


@triton.jit(do_not_specialize=SIZES)
def decode_merge(
    acc_ptr, max_ptr, sum_ptr, out_ptr, lse_ptr, lengths, sinks, cu_seqlens_q, left,
    lse_strides, num_heads, part_stride, first_part, seqlen_q, capacity, prefix,
    HEAD_DIM_V: tl.constexpr, DIMS: tl.constexpr, RUNS: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
    PREFIX_UNITS: tl.constexpr, CHUNK: tl.constexpr, RING: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out and lse of one row from the states of its parts. Other arguments as in `decode_part`.

    A program does RUNS runs of DIMS dimensions, one after another: few rows are cut finer, and no bit knows of it.
    PREFIX_UNITS: units in a part of the shared prefix, whose parts come first; 0 without one. OVERLAP: whether this was
    launched before `decode_part` has ended.
    """
    PIECES: tl.constexpr = (HEAD_DIM_V + DIMS * RUNS - 1) // (DIMS * RUNS)
    program = tl.program_id(0)
    piece, head = program % PIECES, program // PIECES % num_heads
    query, number = program // PIECES // num_heads % seqlen_q, program // PIECES // num_heads // seqlen_q
    start, length_q, token = number * seqlen_q, seqlen_q, query
    if cu_seqlens_q is not None:
        start = tl.load(cu_seqlens_q + number)
        length_q = tl.load(cu_seqlens_q + number + 1) - start
        token = start + query
    if OVERLAP:
        gdc_wait()
    if query < length_q:
        row = (start + query).to(tl.int64) * num_heads + head
        at = row * part_stride
        base, stop = key_span(tl.load(lengths + number), length_q, left, capacity, prefix, RING)
        sink = None
        if sinks is not None:
            sink = tl.load(sinks + head)
        for run in tl.static_range(RUNS):
            dims = (piece * RUNS + run) * DIMS + tl.arange(0, DIMS)
            in_dims = dims[None, :] < HEAD_DIM_V
            state = empty_state(1, DIMS)
            if PREFIX_UNITS > 0:
                state = merged_parts(
                    state, acc_ptr, max_ptr, sum_ptr, at, 0, prefix, dims, in_dims,
                    HEAD_DIM_V, DIMS, UNIT, PREFIX_UNITS, CHUNK,
                )  # fmt: skip
            state = merged_parts(
                state, acc_ptr, max_ptr, sum_ptr, at + first_part, base, stop, dims, in_dims,
                HEAD_DIM_V, DIMS, UNIT, UNITS, CHUNK,
            )  # fmt: skip
            out, lse = finished(state, sink)
            out_ptrs = out_ptr + row * HEAD_DIM_V + dims[None, :]
            tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_dims)
            if (piece == 0) & (run == 0):
                lse_at = number.to(tl.int64) * lse_strides[0] + token.to(tl.int64) * lse_strides[1]
                tl.store(lse_ptr + lse_at + head.to(tl.int64) * lse_strides[2] + tl.arange(0, 1), lse)
