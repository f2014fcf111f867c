"""What the backward kernels of Hopper share: where a tile lies, which cells it has, what a score becomes.

Tiles of scores are transposed, (64 keys, BLOCK_M rows), so that probabilities and their gradients are operands of dV
and dK as they stand in registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from hasten.ops.hopper import bridge
from hasten.ops.hopper.cells import LOG2E, accumulator, hide_values, keys_word, tanh
from hasten.ops.hopper.pieces import share_of
from hasten.ops.hopper.rings import matrix
from hasten.ops.hopper.visits import partial_entry, query_visits, visited

WARPGROUP = gl.constexpr(128)
WARP = gl.constexpr(32)
# Named barriers. Narrow: dS of both warpgroups is written. Wide: K and V are as they should be, or have been read.
BOTH = gl.constexpr(8)
# dQ of warpgroup w is staged (+ w); its staging is free again (+ w)
DQ_STAGED = gl.constexpr(9)
DQ_TAKEN = gl.constexpr(11)
# Wide: dO has been read; Q has been read in slot 0 or 1 (+ slot)
DOUT_READ = gl.constexpr(13)
Q_READ = gl.constexpr(14)


@gluon.jit
def make_barriers(SLOTS: gl.constexpr, COMERS: gl.constexpr):
    """mbarriers (SLOTS, 1), each for COMERS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), COMERS)
    return barriers


@gluon.jit
def load_rows(descriptor, at, row, column, head, barrier, buffer):
    """TMA of rows [row, row + box) of one head of a sequence; zeros beyond its end. at: (batch, first row, length).

    A packed sequence ends inside the tensor: `backward_launch.rows_descriptor` describes that in five dimensions.
    """
    batch, first, length = at
    if len(descriptor.block_shape) == 4:
        bridge.tma_load(descriptor, [batch, head, row, column], barrier, buffer)
    else:
        bridge.tma_load(descriptor, [2**30, first + length, head, 2**30 - length + row, column], barrier, buffer)


@gluon.jit
def store_rows(descriptor, at, row, column, head, buffer):
    """TMA store of what `load_rows` would read; nothing is written beyond the end of the sequence."""
    batch, first, length = at
    if len(descriptor.block_shape) == 4:
        bridge.tma_store(descriptor, [batch, head, row, column], buffer)
    else:
        bridge.tma_store(descriptor, [2**30, first + length, head, 2**30 - length + row, column], buffer)


@gluon.jit
def send_keys(dk, dv, descriptors, buffers, at, row, column, head):
    """dk and dv (64, columns) to their tensors by TMA, by way of the memory that held those of K and V."""
    matrix(buffers[1]).store(dv.to(buffers[1].dtype))
    matrix(buffers[0]).store(dk.to(buffers[0].dtype))
    fence_async_shared()
    store_rows(descriptors[1], at, row, column, head, buffers[1])
    store_rows(descriptors[0], at, row, column, head, buffers[0])
    bridge.tma_store_wait(0)


