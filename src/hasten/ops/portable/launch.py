"""Host side of the portable kernels: outputs, strides, grids. Everything was checked above."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton import TritonError

from hasten.ops import dropout
from hasten.ops.call import Call, Gradients
from hasten.ops.portable.bias import attention_dbias
from hasten.ops.portable.forward import attention_forward
from hasten.ops.portable.gradients import attention_delta, attention_dkdv, attention_dq
from hasten.ops.portable.table import Kind, Limits, Tile, tile
from hasten.ops.tiles import Band, as_band, tile_lists

__all__ = ["Sizes", "TritonError", "backward", "forward", "limits"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call, the same names in dense and packed layout."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Sizes:
        """Read them off the tensors."""
        batch = q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
        return cls(batch, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time constants that every attention kernel takes."""
        return {
            "GROUP_SIZE": self.num_heads // self.num_kv_heads,
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "BLOCK_D": _padded(self.head_dim),
            "BLOCK_DV": _padded(self.head_dim_v),
        }


def _padded(head_dim: int) -> int:
    """head_dim as a tile size: a power of two, at least what the matrix units take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides; packed tensors have no batch."""
    return (
        (0, tensor.stride(0), tensor.stride(1))
        if tensor.ndim == 3
        else (tensor.stride(0), tensor.stride(1), tensor.stride(2))
    )


