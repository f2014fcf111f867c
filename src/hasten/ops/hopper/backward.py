"""Backward kernel for Hopper: dK and dV of a tile of keys in registers, dQ added up in global memory.

FlashAttention-2 (arXiv 2307.08691), algorithm 2, with five matrix products a tile. One warp loads by TMA, one adds dQ
by TMA, two warpgroups own 64 keys each. Who waits for whom: docs/design/hopper-backward.md.
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
from hasten.ops.hopper.backward_schedule import find, hear, make_slots, tell
from hasten.ops.hopper.backward_tiles import (
    BOTH,
    DQ_STAGED,
    DQ_TAKEN,
    WARP,
    WARPGROUP,
    block_of,
    claim,
    end_turn,
    first_lane,
    fragments,
    hide_keys,
    load_keys,
    load_rows,
    make_barriers,
    probabilities,
    put,
    send_keys,
    take,
    visits_of,
    wait_rank,
    wait_turn,
)
from hasten.ops.hopper.backward_wide import consume_wide, load_wide
from hasten.ops.hopper.cells import accumulator
from hasten.ops.hopper.pieces import store_sums
from hasten.ops.hopper.rings import matrix, ring

# numbers for which a kernel compiled for "1" or "a multiple of 16" gains nothing and costs seconds
LENGTHS = (
    "lists", "rows", "band", "terms", "num_tiles", "num_pairs", "pairs_of_group", "num_groups", "num_kv_heads",
    "seqlen_q", "seqlen_k", "num_blocks", "group_size", "num_slots",
)  # fmt: skip


@gluon.jit
def wait_staged():
    """The warp that loads: dQ of one more block is staged, so its dO has been read, and Q of the block before."""
    bridge.barrier_sync(DQ_STAGED, WARPGROUP + 2 * WARP)
    bridge.barrier_sync(DQ_STAGED + 1, WARPGROUP + 2 * WARP)


@gluon.jit
def load_tiles(
    descriptors, buffers, barriers, slots, problem, counter,
    group_size, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, AHEAD: gl.constexpr,
    ORDERED: gl.constexpr,
):  # fmt: skip
    """One warp: of every item K and V, then Q, row statistics and dO, `AHEAD` blocks ahead of the consumers."""
    q_desc, k_desc, v_desc, dout_desc, stats_desc = descriptors
    q_buf, k_buf, v_buf, dout_buf, stats_buf = buffers
    kv_full, kv_empty, q_full, dout_full = barriers
    kv_descs, kv_bufs, kv_barriers = (k_desc, v_desc), (k_buf, v_buf), (kv_full, kv_empty)
    item, turn, tiles, count = gl.program_id(0), 0, 0, 0
    while item >= 0:
        at_q, at_k, place, kv_head, bounds, rows_at = find(item, problem, BLOCK_M, BLOCK_N)
        walk = (problem[3], place, kv_head, problem[4], bounds, (at_q[2], at_k[2]))
        n0, begin = place[1] * BLOCK_N, count
        if n0 < at_k[2]:
            for member in range(group_size):
                head = kv_head * group_size + member
                visits = visits_of(walk, head, BLOCK_M, BLOCK_N)
                for step in range(visits[1] + visits[5]):
                    _, block, _ = block_of(problem[3], visits, step, ORDERED)
                    if count - begin >= AHEAD:
                        wait_staged()
                    q_slot, dout_slot = count % (AHEAD + 1), count % AHEAD
                    q_at, dout_at = q_full.index(q_slot), dout_full.index(dout_slot)
                    mbarrier.expect(q_at, q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
                    load_rows(q_desc, at_q, block * BLOCK_M, 0, head, q_at, q_buf.index(q_slot))
                    stats_row = head * rows_at[1] + rows_at[0] + block
                    bridge.tma_load(stats_desc, [stats_row, 0], q_at, stats_buf.index(q_slot))
                    mbarrier.expect(dout_at, dout_desc.block_type.nbytes)
                    load_rows(dout_desc, at_q, block * BLOCK_M, 0, head, dout_at, dout_buf.index(dout_slot))
                    if count == begin:  # while the consumers still store the last tile
                        load_keys(kv_descs, kv_bufs, kv_barriers, at_k, n0, kv_head, tiles, 64, 0)
                    count += 1
            if count == begin:
                load_keys(kv_descs, kv_bufs, kv_barriers, at_k, n0, kv_head, tiles, 64, 0)
            tiles += 1
        following = take(counter)  # not earlier: a long item must not wait behind another one while programs are idle
        if n0 < at_k[2]:
            for _step in range(gl.minimum(count - begin, AHEAD)):  # the barriers count this warp in every block
                wait_staged()
        number = first_lane(following) + gl.num_programs(0)
        item = gl.where(number < problem[5][0] * problem[5][1], number, -1)
        tell(slots, turn, item)
        turn += 1


@gluon.jit
def load_items(
    descriptors, buffers, barriers, slots, problem, counter,
    group_size, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, AHEAD: gl.constexpr,
    ORDERED: gl.constexpr,
):  # fmt: skip
    """The warp that loads, for either kind of tile."""
    if BLOCK_N == 64:
        load_wide(descriptors, buffers, barriers, slots, problem, counter, group_size, BLOCK_M, BLOCK_N, ORDERED)
    else:
        load_tiles(
            descriptors, buffers, barriers, slots, problem, counter, group_size, BLOCK_M, BLOCK_N, AHEAD, ORDERED
        )


@gluon.jit
def add_tiles(
    dq_desc, dq_buf, turns, slots, problem, group_size, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    PIECES: gl.constexpr, COMERS: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """One warp: add what the consumers stage of dQ to global memory, and hand the staging back.

    A warpgroup stages `PIECES` pieces a block, one after the other. COMERS: threads that meet at DQ_STAGED.
    """
    PIECE: gl.constexpr = dq_desc.block_shape[0]
    item, turn = gl.program_id(0), 0
    bridge.barrier_arrive(DQ_TAKEN, WARPGROUP + WARP)
    bridge.barrier_arrive(DQ_TAKEN + 1, WARPGROUP + WARP)
    while item >= 0:
        at_q, at_k, place, kv_head, bounds, rows_at = find(item, problem, BLOCK_M, BLOCK_N)
        walk = (problem[3], place, kv_head, problem[4], bounds, (at_q[2], at_k[2]))
        if place[1] * BLOCK_N < at_k[2]:
            for member in range(group_size):
                head = kv_head * group_size + member
                visits = visits_of(walk, head, BLOCK_M, BLOCK_N)
                for step in range(visits[1] + visits[5]):
                    _, block, _ = block_of(problem[3], visits, step, ORDERED)
                    number = head * rows_at[1] + rows_at[0] + block
                    at = number * (2 * PIECES * PIECE)
                    if ORDERED:
                        is_first = wait_rank(turns + number, block, head, walk, problem[8], BLOCK_M, BLOCK_N)
                    else:
                        claimed = claim(turns + number)
                    for piece in gl.static_range(PIECES):
                        bridge.barrier_sync(DQ_STAGED, COMERS)
                        if piece == 0:  # noqa: SIM102  # the compiler wants them apart
                            if not ORDERED:
                                is_first = wait_turn(turns + number, claimed)
                        put(dq_desc, [at + piece * PIECE, 0], dq_buf.index(0), is_first)
                        bridge.barrier_sync(DQ_STAGED + 1, COMERS)
                        put(dq_desc, [at + (PIECES + piece) * PIECE, 0], dq_buf.index(1), is_first)
                        bridge.tma_store_wait(1)
                        bridge.barrier_arrive(DQ_TAKEN, WARPGROUP + WARP)
                        bridge.tma_store_wait(0)
                        bridge.barrier_arrive(DQ_TAKEN + 1, WARPGROUP + WARP)
                    if ORDERED or is_first:  # the others wait for it: 3 us a block, which only these have to spend
                        bridge.tma_store_wait_complete()
                        end_turn(turns + number)
        item = hear(slots, turn, 1)
        turn += 1


@gluon.jit
def consume_tile(
    job, at_k, walk, tiles, count, W: gl.constexpr, group_size, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, AHEAD: gl.constexpr, MASKED: gl.constexpr, HIDDEN_KEYS: gl.constexpr, ORDER: gl.constexpr,
    ORDERED: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: dK and dV of keys [64 W, 64 W + 64) of the tile, and its half of dQ of every block.

    tiles, count: how many tiles and blocks this program has seen before. Returns the new count.
    """
    buffers, barriers, out_descs, terms = job
    q_buf, k_buf, v_buf, dout_buf, stats_buf, ds_buf, dq_buf = buffers
    kv_full, kv_empty, q_full, dout_full = barriers
    dk_desc, dv_desc, sums = out_descs
    D: gl.constexpr = k_buf.shape[-1]
    DV: gl.constexpr = v_buf.shape[-1]
    s_mma: gl.constexpr = accumulator(BLOCK_M)
    dk_mma: gl.constexpr = accumulator(D)
    dv_mma: gl.constexpr = accumulator(DV)
    DQ_N: gl.constexpr = D if BLOCK_M == 128 else D // 2
    dq_mma: gl.constexpr = accumulator(DQ_N)
    dtype: gl.constexpr = q_buf.dtype
    lists, place, kv_head, _band, _bounds, _lengths = walk
    n0 = place[1] * BLOCK_N
    keys = n0 + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, s_mma))
    dk = gl.zeros([64, D], gl.float32, dk_mma)
    dv = gl.zeros([64, DV], gl.float32, dv_mma)
    s_zero = gl.zeros([64, BLOCK_M], gl.float32, s_mma)
    dq_zero = gl.zeros([64, DQ_N], gl.float32, dq_mma)
    mbarrier.wait(kv_full.index(0), tiles & 1)
    if HIDDEN_KEYS:
        hide_keys(matrix(k_buf.index(W)), matrix(v_buf.index(W)), walk, group_size, 2 * W, BLOCK_N)
    for member in range(group_size):
        head = kv_head * group_size + member
        visits = visits_of(walk, head, BLOCK_M, BLOCK_N)
        for step in range(visits[1] + visits[5]):
            entry, block, is_partial = block_of(lists, visits, step, ORDERED)
            q_slot, dout_slot = count % (AHEAD + 1), count % AHEAD
            zero = count >> 30  # to the compiler a variable: it would keep the wgmma descriptors of K and V, and spill
            q = matrix(q_buf.index(q_slot))
            stats = stats_buf.index(q_slot).reshape([2 * BLOCK_M])
            mbarrier.wait(q_full.index(q_slot), (count // (AHEAD + 1)) & 1)
            k_own = matrix(k_buf.index(W + zero))
            s = warpgroup_mma(k_own, q.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            mbarrier.wait(dout_full.index(dout_slot), (count // AHEAD) & 1)
            zero, dout_slot = bridge.here(zero), bridge.here(dout_slot)
            v_own, dout = matrix(v_buf.index(W + zero)), matrix(dout_buf.index(dout_slot))
            dp = warpgroup_mma(v_own, dout.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            p, slope = probabilities(
                s, stats, entry, is_partial, keys, block * BLOCK_M, walk, terms,
                2 * W, BLOCK_M, BLOCK_N, MASKED,
            )  # fmt: skip
            p_operand = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, dv_mma, 2))
            if ORDER == 1:
                dv = warpgroup_mma(p_operand, dout, dv, is_async=True)
            delta = stats.slice(BLOCK_M, BLOCK_M).load(gl.SliceLayout(0, s_mma))
            dp = warpgroup_mma_wait(ORDER, deps=[dp])
            ds = slope * (dp - delta[None, :])
            if ORDER == 0:
                dv = warpgroup_mma(p_operand, dout, dv, is_async=True)
            ds = ds.to(dtype)
            ds_slot = (count & 1) * 2
            ds_buf.index(ds_slot + W).store(ds)
            fence_async_shared()
            bridge.barrier_sync(BOTH, 2 * WARPGROUP)
            dq = dq_zero
            zero = bridge.here(zero)
            for part in gl.static_range(2):
                rows_of = ds_buf.index(ds_slot + part).permute((1, 0))
                keys_of = matrix(k_buf.index(part + zero))
                if BLOCK_M == 128:
                    rows_of = rows_of.slice(64 * W, 64, 0)
                else:
                    keys_of = keys_of.slice(DQ_N * W, DQ_N, 1)
                dq = warpgroup_mma(rows_of, keys_of, dq, use_acc=part > 0, is_async=True)
            ds_operand = gl.convert_layout(ds, gl.DotOperandLayout(0, dk_mma, 2))
            dk = warpgroup_mma(ds_operand, q, dk, is_async=True)
            dv, dq = warpgroup_mma_wait(1, deps=[dv, dq])
            bridge.barrier_sync(DQ_TAKEN + W, WARPGROUP + WARP)
            dq_buf.index(W).store(fragments(dq))
            fence_async_shared()
            bridge.barrier_arrive(DQ_STAGED + W, WARPGROUP + 2 * WARP)
            dk = warpgroup_mma_wait(0, deps=[dk])
            count += 1
    bridge.barrier_sync(BOTH, 2 * WARPGROUP)  # both have read K
    if sums is None:
        send_keys(
            dk * terms[0], dv, (dk_desc, dv_desc), (k_buf.index(W), v_buf.index(W)), at_k, n0 + 64 * W, 0, kv_head
        )
    else:
        if place[2] == 0:  # this is for the GPU, the other for the compiler
            send_keys(
                dk * terms[0], dv, (dk_desc, dv_desc), (k_buf.index(W), v_buf.index(W)), at_k, n0 + 64 * W, 0, kv_head
            )
        else:
            store_sums(dk, dv, terms[0], sums, place, kv_head, 64 * W, 0, BLOCK_N, D)
    mbarrier.arrive(kv_empty.index(0))
    return count


@gluon.jit
def consume_tiles(
    job, slots, problem, W: gl.constexpr, group_size, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    AHEAD: gl.constexpr, MASKED: gl.constexpr, HIDDEN_KEYS: gl.constexpr, ORDER: gl.constexpr,
    ORDERED: gl.constexpr,
):  # fmt: skip
    """Warpgroup W through all items of the program."""
    item, turn, tiles, count = gl.program_id(0), 0, 0, 0
    while item >= 0:
        at_q, at_k, place, kv_head, bounds, _rows_at = find(item, problem, BLOCK_M, BLOCK_N)
        walk = (problem[3], place, kv_head, problem[4], bounds, (at_q[2], at_k[2]))
        if place[1] * BLOCK_N < at_k[2]:
            if BLOCK_N == 64:
                count = consume_wide(
                    job, at_k, walk, tiles, count, W, group_size, BLOCK_M, BLOCK_N, MASKED, HIDDEN_KEYS, ORDER, ORDERED
                )
            else:
                count = consume_tile(
                    job,
                    at_k,
                    walk,
                    tiles,
                    count,
                    W,
                    group_size,
                    BLOCK_M,
                    BLOCK_N,
                    AHEAD,
                    MASKED,
                    HIDDEN_KEYS,
                    ORDER,
                    ORDERED,
                )
            tiles += 1
        item = hear(slots, turn, 4)
        turn += 1


@gluon.jit(do_not_specialize=LENGTHS)
def attention_backward(
    q_desc, k_desc, v_desc, dout_desc, stats_desc, dq_desc, dk_desc, dv_desc,
    turns, counter, cu_seqlens_q, cu_seqlens_k, key_range, lists, rows, ranked, pieces, band, terms,
    num_tiles, num_pairs, pairs_of_group, num_groups, num_kv_heads, seqlen_q, seqlen_k, num_blocks, group_size,
    num_slots, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, AHEAD: gl.constexpr, MASKED: gl.constexpr,
    ORDER: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """dk and dv of tiles of BLOCK_N keys of one K/V head, and what they add to dq of the heads of its group.

    stats_desc: (heads * blocks, 2 * BLOCK_M) lse in units of log2, +inf where a row sees nothing, and delta.
    dq_desc: float32 (heads * blocks * BLOCK_M * D / 64, 64), in the order of `fragments`; num_blocks a head.
    ranked: int32 (num_tiles,), the order in which tiles are taken, or None for ascending ones. pieces: None, or float32
    (pairs, num_slots, BLOCK_N, D) for dk and for dv of long columns of tiles; num_tiles items are ranked then.
    turns: int32 (heads * blocks), counter: int32 (1,), both 0. Persistent: one program for each multiprocessor.
    """
    order = (num_tiles, num_pairs, pairs_of_group, num_groups, num_kv_heads)
    lengths = (seqlen_q, seqlen_k)
    problem = (cu_seqlens_q, cu_seqlens_k, key_range, lists, band, order, lengths, num_blocks, rows, ranked, pieces)
    if pieces is None:
        outs = (dk_desc, dv_desc, pieces)
    else:
        outs = (dk_desc, dv_desc, (pieces[0], pieces[1], num_slots, num_kv_heads))  # type: ignore[assignment]
    WIDE: gl.constexpr = BLOCK_N == 64
    q_buf, dout_buf, k_buf, v_buf = ring(q_desc, AHEAD + 1), ring(dout_desc, AHEAD), ring(k_desc, 2), ring(v_desc, 2)
    stats_buf, dq_buf = ring(stats_desc, AHEAD + 1), ring(dq_desc, 2)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], q_desc.dtype)
    ds_buf = gl.allocate_shared_memory(q_desc.dtype, [2 if WIDE else 4, 64, BLOCK_M], ds_layout)
    barriers = (make_barriers(1, 1), make_barriers(1, 2), make_barriers(AHEAD + 1, 1), make_barriers(AHEAD, 1))
    slots = make_slots()
    fence_async_shared()
    job = ((q_buf, k_buf, v_buf, dout_buf, stats_buf, ds_buf, dq_buf), barriers, outs, terms)
    loads = (q_desc, k_desc, v_desc, dout_desc, stats_desc)
    fills = (q_buf, k_buf, v_buf, dout_buf, stats_buf)
    HIDDEN: gl.constexpr = (key_range is not None) | (lists is not None)
    PIECES: gl.constexpr = 2 if WIDE else 1
    COMERS: gl.constexpr = WARPGROUP + WARP if WIDE else WARPGROUP + 2 * WARP
    gl.warp_specialize(
        [
            (
                consume_tiles,
                (job, slots, problem, 0, group_size, BLOCK_M, BLOCK_N, AHEAD, MASKED, HIDDEN, ORDER, ORDERED),
            ),
            (
                consume_tiles,
                (job, slots, problem, 1, group_size, BLOCK_M, BLOCK_N, AHEAD, MASKED, HIDDEN, ORDER, ORDERED),
            ),
            (
                load_items,
                (loads, fills, barriers, slots, problem, counter, group_size, BLOCK_M, BLOCK_N, AHEAD, ORDERED),
            ),
            (
                add_tiles,
                (dq_desc, dq_buf, turns, slots, problem, group_size, BLOCK_M, BLOCK_N, PIECES, COMERS, ORDERED),
            ),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
