"""The producer warp of the forward: takes items, hands them to the consumers, loads Q, K and V by TMA."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from hasten.ops.hopper.bridge import FIRST_BARRIER, barrier_sync, partition_barrier, tma_load
from hasten.ops.hopper.schedule import dense_place, item_visits, packed_place, ranked_tile, take
from hasten.ops.hopper.visits import partial_entry, visited


@gluon.jit
def _hand_over(q_desc, shared, turn, number, head, tile, share, batch, row, options: gl.constexpr):
    """Tell the consumers their next item and load its Q, as soon as a stage of Q is free."""
    q_smem, _k, _v, slots, q_full, q_empty, _k_full, _v_full = shared
    CONSUMERS: gl.constexpr = options[2]
    Q_STAGES: gl.constexpr = options[4]
    stage = turn % Q_STAGES
    mbarrier.wait(q_empty.index(stage), ((turn // Q_STAGES) & 1) ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slots.index(3 * stage).store(gl.full([1], number, gl.int32, layout))
    slots.index(3 * stage + 1).store(gl.full([1], head, gl.int32, layout))
    slots.index(3 * stage + 2).store(gl.full([1], tile, gl.int32, layout))
    if slots.shape[0] > 3 * Q_STAGES:
        slots.index(3 * Q_STAGES + stage).store(gl.full([1], share, gl.int32, layout))
    partition_barrier()
    full = q_full.index(stage)
    if number < 0:
        mbarrier.arrive(full)
    else:
        mbarrier.expect(full, CONSUMERS * q_desc.block_type.nbytes)
        for consumer in gl.static_range(CONSUMERS):
            rows = row + (tile * CONSUMERS + consumer) * 64
            tma_load(q_desc, [batch, head, rows, 0], full, q_smem.index(stage * CONSUMERS + consumer))


@gluon.jit
def _next_place(item, base, before, where, order, options: gl.constexpr):
    """(sequence, head, tile, share of it, base, before) of an item, in either layout."""
    num_tiles, num_heads, num_sequences, heads_per_group, num_groups, _group_size = order
    if where[0] is None:
        number, head, rank = dense_place(item, num_tiles, num_heads, num_sequences, heads_per_group, num_groups)
        tile, share = ranked_tile(where[3], where[8], rank, num_tiles)
        return number, head, tile, share, base, before
    else:
        number, head, tile, base, before = packed_place(
            item, where[0], base, before, num_heads, num_sequences, 64 * options[2]
        )
        return number, head, tile, 0, base, before


@gluon.jit
def produce(descriptors, shared, where, counter, order, options: gl.constexpr):
    """Take items until there are none, and load what they need.

    The next item is taken and placed, about 2,000 cycles of latency, when the first two tiles of this one are loaded.
    """
    q_desc, k_desc, v_desc = descriptors
    _q, k_smem, v_smem, _slots, _q_full, _q_empty, k_full, v_full = shared
    BLOCK_N: gl.constexpr = options[0]
    STAGES: gl.constexpr = options[3]
    THREADS: gl.constexpr = 128 * options[2] + 32
    lists, group_size = where[3], order[5]
    turn, fill, base, before = 0, 0, 0, 0
    number, head, tile, share, base, before = _next_place(gl.program_id(0), base, before, where, order, options)
    while number >= 0:
        visits, _, place = item_visits(where, number, head, tile, share, 64 * options[2], BLOCK_N)
        batch, row, key, _ = place
        num_visits = visits[1] + visits[5]
        next_number, next_head, next_tile, next_share = -1, 0, 0, 0
        if num_visits == 0:
            _hand_over(q_desc, shared, turn, number, head, tile, share, batch, row, options)
        for step in range(0, gl.maximum(num_visits, 1)):
            if num_visits > 0:
                entry = gl.where(step < visits[5], partial_entry(visits, step), visits[0] + step - visits[5])
                at = [batch, head // group_size, key + visited(lists, entry) * BLOCK_N, 0]
                stage = fill % STAGES
                barrier_sync(FIRST_BARRIER + stage, THREADS)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma_load(k_desc, at, k_full.index(stage), k_smem.index(stage))
                if step == 0:  # after K, which is free before the Q of the item before
                    _hand_over(q_desc, shared, turn, number, head, tile, share, batch, row, options)
                barrier_sync(FIRST_BARRIER + STAGES + stage, THREADS)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                tma_load(v_desc, at, v_full.index(stage), v_smem.index(stage))
                fill += 1
            if step == gl.maximum(gl.minimum(num_visits - 1, 1), 0):
                item = take(counter, gl.num_programs(0))
                next_number, next_head, next_tile, next_share, base, before = _next_place(
                    item, base, before, where, order, options
                )
        number, head, tile, share = next_number, next_head, next_tile, next_share
        turn += 1
    _hand_over(q_desc, shared, turn, number, 0, 0, 0, 0, 0, options)
    for stage in gl.static_range(2 * STAGES):  # leave no named barrier half full
        barrier_sync(FIRST_BARRIER + stage, THREADS)
