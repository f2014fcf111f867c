"""Which tile of rows a program computes next: the order of the items, and how one is taken and handed on.

An item is one tile of rows of one head of one sequence. They are numbered longest first inside groups of heads whose
keys and values fit in the L2 cache together; the producer takes the next number from a counter in global memory, so
that no table is made on the host and any mask is balanced. Consumers learn the item through shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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
def dense_place(item, num_tiles, num_heads, batch, heads_per_group):
    """(sequence, head, tile) of an item where all sequences have one length; sequence -1 after the last."""
    group = item // (num_tiles * heads_per_group)
    first = group * heads_per_group
    rest = item - first * num_tiles
    width = gl.maximum(gl.minimum(heads_per_group, num_heads * batch - first), 1)
    both = first + rest % width
    number = gl.where(item < num_tiles * num_heads * batch, both // num_heads, -1)
    return number, both % num_heads, num_tiles - 1 - rest // width


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
