"""Host side of the Hopper backward: outputs, workspace, and the launches of a call, worked out once for each kind."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hasten.ops.call import Call, Gradients
from hasten.ops.hopper.backward import attention_backward
from hasten.ops.hopper.backward_rows import backward_after, backward_before
from hasten.ops.hopper.bridge import OPTIONS
from hasten.ops.hopper.envelope import untouchable
from hasten.ops.hopper.launch import num_multiprocessors
from hasten.ops.hopper.sums import add_pieces
from hasten.ops.hopper.table import BackwardTile, backward_tile
from hasten.ops.launching import TENSOR, Described, Launch
from hasten.ops.tiles import Pieces, as_band, tile_lists

__all__ = ["backward"]

# of the 50 MB: what the (sequence, head) pairs of a group may hold of Q, dO and float32 dQ
_L2_BYTES = 32 * 2**20
_TURNS_OF_LAST_GROUP = 4
_ADDED_ROWS = 16  # of a program that adds up pieces
_MOST_PLANS = 256


class Sizes(NamedTuple):
    """Sizes and strides of one call, the same names in dense and packed layout. Holds no tensor.

    strides: (batch, row, head) of q, k, v, dout, out, lse, dlse (None if there is none). `band` is (left, right), None
    for a mask that is no band; that one `varies` by batch and by head or not. Blocks of rows: see `backward_rows`.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    total_q: int
    total_k: int
    max_seqlen_q: int
    max_seqlen_k: int
    strides: tuple[tuple[int, ...] | None, ...]
    is_packed: bool
    softmax_scale: float
    softcap: float | None
    band: tuple[int | None, int | None] | None
    has_padding: bool
    varies: tuple[bool, bool]
    deterministic: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, rows: tuple[Tensor | None, ...], call: Call) -> Sizes:
        """Read them off the tensors and the call; rows: dout, out, lse, dlse."""
        band, mask, cu_seqlens = as_band(call.mask), call.mask, call.cu_seqlens_q
        return cls(
            q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
            q.shape[-2],
            k.shape[-2],
            q.shape[-1],
            v.shape[-1],
            q.shape[-3],
            k.shape[-3],
            call.max_seqlen_q,
            call.max_seqlen_k,
            (*map(_strides, (q, k, v, *rows[:2])), *map(_row_strides, rows[2:])),
            cu_seqlens is not None,
            call.softmax_scale,
            call.softcap or None,
            None if band is None else (band.left, band.right),
            band is not None and band.padding is not None,
            (False, False) if band is not None else (mask.varies_by_batch, mask.varies_by_head),
            call.deterministic,
        )

    @property
    def columns(self) -> int:
        """The tile that holds a row of q, k and v: TMA fills the columns past head_dim with zeros."""
        return max(64, 1 << (max(self.head_dim, self.head_dim_v) - 1).bit_length())

    @property
    def is_masked(self) -> bool:
        """Whether any tile may have hidden cells."""
        return self.is_packed or self.has_padding or self.band != (None, None) or self.max_seqlen_k % 128 != 0

    @property
    def tile(self) -> BackwardTile:
        return backward_tile(self.columns, self.is_masked, self.softcap is not None)

    @property
    def num_tiles(self) -> tuple[int, int]:
        """Blocks of rows and tiles of keys of the longest sequence."""
        return -(-self.max_seqlen_q // self.tile.block_m), -(-self.max_seqlen_k // self.tile.block_n)

    @property
    def num_blocks(self) -> int:
        """Blocks of rows of one head."""
        return self.total_q // self.tile.block_m + self.batch if self.is_packed else self.batch * self.num_tiles[0]

    def groups(self, num_programs: int) -> tuple[int, int]:
        """(pairs of sequence and K/V head of a group, how many such groups before one of all the other pairs).

        A group is as small as fills the GPU, so that its rows are read once; where items differ in length, the last
        one fills it several times, so that its short items even out the end (both as in the forward). A deterministic
        call takes 16 pairs at least: tiles of one pair add to dQ one after the other, and the fewer of them run at a
        time, the less they wait; they pass the same rows at about the same time, which spares the L2.
        """
        num_tiles, group_size = self.num_tiles[1], self.num_heads // self.num_kv_heads
        fitting = max(1, _L2_BYTES // (group_size * self.max_seqlen_q * self.columns * (2 * 2 + 4)))

        def pairs(times: int) -> int:
            return max(16 if self.deterministic else 1, min(fitting, -(-times * num_programs // num_tiles)))

        last = 0 if self.band == (None, None) and not self.has_padding else pairs(_TURNS_OF_LAST_GROUP)
        return pairs(1), max(0, self.num_kv_heads * self.batch - last) // pairs(1)

    def list_strides(self, lines: int) -> tuple[int, int]:
        """Lines of tiles in a list from one sequence to the next and from one head to the next; 0 where they share."""
        by_batch, by_head = self.varies
        batch_stride = lines * (self.num_heads if by_head else 1) if by_batch and self.batch > 1 else 0
        return batch_stride, lines if by_head and self.num_heads > 1 else 0


class Workspace(NamedTuple):
    """What the kernels of one backward hand to each other; nothing has to be filled.

    stats float32 (heads * blocks, 2 * block_m), dq_sum float32 (heads * blocks * block_m * columns / 64, 64),
    turns int32 (heads * blocks,), counter int32 (1,).
    """

    stats: Tensor
    dq_sum: Tensor
    turns: Tensor
    counter: Tensor

    @classmethod
    def make(cls, sizes: Sizes, device: torch.device, is_read: bool) -> Workspace:
        """Memory for one call; turns and counter both aligned to 16 bytes, or kernels would be compiled twice.

        is_read: whether all of stats is read afterwards, blocks between packed sequences too, which no kernel writes.
        """
        blocks, block_m = sizes.num_heads * sizes.num_blocks, sizes.tile.block_m
        new = torch.zeros if is_read else torch.empty
        stats = new((blocks, 2 * block_m), dtype=torch.float32, device=device)
        dq_sum = torch.empty((blocks * block_m * sizes.columns // 64, 64), dtype=torch.float32, device=device)
        numbers = torch.empty(4 + blocks, dtype=torch.int32, device=device)
        return cls(stats, dq_sum, numbers[4:], numbers[:1])


@lru_cache(maxsize=_MOST_PLANS)
def plan_before(sizes: Sizes) -> Launch:
    """Launch of out, dout, lse, dlse, stats, turns, counter, cu_seqlens_q."""
    dout, out, lse, dlse = sizes.strides[3:]
    grid = (sizes.num_tiles[0] * sizes.num_heads * sizes.batch,)
    numbers = (sizes.num_tiles[0], sizes.num_heads, sizes.max_seqlen_q, sizes.num_blocks)
    options = {
        "HEAD_DIM_V": sizes.head_dim_v,
        "BLOCK_DV": sizes.columns,
        "BLOCK_M": sizes.tile.block_m,
        "num_warps": 4,
    }
    return Launch(backward_before, grid, ((TENSOR,) * 8 + (out, dout, lse, dlse) + numbers), options)


@lru_cache(maxsize=_MOST_PLANS)
def plan_main(sizes: Sizes, num_programs: int, pieces: tuple[int, int] | None = None) -> Launch:
    """Launch of q, k, v, dout, stats, dq_sum, dk, dv, turns, counter, cu_seqlens_q, cu_seqlens_k, key_range, lists.

    pieces: (items of a pair, slots) where long columns of tiles are cut; dk and dv of the slots follow the lists.
    """
    tile, columns, (num_tiles_q, num_tiles_k) = sizes.tile, sizes.columns, sizes.num_tiles
    rows = Described(partial(describe_rows, rows=tile.block_m, columns=columns))
    part = columns if tile.block_n == 128 else columns // 2  # of K and V: what is loaded at a time
    keys = Described(partial(describe_rows, rows=64, columns=part))
    stats = Described(partial(describe_plain, block=(1, 2 * tile.block_m)))
    sums = Described(partial(describe_plain, block=(min(64, tile.block_m * columns // 128), 64)))
    by_column = by_row = ranked = None
    if sizes.band is None:
        by_column = ((TENSOR,) * 5) + sizes.list_strides(num_tiles_k)
        by_row = ((TENSOR,) * 2) + sizes.list_strides(num_tiles_q)
        ranked = None if sizes.deterministic else TENSOR  # a deterministic call relies on tiles that ascend
    num_pairs = sizes.num_kv_heads * sizes.batch
    num_items, num_slots = pieces or (num_tiles_k, 0)
    arguments = (
        rows, keys, keys, rows, stats, sums, keys, keys, TENSOR, TENSOR, TENSOR, TENSOR, TENSOR,
        by_column, by_row, ranked, (TENSOR,) * 2 if pieces else None,
        sizes.band or (None, None), (sizes.softmax_scale, sizes.softcap), num_items, num_pairs,
        *sizes.groups(num_programs), sizes.num_kv_heads, sizes.max_seqlen_q,
        sizes.max_seqlen_k, sizes.num_blocks, sizes.num_heads // sizes.num_kv_heads, num_slots,
    )  # fmt: skip
    options = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "AHEAD": tile.ahead,
        "MASKED": sizes.is_masked,
        "ORDER": tile.order,
        "ORDERED": sizes.deterministic,
        "num_warps": 4,
        **OPTIONS,
    }
    return Launch(attention_backward, (min(num_items * num_pairs, num_programs),), arguments, options)


@lru_cache(maxsize=_MOST_PLANS)
def plan_after(sizes: Sizes, dq_strides: tuple[int, int, int]) -> Launch:
    """Launch of dq_sum, turns, dq, cu_seqlens_q."""
    num_tiles, block_m, columns = sizes.num_tiles[0], sizes.tile.block_m, sizes.columns
    pieces = max(2, block_m * columns // 4096)
    numbers = (sizes.softmax_scale, num_tiles, sizes.num_heads, sizes.max_seqlen_q, sizes.num_blocks)
    options = {"HEAD_DIM": sizes.head_dim, "BLOCK_D": columns, "BLOCK_M": block_m, "num_warps": 4}
    grid = (pieces * num_tiles * sizes.num_heads * sizes.batch,)
    return Launch(backward_after, grid, ((TENSOR,) * 4 + (dq_strides, *numbers)), options)


@lru_cache(maxsize=_MOST_PLANS)
def plan_add(sizes: Sizes, num_cut: int, num_slots: int) -> Launch:
    """Launch of cut, dk and dv of the pieces, dk, dv."""
    options = {"HEAD_DIM": sizes.head_dim, "HEAD_DIM_V": sizes.head_dim_v, "BLOCK_D": sizes.columns}
    options |= {"BLOCK_N": sizes.tile.block_n, "ROWS": _ADDED_ROWS, "num_warps": 4}
    grid = (num_cut * sizes.tile.block_n // _ADDED_ROWS, sizes.batch * sizes.num_kv_heads)
    arguments = (*(TENSOR,) * 5, sizes.num_kv_heads, sizes.max_seqlen_k, num_slots)
    return Launch(add_pieces, grid, arguments, options)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Gradients:
    """Gradients, as `call.py` says; dk and dv are the same in every run, dq is if the call is deterministic."""
    dout = loadable(dout)
    sizes = Sizes.of(q, k, v, (dout, out, lse, dlse), call)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    space = Workspace.make(sizes, q.device, is_read=call.sinks is not None)
    num_programs = num_multiprocessors(q.device)
    lists, key_range, pieces = _visits(sizes, call, q.device, num_programs)
    parts: tuple[Tensor, ...] = ()
    if pieces is not None:
        shape = (sizes.batch * sizes.num_kv_heads, pieces.num_slots, sizes.tile.block_n, sizes.columns)
        parts = tuple(torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    plan_before(sizes)(out, dout, lse, dlse, space.stats, space.turns, space.counter, call.cu_seqlens_q)
    plan_main(sizes, num_programs, None if pieces is None else (len(pieces.items), pieces.num_slots))(
        q, k, v, dout, space.stats, space.dq_sum, dk, dv, space.turns, space.counter,
        call.cu_seqlens_q, call.cu_seqlens_k, key_range, *lists, *parts,
    )  # fmt: skip
    if pieces is not None:
        plan_add(sizes, len(pieces.cut), pieces.num_slots)(pieces.cut, *parts, dk, dv)
    plan_after(sizes, _strides(dq))(space.dq_sum, space.turns, dq, call.cu_seqlens_q)
    return Gradients(dq, dk, dv, _dsinks(space, sizes, call))


def _visits(
    sizes: Sizes, call: Call, device: torch.device, num_programs: int
) -> tuple[tuple[Tensor, ...], Tensor | None, Pieces | None]:
    """(lists along columns of tiles and along rows and the order, real keys of each sequence, long columns in pieces).

    As far as the mask has them. A deterministic call relies on tiles that ascend, so it has no order and no pieces.
    """
    band = as_band(call.mask)
    if band is not None:
        return (), None if band.padding is None else band.padding.key_range(call.max_seqlen_k, device), None
    lengths = (call.max_seqlen_q, call.max_seqlen_k, sizes.tile.block_m, sizes.tile.block_n)
    lists = tile_lists(call.mask, sizes.batch, sizes.num_heads, *lengths, device)
    columns = (lists.col_ptr, lists.col_index, lists.col_bits, lists.bits, lists.col_keys_seen)
    both = (*columns, lists.row_ptr, lists.row_index)
    if sizes.deterministic:
        return both, None, None
    group_size = sizes.num_heads // sizes.num_kv_heads
    pieces = lists.col_pieces(sizes.batch * sizes.num_heads, group_size, num_programs)
    return (*both, lists.col_order if pieces is None else pieces.items), None, pieces


def describe_rows(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of `tensor` for boxes of `rows` rows of one head and `columns` dims, zeros beyond its own.

    Dense: (batch, heads, rows, dims). Packed: five dimensions, so that the hardware knows where a sequence ends
    inside the tensor. Row x of a sequence of n rows that begins at row s is found at (2^30, s + n, head,
    2^30 - n + x, dim): the bound of the fourth dimension is 2^30, and the strides of the first two take the 2^30 - n
    back, in address arithmetic that wraps at 2^64 (triton.tools.ragged_tma has the same).
    """
    row, head = _aligned(tensor, -3), _aligned(tensor, -2)
    heads, dims = tensor.shape[-2:]
    if tensor.ndim == 3:
        sizes, strides = [2**31 - 2**16, 2**31 - 2**16, heads, 2**30, dims], [2**34 - row, row, head, row, 1]
        return TensorDescriptor(tensor, sizes, strides, [1, 1, 1, rows, columns], gl.NVMMASharedLayout(128, 16, 5))
    sizes, strides = [tensor.shape[0], heads, tensor.shape[1], dims], [_aligned(tensor, 0), head, row, 1]
    return TensorDescriptor(tensor, sizes, strides, [1, 1, rows, columns], gl.NVMMASharedLayout(128, 16, 4))


def describe_plain(tensor: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """TMA descriptor of a float32 matrix for boxes that lie in shared memory row by row."""
    return TensorDescriptor.from_tensor(tensor, list(block), gl.NVMMASharedLayout(0, 32, 2))


def _aligned(tensor: Tensor, dim: int) -> int:
    """A stride that TMA accepts: that of a dimension of one entry is never used and may be anything."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else 8 * tensor.shape[-1]


def loadable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it if TMA cannot read it: new memory, since what is contiguous may be misaligned."""
    if untouchable("dout", tensor) is None:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """(batch, row, head) strides; packed tensors have no batch."""
    assert tensor is not None
    return (0 if tensor.ndim == 3 else tensor.stride(0)), tensor.stride(-3), tensor.stride(-2)


def _row_strides(statistic: Tensor | None) -> tuple[int, int, int] | None:
    """(batch, row, head) strides of lse or dlse."""
    if statistic is None:
        return None
    return (0 if statistic.ndim == 2 else statistic.stride(0)), statistic.stride(-1), statistic.stride(-2)


def _dsinks(space: Workspace, sizes: Sizes, call: Call) -> Tensor | None:
    """The sink is one more key whose value is zero: ds = p * (0 - delta), summed over the rows of a head."""
    if call.sinks is None:
        return None
    lse, delta = space.stats.view(sizes.num_heads, -1, 2, sizes.tile.block_m).unbind(2)
    share = torch.exp2(call.sinks[:, None, None] * math.log2(math.e) - lse)
    return -(share * delta).sum((1, 2))
