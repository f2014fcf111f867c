"""The cache write as one kernel: a program puts one token, all its K/V heads, where the view says it belongs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.kv import KV, QUANTIZED, PagedKV, RingKV
from hasten.ops.portable.launch import limits


@triton.jit
def _stored(rows, scale, MOST: tl.constexpr, DTYPE: tl.constexpr):
    """Rows (heads, dims) as 8-bit numbers of DTYPE in units of `scale` (heads,); see ops/append.py `quantize`."""
    value = tl.div_rn(rows, tl.where(scale == 0.0, 1.0, scale)[:, None] + 0.0 * rows)
    value = tl.minimum(tl.maximum(value, -MOST), MOST)
    if DTYPE.is_int():
        value = (value + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to the nearest whole number, ties to even
    return value.to(DTYPE)


@triton.jit
def _write_row(
    new, storage, scales, new_at, at, scale_at, new_head_stride, head_stride, scale_head_stride,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
    FIXED: tl.constexpr,
):  # fmt: skip
    """One token of keys or of values, from element `new_at` to element `at`."""
    heads, dims = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    in_heads = heads < NUM_HEADS
    inside = in_heads[:, None] & (dims < DIM)[None, :]
    wide = heads.to(tl.int64)
    rows = tl.load(new + new_at + wide[:, None] * new_head_stride + dims[None, :], mask=inside, other=0.0)
    target = storage + at + wide[:, None] * head_stride + dims[None, :]
    if scales is None:
        tl.store(target, rows, mask=inside)
    else:
        places = scales + scale_at + wide * scale_head_stride
        rows = rows.to(tl.float32)
        if FIXED:
            scale = tl.load(places, mask=in_heads, other=1.0)
        else:
            scale = tl.div_rn(tl.max(tl.abs(rows), 1), MOST)
            tl.store(places, scale, mask=in_heads)
        tl.store(target, _stored(rows, scale, MOST, storage.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("batch", "seqlen_q", "capacity"))
def append_token(
    k_ptr, v_ptr, keys, values, key_scales, value_scales, table, lengths, cu_seqlens_q,
    k_new_strides, v_new_strides, k_strides, v_strides, k_scale_strides, v_scale_strides, table_stride,
    batch, seqlen_q, capacity,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr, BATCH: tl.constexpr, PAGE_SIZE: tl.constexpr, RING: tl.constexpr, MOST: tl.constexpr,
    FIXED: tl.constexpr,
):  # fmt: skip
    """One token. Strides in elements: of new rows (batch, row, head), of the cache (page or batch entry, row, head)."""
    token = tl.program_id(0)
    if cu_seqlens_q is None:
        number, from_end = token // seqlen_q, seqlen_q - token % seqlen_q
        k_at = number.to(tl.int64) * k_new_strides[0] + (token % seqlen_q).to(tl.int64) * k_new_strides[1]
        v_at = number.to(tl.int64) * v_new_strides[0] + (token % seqlen_q).to(tl.int64) * v_new_strides[1]
    else:
        ends = tl.arange(0, BATCH)
        end = tl.load(cu_seqlens_q + 1 + ends, mask=ends < batch, other=2147483647)
        number = tl.sum((end <= token).to(tl.int32), 0)
        from_end = tl.load(cu_seqlens_q + 1 + tl.minimum(number, batch - 1)) - token
        k_at, v_at = token.to(tl.int64) * k_new_strides[1], token.to(tl.int64) * v_new_strides[1]
    if number < batch:
        length = tl.load(lengths + number)
        position = length - from_end
        if RING:
            is_kept = (position >= 0) & (position >= length - capacity)
        else:
            is_kept = (position >= 0) & (position < capacity)
        if is_kept:
            page, row = number.to(tl.int64), position.to(tl.int64)
            if RING:
                row = row % capacity
            if table is not None:
                page = tl.load(table + page * table_stride + row // PAGE_SIZE).to(tl.int64)
                row = row % PAGE_SIZE
            k_scale_at, v_scale_at = page * 0, page * 0
            k_scale_head, v_scale_head = 0, 0
            if key_scales is not None:
                k_scale_at, k_scale_head = page * k_scale_strides[0] + row * k_scale_strides[1], k_scale_strides[2]
                v_scale_at, v_scale_head = page * v_scale_strides[0] + row * v_scale_strides[1], v_scale_strides[2]
            _write_row(
                k_ptr, keys, key_scales, k_at, page * k_strides[0] + row * k_strides[1], k_scale_at,
                k_new_strides[2], k_strides[2], k_scale_head, NUM_HEADS, HEADS, DIM, BLOCK, MOST, FIXED,
            )  # fmt: skip
            _write_row(
                v_ptr, values, value_scales, v_at, page * v_strides[0] + row * v_strides[1], v_scale_at,
                v_new_strides[2], v_strides[2], v_scale_head, NUM_HEADS, HEADS, DIM_V, BLOCK_V, MOST, FIXED,
            )  # fmt: skip


def refuses(keys: KV) -> str | None:
    """Why the kernel cannot write to this cache, or None."""
    gpu = limits(keys.keys.device)
    if keys.keys.dtype == torch.float8_e4m3fn and gpu is not None and gpu.capability < 89:
        return "float8_e4m3fn needs compute capability 8.9"
    return "float64 is not offered" if keys.keys.dtype == torch.float64 else None


def write(k: Tensor, v: Tensor, keys: KV, cu_seqlens_q: Tensor | None, fixed_scales: bool) -> None:
    """Write all tokens of k and v; as `append.append_kv`."""
    num_heads, dim = k.shape[-2:]
    dim_v = v.shape[-1]
    tokens = k.shape[0] if k.ndim == 3 else k.shape[0] * k.shape[1]
    table = keys.block_table
    append_token[(tokens,)](
        k, v, keys.keys, keys.values, keys.key_scales, keys.value_scales, table, keys.cache_seqlens, cu_seqlens_q,
        _new_strides(k), _new_strides(v), keys.keys.stride()[:3], keys.values.stride()[:3],
        None if keys.key_scales is None else keys.key_scales.stride(),
        None if keys.value_scales is None else keys.value_scales.stride(), 0 if table is None else table.stride(0),
        keys.batch, 1 if k.ndim == 3 else k.shape[1], keys.capacity,
        NUM_HEADS=num_heads, HEADS=triton.next_power_of_2(num_heads), DIM=dim, DIM_V=dim_v,
        BLOCK=triton.next_power_of_2(dim), BLOCK_V=triton.next_power_of_2(dim_v),
        BATCH=triton.next_power_of_2(max(1, keys.batch)) if cu_seqlens_q is not None else 1,
        PAGE_SIZE=keys.page_size if isinstance(keys, PagedKV) else 0, RING=isinstance(keys, RingKV),
        MOST=QUANTIZED.get(keys.keys.dtype, 0.0), FIXED=fixed_scales, num_warps=2,
    )  # fmt: skip


def _new_strides(rows: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides of new tokens; packed ones have no batch."""
    return (0, rows.stride(0), rows.stride(1)) if rows.ndim == 3 else (rows.stride(0), rows.stride(1), rows.stride(2))
