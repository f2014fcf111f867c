"""Host side of the Hopper backward: outputs, workspace, TMA descriptors, grids. Everything was checked above."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hasten.ops.call import Call, Gradients
from hasten.ops.hopper.backward import attention_backward
from hasten.ops.hopper.backward_rows import backward_after, backward_before
from hasten.ops.tiles import Band, TileLists, as_band, tile_lists

__all__ = ["backward"]

# of the 50 MB: what the (sequence, head) pairs that are worked on together may hold of Q, dO and float32 dQ
_L2_BYTES = 32 * 2**20
_PLAIN = gl.NVMMASharedLayout(0, 32, 2)


@dataclass(frozen=True)
class Tile:
    """Tile of the main kernel; blocks of rows loaded ahead; whether dV is multiplied before dP is waited for."""

    block_m: int
    block_n: int
    ahead: int
    order: int


def backward_tile(columns: int, is_masked: bool, has_softcap: bool) -> Tile:
    """The tile for head_dim padded to `columns`; measured on an H100 (docs/design/hopper-backward.md)."""
    if columns == 64:  # tanh needs the registers of half the tile
        return Tile(64, 128, 2, 1) if has_softcap else Tile(128, 128, 2, 0)
    if columns == 128:
        return Tile(64, 128, 2, 1 if is_masked else 0)
    return Tile(64, 64, 1, 0)


@dataclass(frozen=True)
class Plan:
    """Sizes of one call, the same names in dense and packed layout; blocks of rows as `backward_rows` counts them."""

    batch: int
    num_heads: int
    num_kv_heads: int
    columns: int
    tile: Tile
    is_masked: bool
    num_tiles_q: int
    num_tiles_k: int
    num_blocks: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """Read them off the tensors."""
        columns = max(64, 1 << (max(q.shape[-1], v.shape[-1]) - 1).bit_length())
        is_masked = call.is_packed or as_band(call.mask) != Band() or call.max_seqlen_k % 128 != 0
        tile = backward_tile(columns, is_masked, bool(call.softcap))
        batch = q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
        num_tiles_q, num_tiles_k = -(-call.max_seqlen_q // tile.block_m), -(-call.max_seqlen_k // tile.block_n)
        num_blocks = q.shape[0] // tile.block_m + batch if call.is_packed else batch * num_tiles_q
        heads = q.shape[-2], k.shape[-2]
        return cls(batch, *heads, columns, tile, is_masked, num_tiles_q, num_tiles_k, num_blocks)

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def num_pairs(self) -> int:
        return self.num_kv_heads * self.batch

    def pairs_at_once(self, call: Call) -> int:
        """(sequence, K/V head) pairs to go through together: as many as have room for their rows in the L2.

        A deterministic call takes at least 16: the tiles of one pair add to dQ one after the other, and the fewer of
        them run at a time, the less they wait; they pass the same rows at about the same time, which spares the L2.
        """
        pair_bytes = self.group_size * call.max_seqlen_q * self.columns * (2 * 2 + 4)
        return min(max(16 if call.deterministic else 1, _L2_BYTES // pair_bytes), self.num_pairs)


@dataclass(frozen=True)
class Workspace:
    """What the kernels of one backward hand to each other; nothing has to be filled.

    stats float32 (heads * blocks, 2 * block_m), dq_sum float32 (heads * blocks * block_m * columns / 64, 64),
    turns int32 (heads * blocks,), counter int32 (1,).
    """

    stats: Tensor
    dq_sum: Tensor
    turns: Tensor
    counter: Tensor

    @classmethod
    def make(cls, plan: Plan, device: torch.device, is_read: bool) -> Workspace:
        """Memory for one call; turns and counter both aligned to 16 bytes, or kernels would be compiled twice.

        is_read: whether all of stats is read afterwards, blocks between packed sequences too, which no kernel writes.
        """
        blocks = plan.num_heads * plan.num_blocks
        rows = blocks * plan.tile.block_m
        new = torch.zeros if is_read else torch.empty
        stats = new((blocks, 2 * plan.tile.block_m), dtype=torch.float32, device=device)
        dq_sum = torch.empty((rows * plan.columns // 64, 64), dtype=torch.float32, device=device)
        numbers = torch.empty(4 + blocks, dtype=torch.int32, device=device)
        return cls(stats, dq_sum, numbers[4:], numbers[:1])


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Gradients:
    """Gradients, as `call.py` says; dk and dv are the same in every run, dq is if the call is deterministic."""
    plan = Plan.of(q, k, v, call)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dout = dout if _is_loadable(dout) else dout.contiguous()
    space = Workspace.make(plan, q.device, is_read=call.sinks is not None)
    _before(dout, dlse, out, lse, space, plan, call)
    _main((q, k, v, dout), (dk, dv), space, plan, call)
    _after(dq, space, plan, call)
    return Gradients(dq, dk, dv, _dsinks(space, plan, call))


def _before(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, space: Workspace, plan: Plan, call: Call
) -> None:
    backward_before[(plan.num_tiles_q * plan.num_heads * plan.batch,)](
        out, dout, lse, dlse, space.stats, space.turns, space.counter, call.cu_seqlens_q,
        _strides(out), _strides(dout), _row_strides(lse), None if dlse is None else _row_strides(dlse),
        plan.num_tiles_q, plan.num_heads, call.max_seqlen_q, plan.num_blocks,
        HEAD_DIM_V=out.shape[-1], BLOCK_DV=plan.columns, BLOCK_M=plan.tile.block_m, num_warps=4,
    )  # fmt: skip


def _main(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor], space: Workspace, plan: Plan, call: Call) -> None:
    q, k, v, dout = inputs
    tile, columns = plan.tile, plan.columns
    part = [64, columns] if tile.block_n == 128 else [64, columns // 2]  # of K and V, loaded at a time
    piece = [min(64, tile.block_m * columns // 128), 64]  # of dQ, staged by a warpgroup at a time
    lists, rows, band, key_range = _visits(call, plan, q.device)
    attention_backward[(min(plan.num_tiles_k * plan.num_pairs, num_multiprocessors(q.device)),)](
        rows_descriptor(q, tile.block_m, columns), rows_descriptor(k, *part), rows_descriptor(v, *part),
        rows_descriptor(dout, tile.block_m, columns),
        TensorDescriptor.from_tensor(space.stats, [1, 2 * tile.block_m], _PLAIN),
        TensorDescriptor.from_tensor(space.dq_sum, piece, _PLAIN),
        rows_descriptor(outputs[0], *part), rows_descriptor(outputs[1], *part),
        space.turns, space.counter, call.cu_seqlens_q, call.cu_seqlens_k, key_range, lists, rows, band,
        (call.softmax_scale, call.softcap or None),
        plan.num_tiles_k, plan.num_pairs, plan.pairs_at_once(call), plan.num_kv_heads,
        call.max_seqlen_q, call.max_seqlen_k, plan.num_blocks,
        GROUP_SIZE=plan.group_size, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, AHEAD=tile.ahead,
        MASKED=plan.is_masked, ORDER=tile.order, ORDERED=call.deterministic, num_warps=4,
    )  # fmt: skip


def _after(dq: Tensor, space: Workspace, plan: Plan, call: Call) -> None:
    pieces = max(2, plan.tile.block_m * plan.columns // 4096)
    backward_after[(pieces * plan.num_tiles_q * plan.num_heads * plan.batch,)](
        space.dq_sum, space.turns, dq, call.cu_seqlens_q, _strides(dq), call.softmax_scale,
        plan.num_tiles_q, plan.num_heads, call.max_seqlen_q, plan.num_blocks,
        HEAD_DIM=dq.shape[-1], BLOCK_D=plan.columns, BLOCK_M=plan.tile.block_m, num_warps=4,
    )  # fmt: skip


def _visits(call: Call, plan: Plan, device: torch.device) -> tuple[Any, Any, tuple[Any, ...], Tensor | None]:
    """(lists along columns of tiles, along rows, (left, right) of a band, real keys); None for what there is not."""
    band = as_band(call.mask)
    if band is not None:
        padding = None if band.padding is None else band.padding.key_range(call.max_seqlen_k, device)
        return None, None, (band.left, band.right), padding
    lengths = (call.max_seqlen_q, call.max_seqlen_k, plan.tile.block_m, plan.tile.block_n)
    lists = tile_lists(call.mask, plan.batch, plan.num_heads, *lengths, device)
    columns = (lists.col_ptr, lists.col_index, lists.col_bits, lists.bits, *_list_strides(lists, lists.num_cols))
    rows = (lists.row_ptr, lists.row_index, *_list_strides(lists, lists.num_rows))
    return columns, rows, (None, None), None


def _list_strides(lists: TileLists, lines: int) -> tuple[int, int]:
    """(batch, head) strides, in rows or columns of tiles; 0 where all share one."""
    return lines * lists.heads if lists.batch > 1 else 0, lines if lists.heads > 1 else 0


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Programs of a persistent kernel."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def rows_descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
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


def _aligned(tensor: Tensor, dim: int) -> int:
    """A stride that TMA accepts: that of a dimension of one entry is never used and may be anything."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else 8 * tensor.shape[-1]


def _is_loadable(tensor: Tensor) -> bool:
    """Whether TMA can read it: 16-byte aligned base, rows and heads."""
    strides = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(size == 1 or (stride > 0 and stride * tensor.element_size() % 16 == 0) for size, stride in strides)
    )


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides; packed tensors have no batch."""
    return (0 if tensor.ndim == 3 else tensor.stride(0)), tensor.stride(-3), tensor.stride(-2)


def _row_strides(statistic: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides of lse or dlse."""
    return (0 if statistic.ndim == 2 else statistic.stride(0)), statistic.stride(-1), statistic.stride(-2)


def _dsinks(space: Workspace, plan: Plan, call: Call) -> Tensor | None:
    """The sink is one more key whose value is zero: ds = p * (0 - delta), summed over the rows of a head."""
    if call.sinks is None:
        return None
    lse, delta = space.stats.view(plan.num_heads, -1, 2, plan.tile.block_m).unbind(2)
    share = torch.exp2(call.sinks[:, None, None] * math.log2(math.e) - lse)
    return -(share * delta).sum((1, 2))
