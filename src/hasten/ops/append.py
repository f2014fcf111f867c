"""Writing the newest tokens into a KV cache: any view, quantised where the cache is.

Called by the engine once a layer and step, before `decode_attention`. On a GPU one kernel, no wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.errors import ArgumentError, ArgumentTypeError
from hasten.ops import choose
from hasten.ops.decode import check_no_gradients, check_packed, view_of
from hasten.ops.kv import KV, QUANTIZED, ContiguousKV, PagedKV, RingKV


def append_kv(
    k: Tensor, v: Tensor, keys: KV, *, cu_seqlens_q: Tensor | None = None, fixed_scales: bool = False
) -> None:
    """Write the last tokens of each sequence into the cache, in place.

    k: (batch, seqlen_q, num_kv_heads, head_dim), v: (..., head_dim_v), any strides; or packed (total_q, ...) with
    cu_seqlens_q int32 (batch + 1,). The dtype of the cache, or any floating one if it stores 8-bit numbers. Token i of
    a sequence goes to position cache_seqlens - seqlen_q + i: the lengths count the tokens of this call. Positions below
    0 (rows of padding: length 0) or above the capacity are not written; of more tokens than a ring holds, the last are.
    Two sequences must not write to one page: fork it first.

    8-bit caches: the scale of a token and head is its largest magnitude over 127 (int8) or 448 (float8_e4m3fn), and is
    written too. fixed_scales: the scales are read instead, and numbers beyond them saturate; a scale that several
    tokens share (an expanded tensor) needs it. Raises ArgumentError or ArgumentTypeError that names the argument.
    """
    _check(k, v, keys, cu_seqlens_q, fixed_scales)
    check_no_gradients(k=k, v=v)
    k, v = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (k, v))
    if type(k) is Tensor and not torch.compiler.is_compiling():
        with torch.cuda.device_of(k):
            _write(k, v, keys, cu_seqlens_q, fixed_scales)
        return
    scales = (keys.key_scales, keys.value_scales)
    _operator(
        k,
        v,
        keys.keys,
        keys.values,
        keys.block_table,
        keys.cache_seqlens,
        *scales,
        cu_seqlens_q,
        keys.kind,
        fixed_scales,
    )


def quantize(rows: Tensor, dtype: torch.dtype, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(rows as int8 or float8_e4m3fn, float32 scales (...,)) of rows (..., dim): rows = stored * scale, nearly.

    The definition of what `append_kv` writes. scales: given ones instead of the largest magnitude of each row.
    """
    most = QUANTIZED[dtype]
    wide = rows.float()
    if scales is None:
        largest = wide.abs().amax(-1)
        scales = largest / largest.new_full((), most)  # by a number, CUDA would multiply by its rounded reciprocal
    divided = wide / torch.where(scales == 0.0, 1.0, scales).unsqueeze(-1)
    divided = divided.clamp(-most, most)
    return (divided.round() if dtype == torch.int8 else divided).to(dtype), scales


def _write(k: Tensor, v: Tensor, keys: KV, cu_seqlens_q: Tensor | None, fixed_scales: bool) -> None:
    if choose.no_triton(k) is None and k.dtype != torch.float64 and max(k.shape[-1], v.shape[-1]) <= 1024:
        from hasten.ops.portable import append  # triton is loaded by those who use it

        if append.refuses(keys) is None:
            append.write(k, v, keys, cu_seqlens_q, fixed_scales)
            return
    _write_plain(k, v, keys, cu_seqlens_q, fixed_scales)


