"""Host side of the Hopper backward: outputs, TMA descriptors, grids. Everything was checked above."""

from __future__ import annotations

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
from hasten.ops.tiles import Band, as_band, tile_lists

# of the 50 MB: what the (sequence, head) pairs that are worked on together may hold of Q, dO and float32 dQ
_L2_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Shape:
    """Tile of the main kernel and how many blocks of rows it loads ahead."""

    block_m: int
    block_n: int
    ahead: int
    order: int = 1


#: by head_dim padded to a power of two
SHAPES = {64: Shape(128, 128, 2, 0), 128: Shape(64, 128, 2), 256: Shape(64, 64, 1)}


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call, the same names in dense and packed layout; blocks of rows as `backward_rows` counts them."""

    batch: int
    num_heads: int
    num_kv_heads: int
    columns: int
    num_tiles_q: int
    num_tiles_k: int
    num_blocks: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Sizes:
        """Read them off the tensors."""
        columns = max(64, 1 << (max(q.shape[-1], v.shape[-1]) - 1).bit_length())
        shape = SHAPES[columns]
        batch = q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
        num_tiles_q, num_tiles_k = -(-call.max_seqlen_q // shape.block_m), -(-call.max_seqlen_k // shape.block_n)
        num_blocks = q.shape[0] // shape.block_m + batch if call.is_packed else batch * num_tiles_q
        return cls(batch, q.shape[-2], k.shape[-2], columns, num_tiles_q, num_tiles_k, num_blocks)

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Gradients:
    """Gradients, as `call.py` says. dq is added up in an order that changes from run to run."""
    sizes = Sizes.of(q, k, v, call)
    shape = SHAPES[sizes.columns]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if 0 in (sizes.num_blocks, sizes.num_tiles_k, q.shape[0], k.shape[0], sizes.batch):
        return Gradients(dq.zero_(), dk.zero_(), dv.zero_(), _dsinks(dout, dlse, out, lse, call))
    dout = dout if _is_loadable(dout) else dout.contiguous()
    stats = q.new_empty((sizes.num_heads * sizes.num_blocks, 2 * shape.block_m), dtype=torch.float32)
    dq_sum = q.new_empty((sizes.num_heads * sizes.num_blocks, shape.block_m * sizes.columns), dtype=torch.float32)
    turns = q.new_empty((sizes.num_heads * sizes.num_blocks,), dtype=torch.int32)
    _before(dout, dlse, out, lse, stats, turns, sizes, call)
    _main((q, k, v, dout), (dk, dv), stats, dq_sum, turns, sizes, call)
    pieces = max(2, shape.block_m * sizes.columns // 4096)
    rows_grid = (pieces * sizes.num_tiles_q * sizes.num_heads * sizes.batch,)
    backward_after[rows_grid](
        dq_sum, turns, dq, call.cu_seqlens_q, _strides(dq), call.softmax_scale,
        sizes.num_tiles_q, sizes.num_heads, call.max_seqlen_q, sizes.num_blocks,
        HEAD_DIM=q.shape[-1], BLOCK_D=sizes.columns, BLOCK_M=shape.block_m, num_warps=4,
    )  # fmt: skip
    return Gradients(dq, dk, dv, _dsinks(dout, dlse, out, lse, call))


def _before(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, stats: Tensor, turns: Tensor, sizes: Sizes, call: Call
) -> None:
    block_m = SHAPES[sizes.columns].block_m
    backward_before[(sizes.num_tiles_q * sizes.num_heads * sizes.batch,)](
        out, dout, lse, dlse, stats, turns, call.cu_seqlens_q,
        _strides(out), _strides(dout), _row_strides(lse), None if dlse is None else _row_strides(dlse),
        sizes.num_tiles_q, sizes.num_heads, call.max_seqlen_q, sizes.num_blocks,
        HEAD_DIM_V=out.shape[-1], BLOCK_DV=sizes.columns, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip


def _main(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, Tensor],
    stats: Tensor,
    dq_sum: Tensor,
    turns: Tensor,
    sizes: Sizes,
    call: Call,
) -> None:
    q, k, v, dout = inputs
    shape = SHAPES[sizes.columns]
    lists, band, key_range = _lists(call, sizes, q.device)
    part = [64, sizes.columns] if shape.block_n == 128 else [64, sizes.columns // 2]  # of K, V: what `load_rows` loads
    piece = [min(64, shape.block_m * sizes.columns // 128), 64]  # of dQ: what a warpgroup stages at a time
    plain = gl.NVMMASharedLayout(0, 32, 2)
    sums = dq_sum.view(-1, 64)
    num_pairs = sizes.num_kv_heads * sizes.batch
    attention_backward[(sizes.num_tiles_k * num_pairs,)](
        rows_descriptor(q, shape.block_m, sizes.columns), rows_descriptor(k, *part), rows_descriptor(v, *part),
        rows_descriptor(dout, shape.block_m, sizes.columns),
        TensorDescriptor(stats, list(stats.shape), list(stats.stride()), [1, 2 * shape.block_m], plain),
        TensorDescriptor(sums, list(sums.shape), list(sums.stride()), piece, plain),
        rows_descriptor(outputs[0], *part), rows_descriptor(outputs[1], *part),
        turns, call.cu_seqlens_q, call.cu_seqlens_k, key_range, lists, band, (call.softmax_scale, call.softcap or None),
        sizes.num_tiles_k, num_pairs, _pairs_at_once(sizes, call), sizes.num_kv_heads,
        call.max_seqlen_q, call.max_seqlen_k, sizes.num_blocks,
        GROUP_SIZE=sizes.group_size, BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, AHEAD=shape.ahead,
        MASKED=_is_masked(call, shape), ORDER=shape.order, num_warps=4,
    )  # fmt: skip


def _is_masked(call: Call, shape: Shape) -> bool:
    """Whether any tile may have hidden cells: one loop that always masks beats two loops by its smaller code."""
    return call.is_packed or as_band(call.mask) != Band() or call.max_seqlen_k % shape.block_n != 0


def _pairs_at_once(sizes: Sizes, call: Call) -> int:
    """(sequence, K/V head) pairs whose rows fit the L2 together."""
    pair_bytes = sizes.group_size * call.max_seqlen_q * sizes.columns * (2 * 2 + 4)
    return min(max(1, _L2_BYTES // pair_bytes), sizes.num_kv_heads * sizes.batch)


def _lists(
    call: Call, sizes: Sizes, device: torch.device
) -> tuple[tuple[Any, ...] | None, tuple[Any, ...], Tensor | None]:
    """(columns of the index lists or None, (left, right) of a band, real keys of each sequence or None)."""
    band = as_band(call.mask)
    if band is not None:
        padding = None if band.padding is None else band.padding.key_range(call.max_seqlen_k, device)
        return None, (band.left, band.right), padding
    shape = SHAPES[sizes.columns]
    lengths = (call.max_seqlen_q, call.max_seqlen_k, shape.block_m, shape.block_n)
    lists = tile_lists(call.mask, sizes.batch, sizes.num_heads, *lengths, device)
    batch_stride = lists.num_cols * lists.heads if lists.batch > 1 else 0
    head_stride = lists.num_cols if lists.heads > 1 else 0
    return (
        (lists.col_ptr, lists.col_index, lists.col_bits, lists.bits, batch_stride, head_stride),
        (None, None),
        None,
    )


@lru_cache
def _layout(columns: int, is_half: bool, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(128, 16, rank)


def rows_descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of `tensor` for boxes of `rows` rows of one head, all its dims and zeros up to `columns`.

    Dense: (batch, heads, rows, dims). Packed: five dimensions, so that the hardware knows where a sequence ends
    inside the tensor. Row x of a sequence of n rows that begins at row s is found at (2^30, s + n, head,
    2^30 - n + x, dim): the bound of the fourth dimension is 2^30, and the strides of the first two take the 2^30 - n
    back, in address arithmetic that wraps at 2^64 (triton.tools.ragged_tma says more).
    """
    is_packed = tensor.ndim == 3
    layout = _layout(columns, tensor.dtype == torch.float16, 5 if is_packed else 4)
    row, head = tensor.stride(-3), tensor.stride(-2)
    heads, dims = tensor.shape[-2:]
    if is_packed:
        sizes, strides = [2**31 - 2**16, 2**31 - 2**16, heads, 2**30, dims], [2**34 - row, row, head, row, 1]
        return TensorDescriptor(tensor, sizes, strides, [1, 1, 1, rows, columns], layout)
    sizes, strides = [tensor.shape[0], heads, tensor.shape[1], dims], [tensor.stride(0), head, row, 1]
    return TensorDescriptor(tensor, sizes, strides, [1, 1, rows, columns], layout)


def _is_loadable(tensor: Tensor) -> bool:
    """Whether TMA can read it: 16-byte aligned rows, heads and base."""
    strides = tensor.stride()
    return (
        strides[-1] == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in strides[:-1])
    )


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides; packed tensors have no batch."""
    return (0 if tensor.ndim == 3 else tensor.stride(0)), tensor.stride(-3), tensor.stride(-2)


def _row_strides(statistic: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides of lse or dlse."""
    return (0 if statistic.ndim == 2 else statistic.stride(0)), statistic.stride(-1), statistic.stride(-2)


def _dsinks(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, call: Call) -> Tensor | None:
    """The sink is one more key whose value is zero: ds = p * (0 - delta)."""
    if call.sinks is None:
        return None
    delta = (dout.float() * out.float()).sum(-1)
    delta = delta.transpose(-1, -2) if dlse is None else delta.transpose(-1, -2) - dlse
    share = torch.where(lse == -torch.inf, 0.0, torch.exp(call.sinks[:, None] - lse)) * -delta
    return share.sum(-1) if lse.ndim == 2 else share.sum((0, 2))
