"""The border of attention: wrong shapes, dtypes and devices become one clear line here, nowhere below."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hasten.errors import ArgumentError, ArgumentTypeError
from hasten.masks import Mask

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    """Raise unless q, k, v fit each other in the dense or packed layout."""
    layout = "(total, heads, head_dim)" if packed else "(batch, seqlen, heads, head_dim)"
    ndim = 3 if packed else 4
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(name, f"a tensor {layout}", type(tensor).__name__, "convert it first")
        shape, dtype = tensor.shape, tensor.dtype
        if len(shape) != ndim:
            hint = "leave cu_seqlens out" if packed else "packed sequences need cu_seqlens_q and cu_seqlens_k"
            raise ArgumentError(name, f"shape {layout}", f"shape {tuple(shape)}", hint)
        if dtype not in DTYPES:
            raise ArgumentTypeError(name, "a floating dtype of 16, 32 or 64 bits", dtype, "convert it with .to()")
        if tensor is not q and dtype != q.dtype:
            raise ArgumentTypeError(name, f"the dtype of q, {q.dtype}", dtype, "convert one of them")
        if tensor is not q and tensor.device != q.device:
            raise ArgumentError(name, f"the device of q, {q.device}", tensor.device, "move one of them")
        if shape[-1] == 0 or shape[-2] == 0:
            raise ArgumentError(name, "at least one head of at least one dimension", tuple(shape), "check the split")
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    if of_q[-1] != of_k[-1]:
        raise ArgumentError("k", f"head_dim {of_q[-1]} as q has", of_k[-1], "only v may have another")
    if of_k[:-1] != of_v[:-1]:
        raise ArgumentError("v", f"{tuple(of_k[:-1])} as k has", tuple(of_v[:-1]), f"the layout is {layout}")
    if of_q[-2] % of_k[-2]:
        hint = "each K/V head serves the same number of query heads"
        raise ArgumentError("q", f"a multiple of {of_k[-2]} heads", of_q[-2], hint)
    if not packed and of_q[0] != of_k[0]:
        raise ArgumentError("k", f"batch {of_q[0]} as q has", of_k[0], f"the layout is {layout}")


def check_packing(
    q: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlens: tuple[int | None, ...]
) -> bool:
    """True if packed. Raise unless both cu_seqlens are int vectors of one length on the device of q."""
    if cu_seqlens_q is None and cu_seqlens_k is None:
        for name, longest in zip(("max_seqlen_q", "max_seqlen_k"), max_seqlens, strict=True):
            if longest is not None:
                raise ArgumentError(name, "nothing, for dense q and k", longest, "it belongs to cu_seqlens")
        return False
    for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentTypeError(name, "an int32 tensor", got, "give both cu_seqlens_q and cu_seqlens_k")
        if value.ndim != 1 or value.shape[0] < 1:
            raise ArgumentError(
                name, "shape (batch + 1,)", tuple(value.shape), "it starts with 0 and ends with the total"
            )
        if isinstance(q, Tensor) and value.device != q.device:
            raise ArgumentError(name, f"the device of q, {q.device}", value.device, "move it once, before the layers")
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        got = f"{cu_seqlens_k.shape[0]} for {cu_seqlens_q.shape[0]}"
        raise ArgumentError("cu_seqlens_k", "as many entries as cu_seqlens_q", got, "they count the same sequences")
    return True


def check_numbers(softmax_scale: float | None, softcap: float | None, dropout_p: float) -> None:
    """Raise unless the scalar options are numbers, finite and in range."""
    for name, value in (("softmax_scale", softmax_scale), ("softcap", softcap), ("dropout_p", dropout_p)):
        is_left_out = value is None and name != "dropout_p"
        if not is_left_out and not isinstance(value, int | float) and not hasattr(value, "__float__"):
            raise ArgumentTypeError(name, "a number", repr(value), "see the docstring of attention for its range")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ArgumentError("softmax_scale", "a finite number", softmax_scale, "head_dim ** -0.5 is the default")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ArgumentError("softcap", "a number > 0 or None", softcap, "None means no soft cap")
    if not 0.0 <= dropout_p < 1.0:
        raise ArgumentError("dropout_p", "0 <= dropout_p < 1", dropout_p, "it is the share of cells dropped")


def check_mask(mask: Mask, q: Tensor, k: Tensor, batch: int, packed: bool) -> None:
    """Raise unless `mask` is a mask that fits the sizes."""
    if not isinstance(mask, Mask):
        raise ArgumentTypeError("mask", "a hasten mask", type(mask).__name__, "wrap a bool tensor in hasten.Dense")
    if not packed:
        mask.check(batch, q.shape[-2], q.shape[1], k.shape[1])


def check_extras(
    q: Tensor, k: Tensor, sinks: Tensor | None, bias: Tensor | None, slopes: Tensor | None, packed: bool
) -> None:
    """Raise unless sinks, bias and ALiBi slopes fit the heads and lengths."""
    num_heads = q.shape[-2]
    for name, value in (("sinks", sinks), ("bias", bias), ("bias.slopes", slopes)):
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            hint = "a bool mask goes in mask=hasten.Dense(...)" if name == "bias" else "convert it with .float()"
            raise ArgumentTypeError(name, "a floating tensor", got, hint)
        if value.device != q.device:
            raise ArgumentError(name, f"the device of q, {q.device}", value.device, "move it")
    if sinks is not None and sinks.shape != (num_heads,):
        raise ArgumentError("sinks", f"shape ({num_heads},)", tuple(sinks.shape), "one number a query head")
    batch = 1 if packed else q.shape[0]
    if slopes is not None and slopes.shape not in ((num_heads,), (1, num_heads), (batch, num_heads)):
        raise ArgumentError("bias.slopes", f"shape ({num_heads},)", tuple(slopes.shape), "one slope a query head")
    if bias is None:
        return
    if packed:
        raise ArgumentError(
            "bias", "None or ALiBi with packed sequences", tuple(bias.shape), "pad the sequences instead"
        )
    full = (q.shape[0], num_heads, q.shape[1], k.shape[1])
    sizes = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if bias.ndim > 4 or any(size not in (1, want) for size, want in zip(sizes, full, strict=True)):
        raise ArgumentError(
            "bias", f"broadcastable to {full}", tuple(bias.shape), "it is (batch, heads, queries, keys)"
        )
