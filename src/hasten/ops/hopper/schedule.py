"""Which tile of rows a program computes next: the order of the items, and how one is taken and handed on.

An item is one tile of rows of one head of one sequence. They are numbered longest first inside groups of heads whose
keys and values fit in the L2 cache together; the producer takes the next number from a counter in global memory, so
that no table is made on the host and any mask is balanced. Consumers learn the item through shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hasten.ops.hopper.pieces import share_of
from hasten.ops.hopper.visits import key_bounds, key_visits, sequence

# sequences that one warp counts at a time
_CHUNK = gl.constexpr(128)


@gluon.jit
def _add(one, other):
    return one + other


@gluon.jit
def take(counter, num_programs):
    """The next item that nobody has; the first of a program is its own number."""
    return gl.atomic_add(counter, 1, sem="relaxed") + num_programs


@gluon.jit
def dense_place(item, num_tiles, num_heads, batch, heads_per_group, num_groups):
    """(sequence, head, rank of the tile) of an item where all sequences have one length; sequence -1 after the last.

    `num_groups` groups of `heads_per_group` heads come first, then one of all the others.
    """
    group = gl.minimum(item // (num_tiles * heads_per_group), num_groups)
    first = group * heads_per_group
    rest = item - first * num_tiles
    width = gl.where(group < num_groups, heads_per_group, num_heads * batch - first)
    width = gl.maximum(width, 1)
    both = first + rest % width
    number = gl.where(item < num_tiles * num_heads * batch, both // num_heads, -1)
    return number, both % num_heads, rest // width


@gluon.jit
def ranked_tile(lists, pieces, rank, num_tiles):
    """(tile of rows, share) of a rank: lists have their order, longest first; under a causal mask the last is longest.

    share: see `tiles.Pieces`, 0 for all of a tile. `num_tiles` counts pieces, if there are any.
    """
    tile, share = num_tiles - 1 - rank, 0
    if pieces is not None:
        own = pieces[0] + 2 * gl.minimum(rank, num_tiles - 1)
        tile, share = gl.load(own), gl.load(own + 1)
    elif lists is not None:
        tile = gl.load(lists[5] + gl.minimum(rank, num_tiles - 1))
    return tile, share


@gluon.jit
def packed_place(item, cu_seqlens, base, before, num_heads, batch, BLOCK_M: gl.constexpr):
    """(sequence, head, tile, base, before) of an item of packed sequences; sequence -1 after the last.

    The tiles of `_CHUNK` sequences from `base` on are counted at a time; `before` tiles lie ahead of them. Items of a
    program ascend, so each search goes on where the last one ended, and no table of tiles is needed.
    """
    layout: gl.constexpr = gl.BlockedLayout([_CHUNK // 32], [32], [1], [0])
    target, head = item // num_heads, item % num_heads
    number, tile, searching = -1, 0, base < batch
    while searching:
        sequences = base + gl.arange(0, _CHUNK, layout)
        inside = sequences < batch
        begin = gl.load(cu_seqlens + sequences, mask=inside, other=0)
        end = gl.load(cu_seqlens + sequences + 1, mask=inside, other=0)
        tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
        ends = before + gl.associative_scan(tiles, 0, _add)
        after = before + gl.sum(tiles, 0)
        searching = False
        if target < after:
            passed = ends <= target
            number = base + gl.sum(passed.to(gl.int32), 0)
            own_end = gl.min(gl.where(passed, after, ends), 0)
            tile = own_end - 1 - target
        elif base + _CHUNK < batch:
            base += _CHUNK
            before = after
            searching = True
    return number, head, tile, base, before


@gluon.jit
def item_visits(where, number, head, tile, share, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """What an item sees: (visits, (shift, first_key, end_key), (first row, length of q), (first key, batch of k))."""
    cu_seqlens_q, cu_seqlens_k, key_range, lists, band, seqlen_q, seqlen_k, list_strides, pieces, _ = where
    batch, row, length_q = sequence(cu_seqlens_q, number, seqlen_q)
    _, key, length_k = sequence(cu_seqlens_k, number, seqlen_k)
    first_key, end_key = key_bounds(key_range, number, length_k)
    shift, m0 = length_k - length_q, tile * BLOCK_M
    row_of_tiles = tile
    if lists is not None:
        row_of_tiles = number * list_strides[0] + head * list_strides[1] + tile
    m1 = gl.minimum(m0 + BLOCK_M, length_q)
    visits = key_visits(lists, row_of_tiles, m0, m1, shift, band[0], band[1], first_key, end_key, BLOCK_N)
    if pieces is not None:
        visits = share_of(visits, share)
    return visits, (shift, first_key, end_key), (batch, row, key, length_q)
