"""Host side of the Hopper forward: outputs, TMA descriptors, grid. Everything was checked above."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hasten.ops.call import Call
from hasten.ops.hopper.forward import attention_forward
from hasten.ops.hopper.table import Tile, forward_tile
from hasten.ops.tiles import Band, as_band, tile_lists

# keys and values that one group of heads may hold in the L2 cache (50 MB) beside what else passes through it
_L2_BYTES = 32 * 2**20


def block_d(q: Tensor, v: Tensor) -> int:
    """The tile that holds a row of q, k and v: TMA fills the columns past head_dim with zeros."""
    return max(64, 1 << (max(q.shape[-1], v.shape[-1]) - 1).bit_length())


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """CTAs of a persistent kernel: one for each."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def _layout(columns: int, is_half: bool) -> gl.NVMMASharedLayout:
    dtype = gl.float16 if is_half else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([64, columns], dtype)


def descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor (batch, heads, rows, head_dim) of a dense or packed tensor, for boxes of (rows, columns)."""
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(0)
    batch, seqlen, heads, head_dim = tensor.shape
    # the stride of a dimension of size 1 may be any number, and TMA still looks at it
    strides = [stride if size > 1 else head_dim for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return TensorDescriptor(
        tensor,
        [batch, heads, seqlen, head_dim],
        [strides[0], strides[2], strides[1], 1],
        [1, 1, rows, columns],
        _layout(columns, tensor.dtype == torch.float16),
    )


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides; packed tensors have no batch."""
    if tensor.ndim == 3:
        return 0, tensor.stride(0), tensor.stride(1)
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def _row_strides(lse: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides of lse."""
    return (0 if lse.ndim == 2 else lse.stride(0)), 1, lse.stride(-2)


def _lists(
    call: Call, batch: int, num_heads: int, line: Tile, device: torch.device
) -> tuple[tuple[Any, ...] | None, tuple[Any, ...], Tensor | None]:
    """(index lists or None, (left, right) of a band, real keys of each sequence or None)."""
    band = as_band(call.mask)
    if band is not None:
        padding = None if band.padding is None else band.padding.key_range(call.max_seqlen_k, device)
        return None, (band.left, band.right), padding
    sizes = (call.max_seqlen_q, call.max_seqlen_k, line.block_m, line.block_n)
    lists = tile_lists(call.mask, batch, num_heads, *sizes, device)
    batch_stride = lists.num_rows * lists.heads if lists.batch > 1 else 0
    head_stride = lists.num_rows if lists.heads > 1 else 0
    own = (lists.row_ptr, lists.row_index, lists.row_bits, lists.bits, batch_stride, head_stride, lists.keys_seen)
    return own, (Band().left, Band().right), None


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), as `call.py` says."""
    columns = block_d(q, v)
    line = forward_tile(columns)
    num_heads, num_kv_heads = q.shape[-2], k.shape[-2]
    batch = q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(
        (num_heads, q.shape[0]) if call.is_packed else (batch, num_heads, q.shape[1]), dtype=torch.float32
    )
    lists, band, key_range = _lists(call, batch, num_heads, line, q.device)
    num_tiles = -(-call.max_seqlen_q // line.block_m)
    num_items = num_tiles * batch
    if call.is_packed:  # tiles are counted on the device; so many there are at most
        num_items = min(num_items, q.shape[0] // line.block_m + batch)
    head_bytes = call.max_seqlen_k * 2 * columns * q.element_size()
    heads_per_group = max(1, _L2_BYTES // head_bytes) * (num_heads // num_kv_heads)
    attention_forward[(min(num_items * num_heads, num_multiprocessors(q.device)),)](
        descriptor(q, 64, columns), descriptor(k, line.block_n, columns), descriptor(v, line.block_n, columns),
        descriptor(out, 64, columns), out if call.is_packed else None, lse, call.sinks,
        torch.zeros(1, dtype=torch.int32, device=q.device),
        call.cu_seqlens_q, call.cu_seqlens_k, key_range, lists, band, call.softmax_scale, call.softcap or None,
        _strides(out), _row_strides(lse), num_tiles, num_heads, batch, call.max_seqlen_q, call.max_seqlen_k,
        min(heads_per_group, num_heads * batch),
        GROUP_SIZE=num_heads // num_kv_heads, HEAD_DIM_V=v.shape[-1], BLOCK_D=columns, BLOCK_N=line.block_n,
        CONSUMERS=line.consumers, STAGES=line.stages, Q_STAGES=line.q_stages,
        CONSUMER_REGISTERS=line.consumer_registers, PRODUCER_REGISTERS=line.producer_registers, num_warps=4,
    )  # fmt: skip
    return out, lse
