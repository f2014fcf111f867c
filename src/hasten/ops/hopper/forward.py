"""Forward kernel: a producer warp and two or three consumer warpgroups (FlashAttention-3, arXiv 2407.08608).

The producer loads Q of an item and then its tiles of K and V into rings of shared memory, by TMA. Each consumer
computes 64 rows: S = Q K^T of this tile runs beside O += P V of the tile before, whose P stays in registers.

Who may touch what: a stage of K or V belongs to the producer between the named barrier at which all consumers have
left it and the mbarrier its TMA completes; a stage of Q holds the item's Q and its number, and is free again after the
last S of every consumer; `staged` belongs to one consumer, which waits for TMA to have read it before it writes.
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

from hasten.ops.hopper.bridge import FIRST_BARRIER, barrier_arrive, here, partition_barrier, tma_store_wait
from hasten.ops.hopper.cells import (
    LOG2E,
    accumulator,
    band_cells,
    hide_values,
    keys_seen,
    keys_word,
    listed_cells,
    map_of,
    map_words,
    pack,
    quarters,
    score,
    score_unit,
    softmax_step,
    unpack,
)
from hasten.ops.hopper.finish import finish
from hasten.ops.hopper.producer import produce
from hasten.ops.hopper.rings import matrix, ring
from hasten.ops.hopper.schedule import item_visits
from hasten.ops.hopper.visits import partial_entry

# sizes for which a kernel compiled for "1" or "a multiple of 16" gains nothing and costs seconds
LENGTHS = (
    "left", "right", "list_batch_stride", "list_head_stride", "num_tiles", "num_heads", "batch", "seqlen_q", "seqlen_k",
    "total_q", "heads_per_group", "num_groups", "group_size", "head_dim_v", "num_slots",
)  # fmt: skip


@gluon.jit
def _read_item(shared, turn, options: gl.constexpr):
    """(sequence, head, tile, share of it) that the producer handed over, with Q in its stage."""
    _q, _k, _v, slots, q_full, _q_empty, _k_full, _v_full = shared
    Q_STAGES: gl.constexpr = options[4]
    stage = turn % Q_STAGES
    mbarrier.wait(q_full.index(stage), (turn // Q_STAGES) & 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    number = gl.max(slots.index(3 * stage).load(layout), 0)
    head = gl.max(slots.index(3 * stage + 1).load(layout), 0)
    tile, share = gl.max(slots.index(3 * stage + 2).load(layout), 0), 0
    if slots.shape[0] > 3 * Q_STAGES:
        share = gl.max(slots.index(3 * Q_STAGES + stage).load(layout), 0)
    return number, head, tile, share


@gluon.jit
def _read_map(where, number, CONSUMER: gl.constexpr, options: gl.constexpr):
    """(words of its rows, keys that any row sees as two int64) of a bit map, asked for long before they are needed."""
    BLOCK_N: gl.constexpr = options[0]
    words = map_words(where[3], number, 64 * CONSUMER, 64 * options[2], BLOCK_N)
    return words, keys_seen(where[3], number, 0, BLOCK_N), keys_seen(where[3], number, 1, BLOCK_N)


@gluon.jit
def _cells(where, bounds, bits, m0, entry, is_partial, CONSUMER: gl.constexpr, options: gl.constexpr):
    """bool (64, BLOCK_N): what the rows of one consumer see of a tile."""
    BLOCK_N: gl.constexpr = options[0]
    if where[3] is None:
        row, n0 = m0 + 64 * CONSUMER, entry * BLOCK_N
        return band_cells(row, n0, bounds[0], where[4], where[2], bounds[1], bounds[2], BLOCK_N)
    else:
        return listed_cells(bits[0], is_partial, BLOCK_N)


@gluon.jit
def _seen(where, bounds, bits, entry, is_partial, PART: gl.constexpr, options: gl.constexpr):
    """int32: which of the 32 keys from 32 * PART on of a tile some row of it may see."""
    if where[3] is None:
        return keys_word(entry * options[0], bounds[1], bounds[2], PART)
    else:
        half = bits[1 + PART // 2] >> (32 * (PART % 2))
        return gl.where(is_partial, half.to(gl.int32), -1)


@gluon.jit
def _hide(where, bounds, bits, v, full, phase, entry, is_partial, options: gl.constexpr):
    """Zero the values of keys that no row of a tile sees: padding, neighbours in a packed batch, holes of a list.

    A dense sequence has none of them: TMA fills with zeros what lies past its end.
    """
    PARTS: gl.constexpr = options[0] // 32
    if (where[3] is not None) | (where[1] is not None) | (where[2] is not None):
        seen = gl.cast(-1, gl.int32)
        for part in gl.static_range(PARTS):
            seen &= _seen(where, bounds, bits, entry, is_partial, part, options)
        if seen != -1:
            mbarrier.wait(full, phase)
            for part in gl.static_range(PARTS):
                word = _seen(where, bounds, bits, entry, is_partial, part, options)
                if word != -1:
                    hide_values(v, word, part, options[1])
            fence_async_shared()
            partition_barrier()


@gluon.jit
def _first_visit(
    q,
    row_max,
    row_sum,
    shared,
    where,
    bounds,
    m0,
    entry,
    number,
    is_partial,
    fill,
    terms,
    CONSUMER: gl.constexpr,
    options: gl.constexpr,
):
    """(p, rescale, row_max, row_sum) of the first tile of an item: always masked, no product of V runs beside it."""
    _q, k_smem, v_smem, _slots, _q_full, _q_empty, k_full, v_full = shared
    BLOCK_N: gl.constexpr = options[0]
    STAGES: gl.constexpr = options[3]
    stage, phase = fill % STAGES, (fill // STAGES) & 1
    s_layout: gl.constexpr = accumulator(BLOCK_N)
    bits = _read_map(where, number, CONSUMER, options)
    mbarrier.wait(k_full.index(stage), phase)
    zero = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    raw = warpgroup_mma(q, matrix(k_smem.index(stage)).permute((1, 0)), zero, use_acc=False, is_async=True)
    keep = _cells(where, bounds, bits, m0, entry, is_partial, CONSUMER, options)
    raw = warpgroup_mma_wait(0, deps=[raw])
    barrier_arrive(FIRST_BARRIER + stage, 128 * options[2] + 32)
    value = gl.where(keep, score(raw, terms[0], terms[1]), -float("inf"))
    unit = score_unit(terms[0], terms[1])
    p, rescale, row_max, row_sum = softmax_step(value, row_max, row_sum, unit, True)
    _hide(where, bounds, bits, matrix(v_smem.index(stage)), v_full.index(stage), phase, entry, is_partial, options)
    return pack(p, q.dtype), rescale, row_max, row_sum


@gluon.jit
def _next_visit(
    q_at,
    acc,
    p,
    rescale,
    row_max,
    row_sum,
    shared,
    where,
    bounds,
    m0,
    entry,
    number,
    fill,
    terms,
    MASKED: gl.constexpr,
    CONSUMER: gl.constexpr,
    options: gl.constexpr,
):
    """(acc, p, rescale, row_max, row_sum) after one more tile; P of the tile before meets its V beside its softmax.

    `rescale` is what acc is multiplied by before `p` is added: beside S of the next tile, where it costs nothing.
    """
    q_smem, k_smem, v_smem, _slots, _q_full, _q_empty, k_full, v_full = shared
    THREADS: gl.constexpr = 128 * options[2] + 32
    BLOCK_N: gl.constexpr = options[0]
    STAGES: gl.constexpr = options[3]
    stage, phase = fill % STAGES, (fill // STAGES) & 1
    before = (fill - 1) % STAGES
    s_layout: gl.constexpr = accumulator(BLOCK_N)
    bits = _read_map(where, number, CONSUMER, options) if MASKED else None
    p = unpack(p, q_smem.dtype, options[1])
    mbarrier.wait(k_full.index(stage), phase)
    q = matrix(q_smem.index(here(q_at)))
    zero = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    raw = warpgroup_mma(q, matrix(k_smem.index(stage)).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, accumulator(options[1])))[:, None]
    mbarrier.wait(v_full.index(before), ((fill - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, matrix(v_smem.index(here(before))), acc, is_async=True)
    raw = warpgroup_mma_wait(1, deps=[raw])
    barrier_arrive(FIRST_BARRIER + stage, THREADS)
    value = score(raw, terms[0], terms[1])
    if MASKED:  # after the wait: before it, the compiler would wait for both products
        keep = _cells(where, bounds, bits, m0, entry, True, CONSUMER, options)
        value = gl.where(keep, value, -float("inf"))
    unit = score_unit(terms[0], terms[1])
    next_p, rescale, row_max, row_sum = softmax_step(value, row_max, row_sum, unit, MASKED)
    acc = warpgroup_mma_wait(0, deps=[acc])
    barrier_arrive(FIRST_BARRIER + STAGES + before, THREADS)
    if MASKED:
        _hide(where, bounds, bits, matrix(v_smem.index(stage)), v_full.index(stage), phase, entry, True, options)
    next_p = pack(next_p, q.dtype)
    return acc, next_p, rescale, row_max, row_sum


@gluon.jit
def _consume(CONSUMER: gl.constexpr, shared, staged, where, terms, out, options: gl.constexpr):
    """Compute 64 rows of every item that the producer hands over."""
    q_smem, _k, v_smem, _slots, _q_full, q_empty, _k_full, v_full = shared
    BLOCK_N: gl.constexpr = options[0]
    BLOCK_D: gl.constexpr = options[1]
    CONSUMERS: gl.constexpr = options[2]
    STAGES: gl.constexpr = options[3]
    Q_STAGES: gl.constexpr = options[4]
    THREADS: gl.constexpr = 128 * options[2] + 32
    s_layout: gl.constexpr = accumulator(BLOCK_N)
    o_layout: gl.constexpr = accumulator(options[1])
    for stage in gl.static_range(2 * STAGES):  # all stages of K and V are free
        barrier_arrive(FIRST_BARRIER + stage, THREADS)
    turn, fill = 0, 0
    number, head, tile, share = _read_item(shared, turn, options)
    while number >= 0:
        visits, bounds, place = item_visits(where, number, head, tile, share, 64 * CONSUMERS, BLOCK_N)
        m0, num_full, num_partial = tile * CONSUMERS * 64, visits[1], visits[5]
        goal = tile
        if where[8] is not None:  # where the result belongs, in one number: a tile, or -1 - slot of a piece
            goal = gl.where(share == 0, tile, -1 - (share >> 12))
        q_at = (turn % Q_STAGES) * CONSUMERS + CONSUMER
        q = matrix(q_smem.index(q_at))
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        row_sum = gl.zeros([64, 4], gl.float32, quarters())
        row_max = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, s_layout))
        if terms[2] is not None:  # a sink is a score without a value: the softmax starts from it
            sink = gl.load(terms[2] + head) * LOG2E / score_unit(terms[0], terms[1])
            row_max = gl.zeros_like(row_max) + sink
            row_sum += 0.25
            if where[8] is not None:  # of the first piece alone
                is_first = (share & (63 << 6)) == 0
                row_max, row_sum = gl.where(is_first, row_max, -float("inf")), gl.where(is_first, row_sum, 0.0)
        if num_full + num_partial > 0:
            entry = gl.where(num_partial > 0, partial_entry(visits, 0), visits[0])
            bits, next_bits = map_of(where[3], visits, 0), map_of(where[3], visits, 1)
            p, rescale, row_max, row_sum = _first_visit(
                q, row_max, row_sum, shared, where, bounds, m0, entry, bits, num_partial > 0, fill, terms,
                CONSUMER, options,
            )  # fmt: skip
            fill += 1
            for step in range(1, num_partial):
                bits, next_bits = next_bits, map_of(where[3], visits, step + 1)
                acc, p, rescale, row_max, row_sum = _next_visit(
                    q_at, acc, p, rescale, row_max, row_sum, shared, where, bounds, m0, partial_entry(visits, step),
                    bits, fill, terms, True, CONSUMER, options,
                )  # fmt: skip
                fill += 1
            for _ in range(gl.where(num_partial > 0, 0, 1), num_full):
                acc, p, rescale, row_max, row_sum = _next_visit(
                    q_at, acc, p, rescale, row_max, row_sum, shared, where, bounds, m0, 0, 0,
                    fill, terms, False, CONSUMER, options,
                )  # fmt: skip
                fill += 1
            mbarrier.arrive(q_empty.index(turn % Q_STAGES))
            last = (fill - 1) % STAGES
            acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))[:, None]
            p = unpack(p, q.dtype, BLOCK_D)
            mbarrier.wait(v_full.index(last), ((fill - 1) // STAGES) & 1)
            acc = warpgroup_mma(p, matrix(v_smem.index(last)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier_arrive(FIRST_BARRIER + STAGES + last, THREADS)
        else:
            mbarrier.arrive(q_empty.index(turn % Q_STAGES))
        finish(
            acc, row_max, row_sum, staged.index(CONSUMER), out, terms, place, head, goal, where[8], where[9],
            CONSUMER, options,
        )  # fmt: skip
        turn += 1
        number, head, tile, share = _read_item(shared, turn, options)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=LENGTHS)
def attention_forward(
    q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, sinks, counter,
    cu_seqlens_q, cu_seqlens_k, key_range, lists, pieces, scale, softcap, left, right, list_batch_stride,
    list_head_stride, num_tiles, num_heads, batch, seqlen_q, seqlen_k, total_q, heads_per_group, num_groups,
    group_size, head_dim_v, num_slots,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """out and lse of all rows; `counter` int32 (1,) is 0. Descriptors are (batch, heads, rows, head_dim).

    out and lse are contiguous; total_q: rows of one head in lse, seqlen_q or the sum of packed ones.
    """
    q_smem, staged = ring(q_desc, Q_STAGES * CONSUMERS), ring(out_desc, CONSUMERS)
    k_smem, v_smem = ring(k_desc, STAGES), ring(v_desc, STAGES)
    SLOTS: gl.constexpr = 3 if pieces is None else 4  # numbers of an item
    slots = gl.allocate_shared_memory(gl.int32, [SLOTS * Q_STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_empty.index(stage), count=CONSUMERS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
    fence_async_shared()
    shared = (q_smem, k_smem, v_smem, slots, q_full, q_empty, k_full, v_full)
    list_strides = (list_batch_stride, list_head_stride)
    where = (
        cu_seqlens_q, cu_seqlens_k, key_range, lists, (left, right), seqlen_q, seqlen_k, list_strides,
        pieces, num_slots,
    )  # fmt: skip
    options: gl.constexpr = (BLOCK_N, BLOCK_D, CONSUMERS, STAGES, Q_STAGES)
    order, loads = (num_tiles, num_heads, batch, heads_per_group, num_groups, group_size), (q_desc, k_desc, v_desc)
    terms, out = (scale, softcap, sinks), (out_desc, cu_seqlens_q, out_ptr, lse_ptr, num_heads, total_q, head_dim_v)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, shared, staged, where, terms, out, options)),
                (_consume, (1, shared, staged, where, terms, out, options)),
                (produce, (loads, shared, where, counter, order, options)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, shared, staged, where, terms, out, options)),
                (_consume, (1, shared, staged, where, terms, out, options)),
                (_consume, (2, shared, staged, where, terms, out, options)),
                (produce, (loads, shared, where, counter, order, options)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
