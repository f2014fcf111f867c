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
from hasten.ops.hopper.backward_tiles import (
    BOTH,
    DQ_STAGED,
    DQ_TAKEN,
    WARP,
    WARPGROUP,
    block_of,
    claim,
    end_turn,
    fragments,
    full_barriers,
    hide_keys,
    load_rows,
    probabilities,
    put,
    ring,
    store_rows,
    visits_of,
    wait_turn,
)
from hasten.ops.hopper.backward_wide import consume_wide, load_wide
from hasten.ops.hopper.cells import accumulator
from hasten.ops.hopper.visits import key_bounds, sequence

LENGTHS = ("num_tiles", "num_pairs", "pairs_at_once", "num_kv_heads", "seqlen_q", "seqlen_k", "num_blocks")


@gluon.jit
def load_blocks(
    descriptors, buffers, barriers, at_q, at_k, walk, rows_at,
    GROUP_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """One warp: load K and V, then Q, row statistics and dO of `AHEAD` blocks ahead of the consumers."""
    q_desc, k_desc, v_desc, dout_desc, stats_desc = descriptors
    q_buf, k_buf, v_buf, dout_buf, stats_buf = buffers
    kv_full, q_full, dout_full = barriers
    lists, place, kv_head, _band, _bounds, _lengths = walk
    n0 = place[1] * BLOCK_N
    kv_at = kv_full.index(0)
    mbarrier.expect(kv_at, 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for half in gl.static_range(2):
        load_rows(k_desc, at_k, n0 + half * (BLOCK_N // 2), 0, kv_head, kv_at, k_buf.index(half))
        load_rows(v_desc, at_k, n0 + half * (BLOCK_N // 2), 0, kv_head, kv_at, v_buf.index(half))
    count = 0
    for member in range(GROUP_SIZE):
        head = kv_head * GROUP_SIZE + member
        visits = visits_of(walk, head, BLOCK_M, BLOCK_N)
        for step in range(visits[1] + visits[5]):
            _, block = block_of(lists, visits, step)
            if count >= AHEAD:  # dQ of that block is written, so its dO has been read, and Q of the block before
                bridge.barrier_sync(DQ_STAGED, WARPGROUP + 2 * WARP)
                bridge.barrier_sync(DQ_STAGED + 1, WARPGROUP + 2 * WARP)
            q_slot, dout_slot = count % (AHEAD + 1), count % AHEAD
            q_at, dout_at = q_full.index(q_slot), dout_full.index(dout_slot)
            mbarrier.expect(q_at, q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
            load_rows(q_desc, at_q, block * BLOCK_M, 0, head, q_at, q_buf.index(q_slot))
            bridge.tma_load(stats_desc, [head * rows_at[1] + rows_at[0] + block, 0], q_at, stats_buf.index(q_slot))
            mbarrier.expect(dout_at, dout_desc.block_type.nbytes)
            load_rows(dout_desc, at_q, block * BLOCK_M, 0, head, dout_at, dout_buf.index(dout_slot))
            count += 1
    for _step in range(gl.minimum(count, AHEAD)):  # the barriers count this warp in every block
        bridge.barrier_sync(DQ_STAGED, WARPGROUP + 2 * WARP)
        bridge.barrier_sync(DQ_STAGED + 1, WARPGROUP + 2 * WARP)


@gluon.jit
def add_blocks(
    dq_desc, dq_buf, turns, walk, rows_at, GROUP_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    PIECES: gl.constexpr, COMERS: gl.constexpr,
):  # fmt: skip
    """One warp: add what the consumers stage of dQ to global memory, and hand the staging back.

    A warpgroup stages `PIECES` pieces a block, one after the other. COMERS: threads that meet at DQ_STAGED.
    """
    _lists, _place, kv_head, _band, _bounds, _lengths = walk
    PIECE: gl.constexpr = dq_desc.block_shape[0]
    bridge.barrier_arrive(DQ_TAKEN, WARPGROUP + WARP)
    bridge.barrier_arrive(DQ_TAKEN + 1, WARPGROUP + WARP)
    for member in range(GROUP_SIZE):
        head = kv_head * GROUP_SIZE + member
        visits = visits_of(walk, head, BLOCK_M, BLOCK_N)
        for step in range(visits[1] + visits[5]):
            _, block = block_of(walk[0], visits, step)
            number = head * rows_at[1] + rows_at[0] + block
            at = number * (2 * PIECES * PIECE)
            claimed = claim(turns + number)
            for piece in gl.static_range(PIECES):
                bridge.barrier_sync(DQ_STAGED, COMERS)
                if piece == 0:
                    is_first = wait_turn(turns + number, claimed)
                put(dq_desc, [at + piece * PIECE, 0], dq_buf.index(0), is_first)
                bridge.barrier_sync(DQ_STAGED + 1, COMERS)
                put(dq_desc, [at + (PIECES + piece) * PIECE, 0], dq_buf.index(1), is_first)
                bridge.tma_store_wait(1)
                bridge.barrier_arrive(DQ_TAKEN, WARPGROUP + WARP)
                bridge.tma_store_wait(0)
                bridge.barrier_arrive(DQ_TAKEN + 1, WARPGROUP + WARP)
            bridge.tma_store_wait_complete()
            end_turn(turns + number)


@gluon.jit
def consume_blocks(
    job, W: gl.constexpr, GROUP_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    AHEAD: gl.constexpr, MASKED: gl.constexpr, HIDDEN_KEYS: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: dK and dV of keys [64 W, 64 W + 64) of the tile, and its half of dQ of every block."""
    buffers, barriers, out_descs, at_k, walk, terms = job
    q_buf, k_buf, v_buf, dout_buf, stats_buf, ds_buf, dq_buf = buffers
    kv_full, q_full, dout_full = barriers
    dk_desc, dv_desc = out_descs
    D: gl.constexpr = k_buf.shape[-1]
    DV: gl.constexpr = v_buf.shape[-1]
    s_mma: gl.constexpr = accumulator(BLOCK_M)
    dk_mma: gl.constexpr = accumulator(D)
    dv_mma: gl.constexpr = accumulator(DV)
    DQ_N: gl.constexpr = D if BLOCK_M == 128 else D // 2
    dq_mma: gl.constexpr = accumulator(DQ_N)
    dtype: gl.constexpr = q_buf.dtype
    lists, place, kv_head, _band, bounds, _lengths = walk
    n0 = place[1] * BLOCK_N
    keys = n0 + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, s_mma))
    dk = gl.zeros([64, D], gl.float32, dk_mma)
    dv = gl.zeros([64, DV], gl.float32, dv_mma)
    s_zero = gl.zeros([64, BLOCK_M], gl.float32, s_mma)
    dq_zero = gl.zeros([64, DQ_N], gl.float32, dq_mma)
    mbarrier.wait(kv_full.index(0), 0)
    if HIDDEN_KEYS:
        hide_keys(k_buf.index(W).reshape([64, D]), v_buf.index(W).reshape([64, DV]), n0 + 64 * W, bounds, BLOCK_N)
    count = 0
    for member in range(GROUP_SIZE):
        head = kv_head * GROUP_SIZE + member
        visits = visits_of(walk, head, BLOCK_M, BLOCK_N)
        for step in range(visits[1] + visits[5]):
            entry, block = block_of(lists, visits, step)
            q_slot, dout_slot = count % (AHEAD + 1), count % AHEAD
            zero = count >> 30  # to the compiler a variable: it would keep the wgmma descriptors of K and V, and spill
            q = q_buf.index(q_slot).reshape([BLOCK_M, D])
            dout = dout_buf.index(dout_slot).reshape([BLOCK_M, DV])
            stats = stats_buf.index(q_slot).reshape([2 * BLOCK_M])
            mbarrier.wait(q_full.index(q_slot), (count // (AHEAD + 1)) & 1)
            k_own = k_buf.index(W + zero).reshape([64, D])
            v_own = v_buf.index(W + zero).reshape([64, DV])
            s = warpgroup_mma(k_own, q.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            mbarrier.wait(dout_full.index(dout_slot), (count // AHEAD) & 1)
            dp = warpgroup_mma(v_own, dout.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            p, slope = probabilities(
                s, stats, entry, step >= visits[1], keys, block * BLOCK_M, walk, terms,
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
            for part in gl.static_range(2):
                rows_of = ds_buf.index(ds_slot + part).permute((1, 0))
                keys_of = k_buf.index(part + zero).reshape([64, D])
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
    v_buf.index(W).reshape([64, DV]).store(dv.to(dtype))
    k_buf.index(W).reshape([64, D]).store((dk * terms[0]).to(dtype))
    fence_async_shared()
    store_rows(dv_desc, at_k, n0 + 64 * W, 0, kv_head, v_buf.index(W))
    store_rows(dk_desc, at_k, n0 + 64 * W, 0, kv_head, k_buf.index(W))
    bridge.tma_store_wait(0)


@gluon.jit(do_not_specialize=LENGTHS)
def attention_backward(
    q_desc, k_desc, v_desc, dout_desc, stats_desc, dq_desc, dk_desc, dv_desc,
    turns, cu_seqlens_q, cu_seqlens_k, key_range, lists, band, terms,
    num_tiles, num_pairs, pairs_at_once, num_kv_heads, seqlen_q, seqlen_k, num_blocks,
    GROUP_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, AHEAD: gl.constexpr, MASKED: gl.constexpr,
    ORDER: gl.constexpr,
):  # fmt: skip
    """dk and dv of keys [n0, n0 + BLOCK_N) of one K/V head, and what they add to dq of the heads of its group.

    stats_desc: (heads * blocks, 2 * BLOCK_M) lse in units of log2, +inf where a row sees nothing, and delta.
    dq_desc: (heads * blocks * 2 * PART, 64) float32, in the order of `fragments`; num_blocks a head.
    Programs go through `pairs_at_once` (sequence, K/V head) pairs together, the first tiles of all of them first.
    """
    program = gl.program_id(0)
    first_pair = program // (pairs_at_once * num_tiles) * pairs_at_once
    inside = program % (pairs_at_once * num_tiles)
    pairs = gl.minimum(pairs_at_once, num_pairs - first_pair)
    tile, pair = inside // pairs, first_pair + inside % pairs
    number, kv_head = pair // num_kv_heads, pair % num_kv_heads
    at_q = sequence(cu_seqlens_q, number, seqlen_q)
    at_k = sequence(cu_seqlens_k, number, seqlen_k)
    n0 = tile * BLOCK_N
    if n0 < at_k[2]:
        walk = (lists, (number, tile), kv_head, band, key_bounds(key_range, number, at_k[2]), (at_q[2], at_k[2]))
        first_block = number * gl.cdiv(seqlen_q, BLOCK_M)
        if cu_seqlens_q is not None:
            first_block = at_q[1] // BLOCK_M + number
        rows_at = (first_block, num_blocks)
        WIDE: gl.constexpr = BLOCK_N == 64
        q_buf, dout_buf, k_buf, v_buf = (
            ring(q_desc, AHEAD + 1),
            ring(dout_desc, AHEAD),
            ring(k_desc, 2),
            ring(v_desc, 2),
        )
        stats_buf, dq_buf = ring(stats_desc, AHEAD + 1), ring(dq_desc, 2)
        ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], q_desc.dtype)
        ds_buf = gl.allocate_shared_memory(q_desc.dtype, [2 if WIDE else 4, 64, BLOCK_M], ds_layout)
        barriers = (full_barriers(1), full_barriers(AHEAD + 1), full_barriers(AHEAD))
        fence_async_shared()
        buffers = (q_buf, k_buf, v_buf, dout_buf, stats_buf, ds_buf, dq_buf)
        job = (buffers, barriers, (dk_desc, dv_desc), at_k, walk, terms)
        loads = (q_desc, k_desc, v_desc, dout_desc, stats_desc)
        fills = (q_buf, k_buf, v_buf, dout_buf, stats_buf)
        HIDDEN: gl.constexpr = key_range is not None
        if WIDE:
            gl.warp_specialize(
                [
                    (consume_wide, (job, 0, GROUP_SIZE, BLOCK_M, BLOCK_N, MASKED, HIDDEN, ORDER)),
                    (consume_wide, (job, 1, GROUP_SIZE, BLOCK_M, BLOCK_N, MASKED, HIDDEN, ORDER)),
                    (load_wide, (loads, fills, barriers, at_q, at_k, walk, rows_at, GROUP_SIZE, BLOCK_M, BLOCK_N)),
                    (
                        add_blocks,
                        (dq_desc, dq_buf, turns, walk, rows_at, GROUP_SIZE, BLOCK_M, BLOCK_N, 2, WARPGROUP + WARP),
                    ),
                ],
                [4, 1, 1],
                [240, 24, 24],
            )
        else:
            comers: gl.constexpr = WARPGROUP + 2 * WARP
            gl.warp_specialize(
                [
                    (consume_blocks, (job, 0, GROUP_SIZE, BLOCK_M, BLOCK_N, AHEAD, MASKED, HIDDEN, ORDER)),
                    (consume_blocks, (job, 1, GROUP_SIZE, BLOCK_M, BLOCK_N, AHEAD, MASKED, HIDDEN, ORDER)),
                    (
                        load_blocks,
                        (loads, fills, barriers, at_q, at_k, walk, rows_at, GROUP_SIZE, BLOCK_M, BLOCK_N, AHEAD),
                    ),
                    (add_blocks, (dq_desc, dq_buf, turns, walk, rows_at, GROUP_SIZE, BLOCK_M, BLOCK_N, 1, comers)),
                ],
                [4, 1, 1],
                [240, 24, 24],
            )
