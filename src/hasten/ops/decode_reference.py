"""The oracle of decode attention: gather the tokens of each sequence, then attention by its definition.

`attend` is the forward of an implementation of `call.py`: the reference, or the tiled PyTorch path, which makes the
same function the way to decode on a CPU. Lengths are read on the host. Keys of a contiguous cache are not copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from hasten.errors import ArgumentError
from hasten.masks import Causal, Full, Mask, Window
from hasten.ops.call import Call
from hasten.ops.decode_call import DecodeCall
from hasten.ops.kv import KV, ContiguousKV, RingKV, is_quantized, rows_of

Attend = Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor]]


def forward(q: Tensor, keys: KV, call: DecodeCall, attend: Attend) -> tuple[Tensor, Tensor]:
    """(out, lse) in the layouts of `decode.decode_attention`. Raises ArgumentError for lengths above the capacity."""
    lengths = tuple(keys.cache_seqlens.tolist())  # changes with every token: there is nothing to keep
    if not isinstance(keys, RingKV) and max(lengths, default=0) > keys.capacity:
        raise ArgumentError("cache_seqlens", f"at most {keys.capacity}, the capacity", max(lengths), "add pages first")
    if _is_even(keys, lengths, call):
        k, v = (rows[:, : lengths[0]] for rows in (keys.keys, keys.values))
        out, lse = attend(q, k.to(q.dtype), v.to(q.dtype), _attention(call, q.shape[1], lengths[0], 0))
        return out, lse
    wide = torch.promote_types(q.dtype, torch.float32) if is_quantized(keys) else q.dtype
    out = q.new_zeros((*q.shape[:-1], keys.values.shape[-1]))
    shape = (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(shape, -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for number, (rows, length) in enumerate(zip(_rows(q, call), lengths, strict=True)):
        own = q[None, rows] if q.ndim == 3 else q[number : number + 1]
        seqlen_q = own.shape[1]
        begin = 0 if call.left is None else max(0, length - seqlen_q - call.left)
        if isinstance(keys, RingKV):
            begin = max(begin, length - keys.capacity)
        if seqlen_q == 0:
            continue
        k, v = rows_of(keys, number, begin, max(begin, length), wide)
        one_out, one_lse = attend(own.to(wide), k[None], v[None], _attention(call, seqlen_q, k.shape[0], number))
        if q.ndim == 3:
            out[rows], lse[:, rows] = one_out[0], one_lse[0]
        else:
            out[number], lse[number] = one_out[0], one_lse[0]
    return out, lse


def _rows(q: Tensor, call: DecodeCall) -> list[slice]:
    """The rows of q of each sequence, packed or not."""
    if call.cu_seqlens_q is None:
        return [slice(0, q.shape[1])] * q.shape[0]
    return [slice(*ends) for ends in itertools.pairwise(call.cu_seqlens_q.tolist())]


def _is_even(keys: KV, lengths: tuple[int, ...], call: DecodeCall) -> bool:
    """True if one dense call serves the whole batch: plain numbers in order, all of one length."""
    is_plain = type(keys) is ContiguousKV and keys.key_scales is None and call.cu_seqlens_q is None
    is_plain = is_plain and (call.slopes is None or call.slopes.shape[0] == 1)
    return is_plain and len(set(lengths)) == 1 and lengths[0] > 0


def _attention(call: DecodeCall, seqlen_q: int, seqlen_k: int, sequence: int) -> Call:
    """The call of `attention` over keys that end where the sequence ends."""
    slopes = call.slopes
    if slopes is not None and slopes.shape[0] > 1:
        slopes = slopes[sequence : sequence + 1]
    return Call(
        mask=_mask(call),
        softmax_scale=call.softmax_scale,
        max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k,
        softcap=call.softcap,
        sinks=call.sinks,
        slopes=slopes,
    )


def _mask(call: DecodeCall) -> Mask:
    if call.left is None and call.right is None:
        return Full()
    return Causal() if call.left is None and call.right == 0 else Window(call.left, call.right)
