"""What a consumer of the forward does with an item that it has seen all of: the statistics, and out to its place."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from hasten.ops.hopper.bridge import partition_barrier, tma_store, tma_store_wait
from hasten.ops.hopper.cells import LOG2E, accumulator, score_unit
from hasten.ops.hopper.pieces import store_piece
from hasten.ops.hopper.rings import matrix


@gluon.jit
def _statistics(row_max, row_sum, terms):
    """(lse, what to multiply out by) of 64 rows: -inf and 1 where a row has seen nothing, and out is 0."""
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), row_max.type.layout)
    empty = row_sum == 0.0
    row_sum = gl.where(empty, 1.0, row_sum)
    top = row_max * (score_unit(terms[0], terms[1]) / LOG2E)
    return gl.where(empty, -float("inf"), top + gl.log2(row_sum) / LOG2E), 1.0 / row_sum


@gluon.jit
def _store_rows(acc, row_max, row_sum, staged, out, terms, place, head, first, options: gl.constexpr):
    """out and lse of 64 rows from `first` on: through `staged` by TMA, which stops at the end of a tensor,
    or by pointers where a packed sequence ends and the rows of its neighbour follow."""
    out_desc, cu_seqlens_q, out_ptr, lse_ptr, num_heads, total_q, head_dim_v = out
    BLOCK_D: gl.constexpr = options[1]
    batch, row, _, length_q = place
    o_layout: gl.constexpr = accumulator(options[1])
    lse, factor = _statistics(row_max, row_sum, terms)
    rows = first + gl.arange(0, 64, lse.type.layout)
    at = gl.cast(batch * num_heads + head, gl.int64) * total_q + row
    gl.store(lse_ptr + at + rows, lse, mask=rows < length_q)
    acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, o_layout))[:, None]
    if cu_seqlens_q is None:
        _store_tile(acc, out_desc, staged, batch, head, first)
    elif first + 64 <= length_q:
        _store_tile(acc, out_desc, staged, batch, head, row + first)
    else:
        own_rows = first + gl.arange(0, 64, gl.SliceLayout(1, o_layout))
        dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, o_layout))
        begins = (row + own_rows).to(gl.int64) * (num_heads * head_dim_v) + head * head_dim_v
        offsets = begins[:, None] + dims[None, :]
        inside = (own_rows[:, None] < length_q) & (dims[None, :] < head_dim_v)
        gl.store(out_ptr + offsets, acc.to(staged.dtype), mask=inside)


@gluon.jit
def _store_tile(acc, out_desc, staged, batch, head, row):
    """Issue the TMA store of 64 rows, one half of their columns after the other where shared memory holds no more."""
    COLUMNS: gl.constexpr = staged.shape[-1]
    if acc.shape[1] == COLUMNS:
        _send(acc, out_desc, staged, [batch, head, row, 0])
    else:
        left, right = gl.split(gl.permute(gl.reshape(acc, [64, 2, COLUMNS]), (0, 2, 1)))
        _send(left, out_desc, staged, [batch, head, row, 0])
        _send(right, out_desc, staged, [batch, head, row, COLUMNS])


@gluon.jit
def _send(values, out_desc, staged, at):
    """Write values to shared memory once TMA has read what is there, and have TMA store them."""
    values = gl.convert_layout(values.to(staged.dtype), accumulator(staged.shape[-1]), assert_trivial=True)
    tma_store_wait(0)
    partition_barrier()
    matrix(staged).store(values)
    fence_async_shared()
    partition_barrier()
    tma_store(out_desc, at, staged)


@gluon.jit
def finish(
    acc, row_max, row_sum, staged, out, terms, place, head, goal, pieces, num_slots,
    CONSUMER: gl.constexpr, options: gl.constexpr,
):  # fmt: skip
    """out and lse of the 64 rows of a consumer. goal: their tile of rows, or -1 - slot of a piece of it."""
    CONSUMERS: gl.constexpr = options[2]
    first = 64 * (goal * CONSUMERS + CONSUMER)
    if pieces is None:
        _store_rows(acc, row_max, row_sum, staged, out, terms, place, head, first, options)
    else:
        if goal >= 0:  # this is for the GPU, the other for the compiler
            _store_rows(acc, row_max, row_sum, staged, out, terms, place, head, first, options)
        else:
            lse, factor = _statistics(row_max, row_sum, terms)
            acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, accumulator(options[1])))[:, None]
            slot = gl.cast(place[0] * out[4] + head, gl.int64) * num_slots - (goal + 1)
            store_piece(acc, lse, pieces[1], slot, 64 * CONSUMER, 64 * CONSUMERS)
