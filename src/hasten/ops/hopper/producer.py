"""The producer warp of the forward: takes items, hands them to the consumers, loads Q, K and V by TMA."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from hasten.ops.hopper.bridge import FIRST_BARRIER, barrier_sync, partition_barrier, tma_load
from hasten.ops.hopper.cells import map_of
from hasten.ops.hopper.schedule import dense_place, first_lane, item_visits, packed_place, ranked_tile, take
from hasten.ops.hopper.visits import partial_entry, visited


@gluon.jit
def _hand_over(q_desc, shared, turn, item, at, listed, options: gl.constexpr):
    """Tell the consumers their next item and load its Q, as soon as a stage of Q is free.

    item: (sequence, head, tile, share); at: (batch, first row). listed: None, or the visits and the first bit map,
    which consumers would have to wait for.
    """
    q_smem, _k, _v, slots, q_full, q_empty, _k_full, _v_full = shared
    CONSUMERS: gl.constexpr = options[2]
    Q_STAGES: gl.constexpr = options[4]
    WORDS: gl.constexpr = slots.shape[0] // Q_STAGES
    stage = turn % Q_STAGES
    mbarrier.wait(q_empty.index(stage), ((turn // Q_STAGES) & 1) ^ 1)
    number, head, tile, _share = item
    for word in gl.static_range(4):
        _tell(slots, WORDS * stage + word, item[word])
    if listed is not None:
        for word in gl.static_range(5):
            _tell(slots, WORDS * stage + 4 + word, listed[word])
    partition_barrier()
    full = q_full.index(stage)
    if number < 0:
        mbarrier.arrive(full)
    else:
        mbarrier.expect(full, CONSUMERS * q_desc.block_type.nbytes)
        for consumer in gl.static_range(CONSUMERS):
            rows = at[1] + (tile * CONSUMERS + consumer) * 64
            tma_load(q_desc, [at[0], head, rows, 0], full, q_smem.index(stage * CONSUMERS + consumer))


@gluon.jit
def _tell(slots, slot, value):
    slots.index(slot).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


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
def _tile_of(lists, visits, step):
    """The tile of keys of a step through `visits`: the partial ones come first."""
    entry = gl.where(step < visits[5], partial_entry(visits, step), visits[0] + step - visits[5])
    return visited(lists, entry, visits[1] + visits[5] > 0)


@gluon.jit
def produce(descriptors, shared, where, counter, order, options: gl.constexpr):
    """Take items until there are none, and load what they need.

    To take the next item, place it and look up what it sees are four reads of global memory, each about 600 cycles
    and each needing the one before: one of them begins beside each tile of this item, from the second tile on.
    """
    q_desc, k_desc, v_desc = descriptors
    _q, k_smem, v_smem, _slots, _q_full, _q_empty, k_full, v_full = shared
    BLOCK_N: gl.constexpr = options[0]
    BLOCK_M: gl.constexpr = 64 * options[2]
    STAGES: gl.constexpr = options[3]
    THREADS: gl.constexpr = 128 * options[2] + 32
    lists, group_size = where[3], order[5]
    turn, fill, base, before = 0, 0, 0, 0
    number, head, tile, share, base, before = _next_place(gl.program_id(0), base, before, where, order, options)
    visits, _bounds, place = item_visits(where, number, head, tile, share, BLOCK_M, BLOCK_N)
    tile_k, bits = _tile_of(lists, visits, 0), map_of(lists, visits, 0)
    claimed = take(counter, False)
    while number >= 0:
        batch, row, key, _ = place
        num_visits = visits[1] + visits[5]
        last = gl.maximum(num_visits - 1, 0)
        item, at_q = (number, head, tile, share), (batch, row)
        listed = None if lists is None else (visits[0], visits[1], visits[4], visits[5], bits)
        next_number, next_head, next_tile, next_share = number, head, tile, share
        next_visits, next_place, next_tile_k, next_bits = visits, place, tile_k, bits
        if num_visits == 0:
            _hand_over(q_desc, shared, turn, item, at_q, listed, options)
        for step in range(0, last + 1):
            if num_visits > 0:
                at = [batch, head // group_size, key + tile_k * BLOCK_N, 0]
                tile_k = _tile_of(lists, visits, gl.minimum(step + 1, last))
                stage = fill % STAGES
                barrier_sync(FIRST_BARRIER + stage, THREADS)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma_load(k_desc, at, k_full.index(stage), k_smem.index(stage))
                if step == 0:  # after K, which is free before the Q of the item before
                    _hand_over(q_desc, shared, turn, item, at_q, listed, options)
                barrier_sync(FIRST_BARRIER + STAGES + stage, THREADS)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                tma_load(v_desc, at, v_full.index(stage), v_smem.index(stage))
                fill += 1
            if step == gl.minimum(last, 1):
                claimed = take(counter, True)
            if step == gl.minimum(last, 2):
                next_item = first_lane(claimed) + gl.num_programs(0)
                next_number, next_head, next_tile, next_share, base, before = _next_place(
                    next_item, base, before, where, order, options
                )
            if step == gl.minimum(last, 3):
                next_visits, _bounds, next_place = item_visits(
                    where, next_number, next_head, next_tile, next_share, BLOCK_M, BLOCK_N
                )
            if step == gl.minimum(last, 4):
                next_tile_k, next_bits = _tile_of(lists, next_visits, 0), map_of(lists, next_visits, 0)
        number, head, tile, share = next_number, next_head, next_tile, next_share
        visits, place, tile_k, bits = next_visits, next_place, next_tile_k, next_bits
        turn += 1
    listed = None if lists is None else (0, 0, 0, 0, 0)
    _hand_over(q_desc, shared, turn, (number, 0, 0, 0), (0, 0), listed, options)
    for stage in gl.static_range(2 * STAGES):  # leave no named barrier half full
        barrier_sync(FIRST_BARRIER + stage, THREADS)