def _write_plain(k: Tensor, v: Tensor, keys: KV, cu_seqlens_q: Tensor | None, fixed_scales: bool) -> None:
    """The definition, in PyTorch."""
    sequence, position = _tokens(k, keys, cu_seqlens_q)
    lengths = keys.cache_seqlens.long()[sequence]
    kept = position >= (lengths - keys.capacity if isinstance(keys, RingKV) else 0)
    kept &= position >= 0
    if not isinstance(keys, RingKV):
        kept &= position < keys.capacity
    sequence, position = sequence[kept], position[kept]
    where = (sequence, position)
    if isinstance(keys, PagedKV):
        where = (keys.block_table[sequence, position // keys.page_size].long(), position % keys.page_size)
    elif isinstance(keys, RingKV):
        where = (sequence, position % keys.capacity)
    stores = ((k, keys.keys, keys.key_scales), (v, keys.values, keys.value_scales))
    for new, storage, scales in stores:
        rows = (new if new.ndim == 3 else new.flatten(0, 1))[kept]
        if scales is None:
            storage[where] = rows
            continue
        stored, measured = quantize(rows, storage.dtype, scales[where] if fixed_scales else None)
        storage.view(torch.int8)[where] = stored.view(torch.int8)
        if not fixed_scales:
            scales[where] = measured


def _tokens(k: Tensor, keys: KV, cu_seqlens_q: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sequence, position in it) of each new token, int64 (tokens,)."""
    lengths = keys.cache_seqlens.long()
    if cu_seqlens_q is None:
        batch, seqlen_q = k.shape[:2]
        sequence = torch.arange(batch, device=k.device).repeat_interleave(seqlen_q)
        return sequence, (lengths[:, None] - seqlen_q + torch.arange(seqlen_q, device=k.device)).flatten()
    token = torch.arange(k.shape[0], device=k.device)
    ends = cu_seqlens_q.long()
    sequence = torch.searchsorted(ends, token, right=True) - 1
    return sequence, lengths[sequence] - ends[sequence + 1] + token


@torch.library.custom_op("hasten::append_kv", mutates_args=("keys", "values", "key_scales", "value_scales"))
def _operator(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    cu_seqlens_q: Tensor | None,
    kind: str,
    fixed_scales: bool,
) -> None:
    view = view_of(kind, keys, values, block_table, cache_seqlens, key_scales, value_scales)
    with torch.cuda.device_of(k):
        _write(k, v, view, cu_seqlens_q, fixed_scales)


@_operator.register_fake
def _(*terms: object) -> None:
    return None


def _check(k: Tensor, v: Tensor, keys: KV, cu_seqlens_q: Tensor | None, fixed_scales: bool) -> None:
    if not isinstance(keys, PagedKV | ContiguousKV):
        raise ArgumentTypeError("keys", "PagedKV, ContiguousKV or RingKV", type(keys).__name__, "make a view first")
    layout = "(batch, seqlen_q, num_kv_heads, dim)" if cu_seqlens_q is None else "(total_q, num_kv_heads, dim)"
    for name, new, storage in (("k", k, keys.keys), ("v", v, keys.values)):
        if not isinstance(new, Tensor) or not new.dtype.is_floating_point:
            got = new.dtype if isinstance(new, Tensor) else type(new).__name__
            raise ArgumentTypeError(name, f"a floating tensor {layout}", got, "convert it with .to()")
        if new.ndim != (4 if cu_seqlens_q is None else 3) or new.shape[-2:] != storage.shape[-2:]:
            want = f"{layout} with {tuple(storage.shape[-2:])} at the end"
            raise ArgumentError(name, want, tuple(new.shape), "packed tokens need cu_seqlens_q, others none")
        if new.shape[:-1] != k.shape[:-1]:
            raise ArgumentError(name, f"{tuple(k.shape[:-1])} as k has", tuple(new.shape[:-1]), f"it is {layout}")
        if new.device != storage.device:
            raise ArgumentError(name, f"the device of the cache, {storage.device}", new.device, "move it")
        if storage.dtype not in QUANTIZED and new.dtype != storage.dtype:
            raise ArgumentTypeError(
                name, f"the dtype of the cache, {storage.dtype}", new.dtype, "convert it with .to()"
            )
    if cu_seqlens_q is not None:
        check_packed(k, cu_seqlens_q)
    batch = k.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if batch != keys.batch:
        raise ArgumentError("k", f"{keys.batch} sequences as the cache has", batch, f"the layout is {layout}")
    shared = [
        name
        for name, scales in (("key_scales", keys.key_scales), ("value_scales", keys.value_scales))
        if scales is not None
        and any(n > 1 and step == 0 for n, step in zip(scales.shape, scales.stride(), strict=True))
    ]
    if shared and not fixed_scales:
        raise ArgumentError(
            shared[0], "a scale of its own for each token and head", "an expanded one", "fixed_scales=True"
        )
