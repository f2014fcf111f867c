"""Which tile of keys a program of the backward works on next, and how its partitions learn of it.

An item is one tile of keys of one K/V head of one sequence. A group of pairs of sequence and head is worked on
together, the first tiles of all of them first, which under a causal mask are the longest (lists have their order, but
in a deterministic call, which needs tiles that ascend); one last group has the rest.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from hasten.ops.hopper.visits import key_bounds, sequence


@gluon.jit
def find(item, problem, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(rows of q, rows of k, (sequence, tile, share of it), K/V head, real keys, (first block of rows, blocks a head)).

    problem: (cu_seqlens_q, cu_seqlens_k, key range, lists, band, (tiles, pairs, pairs of a group, groups, K/V heads),
    (seqlen_q, seqlen_k), blocks of rows a head, lists along rows, tiles as ranked, pieces). Rows: (batch, first row,
    length). share: see `tiles.Pieces`; `ranked` holds items then, and `tiles` counts them.
    """
    cu_seqlens_q, cu_seqlens_k, key_range, _lists, _band, order, lengths, num_blocks, _rows, ranked, pieces = problem
    num_tiles, num_pairs, pairs_of_group, num_groups, num_kv_heads = order
    group = gl.minimum(item // (pairs_of_group * num_tiles), num_groups)
    first_pair = group * pairs_of_group
    pairs = gl.maximum(gl.where(group < num_groups, pairs_of_group, num_pairs - first_pair), 1)
    inside = item - first_pair * num_tiles
    tile, pair = inside // pairs, first_pair + inside % pairs
    share = 0
    if pieces is not None:
        own = ranked + 2 * tile
        tile, share = gl.load(own), gl.load(own + 1)
    elif ranked is not None:
        tile = gl.load(ranked + tile)
    number, kv_head = pair // num_kv_heads, pair % num_kv_heads
    at_q = sequence(cu_seqlens_q, number, lengths[0])
    at_k = sequence(cu_seqlens_k, number, lengths[1])
    first_block = number * gl.cdiv(lengths[0], BLOCK_M)
    if cu_seqlens_q is not None:
        first_block = at_q[1] // BLOCK_M + number
    place, bounds = (number, tile, share), key_bounds(key_range, number, at_k[2])
    return at_q, at_k, place, kv_head, bounds, (first_block, num_blocks)


@gluon.jit
def make_slots():
    """(items (2, 1), mbarriers that an item is there, mbarriers that all have read it): two items on their way."""
    items = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(full.index(slot), 1)
        mbarrier.init(empty.index(slot), 3)  # two warpgroups and the warp that adds dQ
    return items, full, empty


@gluon.jit
def tell(slots, turn, item):
    """The warp that loads: hand `item` to the other partitions, as their `turn`-th after the first."""
    items, full, empty = slots
    slot = turn & 1
    mbarrier.wait(empty.index(slot), ((turn >> 1) & 1) ^ 1)
    items.index(slot).store(gl.full([1], item, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(full.index(slot))


@gluon.jit
def hear(slots, turn, WARPS: gl.constexpr):
    """Another partition: the `turn`-th item after the first, -1 after the last."""
    items, full, empty = slots
    slot = turn & 1
    mbarrier.wait(full.index(slot), (turn >> 1) & 1)
    item = gl.max(items.index(slot).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    mbarrier.arrive(empty.index(slot))
    return item
