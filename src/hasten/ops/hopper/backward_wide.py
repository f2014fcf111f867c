"""The partitions of the backward kernel for head_dim above 128, where dK and dV of 64 keys fill two warpgroups.

Each warpgroup owns 64 keys by half of head_dim of dK, dV and dQ, and computes all scores of the tile: seven products
instead of five, but nothing crosses from one warpgroup to the other, and neither waits for the other's dS.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hasten.ops.hopper import bridge
from hasten.ops.hopper.backward_schedule import find, tell
from hasten.ops.hopper.backward_tiles import (
    BOTH,
    DOUT_READ,
    DQ_STAGED,
    DQ_TAKEN,
    Q_READ,
    WARP,
    WARPGROUP,
    block_of,
    first_lane,
    fragments,
    hide_keys,
    load_keys,
    load_rows,
    probabilities,
    send_keys,
    take,
    visits_of,
)
from hasten.ops.hopper.cells import accumulator
from hasten.ops.hopper.pieces import store_sums
from hasten.ops.hopper.rings import matrix


@gluon.jit
def load_wide(
    descriptors, buffers, barriers, slots, problem, counter,
    group_size, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """One warp: of every item K and V by halves of head_dim, then Q and row statistics into two slots, dO into one."""
    q_desc, k_desc, v_desc, dout_desc, stats_desc = descriptors
    q_buf, k_buf, v_buf, dout_buf, stats_buf = buffers
    kv_full, kv_empty, q_full, dout_full = barriers
    kv_descs, kv_bufs, kv_barriers = (k_desc, v_desc), (k_buf, v_buf), (kv_full, kv_empty)
    item, turn, tiles, count = gl.program_id(0), 0, 0, 0
    while item >= 0:
        at_q, at_k, place, kv_head, bounds, rows_at = find(item, problem, BLOCK_M, BLOCK_N)
        walk = (problem[3], place, kv_head, problem[4], bounds, (at_q[2], at_k[2]))
        n0 = place[1] * BLOCK_N
        if n0 < at_k[2]:
            begin = count
            for member in range(group_size):
                head = kv_head * group_size + member
                visits = visits_of(walk, head, BLOCK_M, BLOCK_N)
                for step in range(visits[1] + visits[5]):
                    _, block, _ = block_of(problem[3], visits, step, ORDERED)
                    slot = count & 1
                    if count >= 2:
                        bridge.barrier_sync(Q_READ + slot, 2 * WARPGROUP + WARP)
                    q_at, dout_at = q_full.index(slot), dout_full.index(0)
                    mbarrier.expect(q_at, q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
                    load_rows(q_desc, at_q, block * BLOCK_M, 0, head, q_at, q_buf.index(slot))
                    stats_row = head * rows_at[1] + rows_at[0] + block
                    bridge.tma_load(stats_desc, [stats_row, 0], q_at, stats_buf.index(slot))
                    if count >= 1:
                        bridge.barrier_sync(DOUT_READ, 2 * WARPGROUP + WARP)
                    mbarrier.expect(dout_at, dout_desc.block_type.nbytes)
                    load_rows(dout_desc, at_q, block * BLOCK_M, 0, head, dout_at, dout_buf.index(0))
                    if count == begin:  # while the consumers still store the last tile
                        load_keys(kv_descs, kv_bufs, kv_barriers, at_k, n0, kv_head, tiles, 0, k_desc.block_shape[-1])
                    count += 1
            if count == begin:
                load_keys(kv_descs, kv_bufs, kv_barriers, at_k, n0, kv_head, tiles, 0, k_desc.block_shape[-1])
            tiles += 1
        following = take(counter)
        number = first_lane(following) + gl.num_programs(0)
        item = gl.where(number < problem[5][0] * problem[5][1], number, -1)
        tell(slots, turn, item)
        turn += 1
    if count >= 2:  # the barriers count this warp in every block
        bridge.barrier_sync(Q_READ + (count & 1), 2 * WARPGROUP + WARP)
    if count >= 1:
        bridge.barrier_sync(DOUT_READ, 2 * WARPGROUP + WARP)
        bridge.barrier_sync(Q_READ + ((count + 1) & 1), 2 * WARPGROUP + WARP)


@gluon.jit
def consume_wide(
    job, at_k, walk, tiles, count, W: gl.constexpr, group_size, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, MASKED: gl.constexpr, HIDDEN_KEYS: gl.constexpr, ORDER: gl.constexpr,
    ORDERED: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: columns [W HALF, W HALF + HALF) of dK and dV of the tile of keys and of dQ of every block.

    tiles, count: how many tiles and blocks this program has seen before. Returns the new count.
    """
    buffers, barriers, out_descs, terms = job
    q_buf, k_buf, v_buf, dout_buf, stats_buf, ds_buf, dq_buf = buffers
    kv_full, kv_empty, q_full, dout_full = barriers
    dk_desc, dv_desc, sums = out_descs
    HALF: gl.constexpr = k_buf.shape[-1]
    PIECE: gl.constexpr = dq_buf.shape[-2]
    s_mma: gl.constexpr = accumulator(BLOCK_M)
    dtype: gl.constexpr = q_buf.dtype
    lists, place, kv_head, _band, _bounds, _lengths = walk
    n0 = place[1] * BLOCK_N
    keys = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(1, s_mma))
    dk = gl.zeros([BLOCK_N, HALF], gl.float32, accumulator(HALF))
    dv = gl.zeros([BLOCK_N, HALF], gl.float32, accumulator(HALF))
    s_zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, s_mma)
    dq_zero = gl.zeros([BLOCK_M, PIECE], gl.float32, accumulator(PIECE))
    ds_own = ds_buf.index(W)
    mbarrier.wait(kv_full.index(0), tiles & 1)
    if HIDDEN_KEYS:
        hide_keys(matrix(k_buf.index(W)), matrix(v_buf.index(W)), walk, group_size, 0, BLOCK_N)
        bridge.barrier_sync(BOTH, 2 * WARPGROUP)
    for member in range(group_size):
        head = kv_head * group_size + member
        visits = visits_of(walk, head, BLOCK_M, BLOCK_N)
        for step in range(visits[1] + visits[5]):
            entry, block, is_partial = block_of(lists, visits, step, ORDERED)
            slot = count & 1
            zero = count >> 30  # to the compiler a variable, as in `consume_tile`
            q = matrix(q_buf.index(slot))
            stats = stats_buf.index(slot).reshape([2 * BLOCK_M])
            mbarrier.wait(q_full.index(slot), (count >> 1) & 1)
            s = s_zero
            for part in gl.static_range(2):
                k = matrix(k_buf.index(part + zero))
                columns = q.slice(part * HALF, HALF, 1).permute((1, 0))
                s = warpgroup_mma(k, columns, s, use_acc=part > 0, is_async=True)
            mbarrier.wait(dout_full.index(0), count & 1)
            zero = bridge.here(zero)
            dout = matrix(dout_buf.index(zero))
            dp = s_zero
            for part in gl.static_range(2):
                v = matrix(v_buf.index(part + zero))
                columns = dout.slice(part * HALF, HALF, 1).permute((1, 0))
                dp = warpgroup_mma(v, columns, dp, use_acc=part > 0, is_async=True)
            s = warpgroup_mma_wait(2, deps=[s])
            p, slope = probabilities(
                s, stats, entry, is_partial, keys, block * BLOCK_M, walk, terms,
                0, BLOCK_M, BLOCK_N, MASKED,
            )  # fmt: skip
            p_operand = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, accumulator(HALF), 2))
            if ORDER == 1:
                dv = warpgroup_mma(p_operand, dout.slice(W * HALF, HALF, 1), dv, is_async=True)
            delta = stats.slice(BLOCK_M, BLOCK_M).load(gl.SliceLayout(0, s_mma))
            dp = warpgroup_mma_wait(ORDER, deps=[dp])
            ds = (slope * (dp - delta[None, :])).to(dtype)
            if ORDER == 0:
                dv = warpgroup_mma(p_operand, dout.slice(W * HALF, HALF, 1), dv, is_async=True)
            ds_own.store(ds)
            fence_async_shared()
            dv = warpgroup_mma_wait(0, deps=[dv])
            bridge.barrier_arrive(DOUT_READ, 2 * WARPGROUP + WARP)
            zero = bridge.here(zero)
            k = matrix(k_buf.index(W + zero))
            rows_of = ds_buf.index(W + zero).permute((1, 0))
            for piece in gl.static_range(2):
                columns = k.slice(piece * PIECE, PIECE, 1)
                dq = warpgroup_mma(rows_of, columns, dq_zero, use_acc=False, is_async=True)
                if piece == 1:  # runs while the last piece is staged
                    ds_operand = gl.convert_layout(ds, gl.DotOperandLayout(0, accumulator(HALF), 2))
                    dk = warpgroup_mma(ds_operand, q.slice(W * HALF, HALF, 1), dk, is_async=True)
                dq = warpgroup_mma_wait(piece, deps=[dq])
                bridge.barrier_sync(DQ_TAKEN + W, WARPGROUP + WARP)
                dq_buf.index(W).store(fragments(dq))
                fence_async_shared()
                bridge.barrier_arrive(DQ_STAGED + W, WARPGROUP + WARP)
            dk = warpgroup_mma_wait(0, deps=[dk])
            bridge.barrier_arrive(Q_READ + slot, 2 * WARPGROUP + WARP)
            count += 1
    bridge.barrier_sync(BOTH, 2 * WARPGROUP)
    if sums is None:
        send_keys(dk * terms[0], dv, (dk_desc, dv_desc), (k_buf.index(W), v_buf.index(W)), at_k, n0, W * HALF, kv_head)
    else:
        if place[2] == 0:  # this is for the GPU, the other for the compiler
            send_keys(
                dk * terms[0], dv, (dk_desc, dv_desc), (k_buf.index(W), v_buf.index(W)), at_k, n0, W * HALF, kv_head
            )
        else:
            store_sums(dk, dv, terms[0], sums, place, kv_head, 0, W * HALF, BLOCK_N, 2 * HALF)
    mbarrier.arrive(kv_empty.index(0))
    return count