def _row_strides(statistic: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides of lse, delta or dlse."""
    batch = 0 if statistic.ndim == 2 else statistic.stride(0)
    return batch, statistic.stride(-1), statistic.stride(-2)


def _terms(call: Call) -> tuple[Any, ...]:
    """(scale, softcap, dropout threshold, 1 / (1 - p), four strides of the bias), None for what is not there."""
    strides: tuple[Any, ...] = (None, None, None, None)
    if call.bias is not None:
        strides = tuple(
            0 if size == 1 else stride for size, stride in zip(call.bias.shape, call.bias.stride(), strict=True)
        )
    drops = (None, None) if call.seed is None else (dropout.threshold(call.dropout_p), 1.0 / (1.0 - call.dropout_p))
    return (call.softmax_scale, call.softcap or None, *drops, *strides)


def _slope_stride(call: Call) -> int:
    return 0 if call.slopes is None or call.slopes.shape[0] == 1 else call.slopes.shape[1]


def _lists(
    call: Call, sizes: Sizes, block: Tile, device: torch.device, columns: bool
) -> tuple[tuple[Any, ...] | None, tuple[Any, ...]]:
    """(index lists or None, band) of the mask for one tile shape; `columns` for dk and dv."""
    band = as_band(call.mask)
    if band is not None:
        return None, (band.left, band.right)
    lists = tile_lists(
        call.mask,
        sizes.batch,
        sizes.num_heads,
        call.max_seqlen_q,
        call.max_seqlen_k,
        block.block_m,
        block.block_n,
        device,
    )
    per_head = lists.num_cols if columns else lists.num_rows
    own = (
        (lists.col_ptr, lists.col_index, lists.col_bits)
        if columns
        else (lists.row_ptr, lists.row_index, lists.row_bits)
    )
    batch_stride = per_head * lists.heads if lists.batch > 1 else 0
    return (*own, lists.bits, batch_stride, per_head if lists.heads > 1 else 0), (None, None)


def _key_range(call: Call, device: torch.device) -> Tensor | None:
    band = as_band(call.mask) or Band()
    return None if band.padding is None else band.padding.key_range(call.max_seqlen_k, device)


@lru_cache
def limits(device: torch.device) -> Limits | None:
    """What the GPU allows; None where the kernels are interpreted."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    capability = 0 if torch.version.hip else 10 * properties.major + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Limits(capability, shared)


def _tile(phase: str, q: Tensor, sizes: Sizes, call: Call) -> Tile:
    extras = (call.bias, call.slopes, call.seed)
    rich = call.softcap or any(extra is not None for extra in extras) or as_band(call.mask) is None
    kind: Kind = "rich" if rich else "plain"
    block_d = max(_padded(sizes.head_dim), _padded(sizes.head_dim_v))
    return tile(phase, q.element_size(), block_d, kind, limits(q.device))


def _options(block: Tile) -> dict[str, Any]:
    """Tile shape and precision: float32 keeps all its bits (tf32 has an error of 3e-4)."""
    return {
        "BLOCK_M": block.block_m,
        "BLOCK_N": block.block_n,
        "PRECISION": "ieee",
        "num_warps": block.num_warps,
        "num_stages": block.num_stages,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), as `call.py` says."""
    sizes = Sizes.of(q, k, v, call)
    out = q.new_empty((*q.shape[:-1], sizes.head_dim_v))
    lse = q.new_empty(
        (q.shape[1], q.shape[0]) if call.is_packed else (q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32
    )
    block = _tile("forward", q, sizes, call)
    lists, band = _lists(call, sizes, block, q.device, columns=False)
    num_tiles = -(-call.max_seqlen_q // block.block_m)
    grid = (num_tiles * sizes.num_heads * sizes.batch,)
    attention_forward[grid](
        q, k, v, out, lse,
        call.sinks, call.bias, call.slopes, call.seed,
        call.cu_seqlens_q, call.cu_seqlens_k, _key_range(call, q.device), lists, band, _terms(call),
        _strides(q), _strides(k), _strides(v), _strides(out), _row_strides(lse), _slope_stride(call),
        num_tiles, sizes.num_heads, call.max_seqlen_q, call.max_seqlen_k,
        **sizes.constants, **_options(block),
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Gradients:
    """Gradients, as `call.py` says; deterministic."""
    sizes = Sizes.of(q, k, v, call)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    delta = _delta(dout, dlse, out, lse, sizes, call)
    saved = (q, k, v, dout, lse, delta)
    dk, dv = _dkdv(saved, sizes, call)
    dq, dslopes = _dq(saved, sizes, call)
    dbias = _dbias(saved, sizes, call) if call.bias is not None and call.needs_bias else None
    dsinks = None
    if call.sinks is not None:  # the sink is one more key whose value is zero: ds = p * (0 - delta)
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(call.sinks[:, None] - lse)) * -delta
        dsinks = share.sum(-1) if lse.ndim == 2 else share.sum((0, 2))
    return Gradients(dq, dk, dv, dsinks, dbias, dslopes)


def _delta(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sizes: Sizes, call: Call) -> Tensor:
    delta = torch.empty_like(lse)
    block_m = 4096 // _padded(sizes.head_dim_v)
    num_tiles = -(-call.max_seqlen_q // block_m)
    attention_delta[(num_tiles * sizes.num_heads * sizes.batch,)](
        out, dout, dlse, delta, call.cu_seqlens_q,
        _strides(out), _strides(dout), _row_strides(lse), None if dlse is None else _row_strides(dlse),
        num_tiles, sizes.num_heads, call.max_seqlen_q,
        HEAD_DIM_V=sizes.head_dim_v, BLOCK_DV=_padded(sizes.head_dim_v), BLOCK_M=block_m,
    )  # fmt: skip
    return delta


def _dkdv(saved: tuple[Tensor, ...], sizes: Sizes, call: Call) -> tuple[Tensor, Tensor]:
    q, k, v, dout, lse, delta = saved
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    block = _tile("dkdv", q, sizes, call)
    lists, band = _lists(call, sizes, block, q.device, columns=True)
    num_tiles = -(-call.max_seqlen_k // block.block_n)
    attention_dkdv[(num_tiles * sizes.num_kv_heads * sizes.batch,)](
        q, k, v, dout, lse, delta, dk, dv,
        call.bias, call.slopes, call.seed,
        call.cu_seqlens_q, call.cu_seqlens_k, _key_range(call, q.device), lists, band, _terms(call),
        _strides(q), _strides(k), _strides(v), _strides(dout), _strides(dk), _strides(dv), _row_strides(lse),
        _slope_stride(call),
        num_tiles, sizes.num_kv_heads, call.max_seqlen_q, call.max_seqlen_k,
        **sizes.constants, **_options(block),
    )  # fmt: skip
    return dk, dv


def _dq(saved: tuple[Tensor, ...], sizes: Sizes, call: Call) -> tuple[Tensor, Tensor | None]:
    q, k, v, dout, lse, delta = saved
    dq = q.new_empty(q.shape)
    dslope = None if call.slopes is None else torch.empty_like(lse)
    block = _tile("dq", q, sizes, call)
    lists, band = _lists(call, sizes, block, q.device, columns=False)
    num_tiles = -(-call.max_seqlen_q // block.block_m)
    attention_dq[(num_tiles * sizes.num_heads * sizes.batch,)](
        q, k, v, dout, lse, delta, dq, dslope,
        call.bias, call.slopes, call.seed,
        call.cu_seqlens_q, call.cu_seqlens_k, _key_range(call, q.device), lists, band, _terms(call),
        _strides(q), _strides(k), _strides(v), _strides(dout), _strides(dq), _row_strides(lse), _slope_stride(call),
        num_tiles, sizes.num_heads, call.max_seqlen_q, call.max_seqlen_k,
        **sizes.constants, **_options(block),
    )  # fmt: skip
    if dslope is None or call.slopes is None:
        return dq, None
    total = dslope.sum(-1)
    return dq, total.reshape(-1, sizes.num_heads).sum_to_size(call.slopes.shape)


def _dbias(saved: tuple[Tensor, ...], sizes: Sizes, call: Call) -> Tensor:
    q, k, v, dout, lse, delta = saved
    assert call.bias is not None
    block = _tile("dbias", q, sizes, call)
    lists, band = _lists(call, sizes, block, q.device, columns=False)
    num_tiles = -(-call.max_seqlen_q // block.block_m)
    one = [size == 1 for size in call.bias.shape]
    sizes_out = (
        call.bias.shape[0],
        call.bias.shape[1],
        num_tiles if one[2] else call.bias.shape[2],
        call.bias.shape[3],
    )
    dbias = torch.zeros(sizes_out, dtype=torch.float32, device=q.device)
    attention_dbias[(num_tiles * sizes_out[0] * sizes_out[1],)](
        q, k, v, dout, lse, delta, dbias,
        call.bias, call.seed, _key_range(call, q.device), lists, band, _terms(call),
        _strides(q), _strides(k), _strides(v), _strides(dout), dbias.stride()[:3], _row_strides(lse),
        num_tiles, sizes.batch, sizes.num_heads, call.max_seqlen_q, call.max_seqlen_k,
        ONE_BATCH=one[0], ONE_HEAD=one[1], ONE_ROW=one[2], ONE_KEY=one[3],
        **sizes.constants, **_options(block),
    )  # fmt: skip
    return dbias.sum(2, keepdim=True).to(call.bias.dtype) if one[2] else dbias.to(call.bias.dtype)