@gluon.jit
def load_keys(descriptors, buffers, barriers, at, row, head, tiles, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """K and V of the next tile, once the consumers are done with their memory; two parts (ROWS, COLUMNS) apart."""
    k_desc, v_desc = descriptors
    k_buf, v_buf = buffers
    full, empty = barriers
    mbarrier.wait(empty.index(0), (tiles & 1) ^ 1)
    mbarrier.expect(full.index(0), 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for part in gl.static_range(2):
        load_rows(k_desc, at, row + part * ROWS, part * COLUMNS, head, full.index(0), k_buf.index(part))
        load_rows(v_desc, at, row + part * ROWS, part * COLUMNS, head, full.index(0), v_buf.index(part))


@gluon.jit
def visits_of(walk, head, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """`query_visits` of one query head for a tile of keys.

    walk: (lists, (sequence, tile of keys, share of it), K/V head, band, bounds of the real keys, (length_q, length_k)).
    """
    lists, place, _kv_head, band, bounds, lengths = walk
    length_q, length_k = lengths
    column, n0 = place[1], place[1] * BLOCK_N
    if lists is not None:
        column = place[0] * lists[5] + head * lists[6] + place[1]
    n1 = gl.minimum(n0 + BLOCK_N, length_k)
    shift = length_k - length_q
    visits = query_visits(lists, column, n0, n1, shift, band[0], band[1], bounds[0], bounds[1], length_q, BLOCK_M)
    if lists is not None:
        visits = share_of(visits, place[2])
    return visits


@gluon.jit
def block_of(lists, visits, step, ORDERED: gl.constexpr):
    """(entry, block of rows, whether it is partial) of one step through `visits`: the full ones come first.

    ORDERED: of a band, the last block first, so that tiles which add to dQ one after the other, in the order of their
    numbers, are never in each other's way: the first tile of a causal mask has the most blocks to go.
    """
    if ORDERED and lists is None:
        block = visits[2] + visits[1] + visits[5] - 1 - step
        return block, block, (block < visits[0]) | (block >= visits[0] + visits[1])
    else:
        entry = gl.where(step < visits[1], visits[0] + step, partial_entry(visits, step - visits[1]))
        return entry, visited(lists, entry), step >= visits[1]


@gluon.jit
def band_cells(keys, m0, shift, band, bounds, BLOCK_M: gl.constexpr):
    """bool (64, BLOCK_M): cells (key, row) of a band; `keys` (64,) in a slice of the accumulator.

    Rows are counted from the start of the sequence: counted inside the block, they would be kept in registers.
    """
    rows = m0 + gl.arange(0, BLOCK_M, gl.SliceLayout(0, accumulator(BLOCK_M)))
    first = keys * 0
    if band[1] is not None:
        first = keys - (shift + band[1])
    first = gl.where((keys >= bounds[0]) & (keys < bounds[1]), first, 2**31 - 1)
    keep = rows[None, :] >= first[:, None]
    if band[0] is not None:
        keep = keep & (rows[None, :] <= (keys - (shift - band[0]))[:, None])
    return keep


@gluon.constexpr_function
def bits_layout(block_m):
    """Layout of (2, 32, block_m) whose reshape to (64, block_m) is `accumulator`: no cell changes its thread."""
    registers = [[0, 0, 1], [0, 8, 0]] + [[0, 0, 8 << bit] for bit in range((block_m // 8).bit_length() - 1)]
    lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 16, 0], [1, 0, 0]], [], [2, 32, block_m])


@gluon.jit
def listed_cells(lists, entry, FIRST_WORD: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """bool (64, BLOCK_M): the 64 keys from word FIRST_WORD on of a listed partial tile. A word serves two cells."""
    WORDS: gl.constexpr = BLOCK_N // 32
    layout: gl.constexpr = bits_layout(BLOCK_M)
    words_of: gl.constexpr = gl.SliceLayout(1, layout)
    at = lists[3] + gl.cast(gl.load(lists[2] + entry), gl.int64) * (BLOCK_M * WORDS) + FIRST_WORD
    lines = gl.arange(0, BLOCK_M, gl.SliceLayout(0, words_of))
    word = gl.load(at + (lines[None, :] * WORDS + gl.arange(0, 2, gl.SliceLayout(1, words_of))[:, None]))
    bit = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    seen = ((word[:, None, :] >> bit[None, :, None]) & 1) != 0
    return gl.convert_layout(gl.reshape(seen, [64, BLOCK_M]), accumulator(BLOCK_M), assert_trivial=True)


@gluon.jit
def hide_cells(
    tile, value, entry, keys, m0, walk, FIRST_WORD: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
):
    """`tile` (64, BLOCK_M) with `value` in its hidden cells."""
    lists, _place, _kv_head, band, bounds, lengths = walk
    if lists is None:
        keep = band_cells(keys, m0, lengths[1] - lengths[0], band, bounds, BLOCK_M)
    else:
        keep = listed_cells(lists, entry, FIRST_WORD, BLOCK_M, BLOCK_N)
    return gl.where(keep, tile, value)


@gluon.jit
def probabilities(
    s, stats, entry, is_partial, keys, m0, walk, terms,
    FIRST_WORD: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """(p, p times the derivative of the soft cap), (64, BLOCK_M) float32, of scores `s` = k.q.

    stats: shared memory (2 * BLOCK_M,), lse in units of log2 first. Cells are hidden in a branch, because two loops
    would be too much code, and before lse is read, because registers are short there.
    """
    scale, softcap = terms
    if softcap is None:
        if MASKED:  # noqa: SIM102  # this is for the compiler, the next for the GPU
            if is_partial:
                s = hide_cells(s, -float("inf"), entry, keys, m0, walk, FIRST_WORD, BLOCK_M, BLOCK_N)
        lse = stats.slice(0, BLOCK_M).load(gl.SliceLayout(0, accumulator(BLOCK_M)))
        p = gl.exp2(s * (scale * LOG2E) - lse[None, :])
        return p, p
    else:
        share = tanh(s * scale / softcap)
        lse = stats.slice(0, BLOCK_M).load(gl.SliceLayout(0, accumulator(BLOCK_M)))
        p = gl.exp2(share * (softcap * LOG2E) - lse[None, :])
        if MASKED:  # noqa: SIM102  # as above
            if is_partial:
                p = hide_cells(p, 0.0, entry, keys, m0, walk, FIRST_WORD, BLOCK_M, BLOCK_N)
        return p, p * (1.0 - share * share)


@gluon.jit
def claim(turn):
    """Take a number at a block of dQ: (32,) in one warp, what was there before in its first lane, not waited for.

    The low half of a turn counts those that have finished there, the high half those that came.
    """
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    return gl.atomic_add(turn + lanes * 0, gl.full_like(lanes, 1 << 16), mask=lanes == 0, sem="relaxed")


@gluon.jit
def take(counter):
    """The next number that nobody has, in the first lane of one warp, not waited for."""
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    return gl.atomic_add(counter + lanes * 0, gl.full_like(lanes, 1), mask=lanes == 0, sem="relaxed")


@gluon.jit
def first_lane(value):
    """The value of the first lane of a warp, in all of them."""
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    return gl.sum(gl.where(lanes == 0, value, 0), 0)


@gluon.jit
def wait_turn(turn, claimed):
    """Whether nobody came before; otherwise wait until the first has stored what the others add to."""
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    value = first_lane(claimed)
    is_first = value == 0
    finished = value & 0xFFFF
    while (finished == 0) & (value != 0):
        polled = gl.atomic_add(turn + lanes * 0, lanes * 0, mask=lanes == 0, sem="acquire")
        finished = first_lane(polled) & 0xFFFF
    fence_proxies()
    return is_first


@gluon.jit
def wait_rank(turn, block, head, walk, rows, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Whether this tile of keys is the first to add to a block of dQ; otherwise wait for those of lower number.

    A program takes tiles in ascending order, so the lowest unfinished tile never waits. rows: None for a band, or
    (ptr, index, batch stride, head stride) of the lists along rows of tiles.
    """
    lists, place, _kv_head, band, bounds, lengths = walk
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    if lists is None:
        low = bounds[0]
        if band[0] is not None:
            low = gl.maximum(low, block * BLOCK_M + lengths[1] - lengths[0] - band[0])
        rank = place[1] - gl.maximum(low, 0) // BLOCK_N
    else:
        row = rows[0] + gl.cast(place[0] * rows[2] + head * rows[3] + block, gl.int64) * 3
        end, before = gl.load(row + 2), lanes * 0
        for chunk in range(gl.load(row), end, 32):
            tile = gl.load(rows[1] + chunk + lanes, mask=chunk + lanes < end, other=2**31 - 1)
            before += (tile < place[1]).to(gl.int32)
        rank = gl.sum(before, 0)
    finished = rank - 1
    if rank == 0:
        finished = rank
    while finished != rank:
        finished = first_lane(gl.atomic_add(turn + lanes * 0, lanes * 0, mask=lanes == 0, sem="acquire"))
    fence_proxies()
    return rank == 0


@gluon.jit
def fence_proxies():
    """What this warp has learnt of global memory holds for its TMA too."""
    gl.inline_asm_elementwise(
        "{ fence.proxy.async.global; mov.b32 $0, 0; }", "=r,r,~{memory}", [0], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def put(descriptor, coord, source, is_first):
    """Store the first sum of a block of dQ, add the others: so that nobody has to fill it with zeros."""
    if is_first:
        bridge.tma_store(descriptor, coord, source)
    else:
        bridge.tma_reduce_add(descriptor, coord, source)


@gluon.jit
def end_turn(turn):
    """Count one more that has finished at a block of dQ; its sums are in global memory."""
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.atomic_add(turn + lanes * 0, gl.full_like(lanes, 1), mask=lanes == 0, sem="release")


@gluon.jit
def fragments(dq):
    """dQ (64, N) in the order in which registers hold it, so that a thread stores 16 bytes beside its neighbour's."""
    N: gl.constexpr = dq.shape[1]
    return dq.reshape([4, 2, 8, N // 8, 4, 2]).permute((0, 3, 2, 4, 1, 5)).reshape([N, 64])


@gluon.jit
def seen_word(walk, group_size, WORD: gl.constexpr, BLOCK_N: gl.constexpr):
    """int32: bit i is whether any row of any head of the group may see key 32 * WORD + i of the tile of keys."""
    lists, place, kv_head, _band, bounds, _lengths = walk
    if lists is None:
        return keys_word(place[1] * BLOCK_N, bounds[0], bounds[1], WORD)
    else:
        word = gl.cast(0, gl.int32)
        for member in range(gl.where(lists[6] == 0, 1, group_size)):  # heads may share one list
            column = place[0] * lists[5] + (kv_head * group_size + member) * lists[6] + place[1]
            word |= gl.load(lists[4] + gl.cast(column, gl.int64) * (BLOCK_N // 32) + WORD)
        return word


@gluon.jit
def hide_keys(k, v, walk, group_size, FIRST_WORD: gl.constexpr, BLOCK_N: gl.constexpr):
    """Zero those of 64 rows of K and V in shared memory that nobody sees: they may hold NaN, and 0 * NaN is NaN."""
    for part in gl.static_range(2):
        word = seen_word(walk, group_size, FIRST_WORD + part, BLOCK_N)
        if word != -1:
            hide_values(k, word, part, k.shape[1])
            hide_values(v, word, part, v.shape[1])
            fence_async_shared()
            bridge.partition_barrier()
