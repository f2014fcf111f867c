"""The public decode attention: checks, defaults, the choice of an implementation, the operator that tracing sees.

Called by the engine and by users with their own cache. Never looks at lengths or tables on the host unless the chosen
implementation does (blockwise and reference, which are for the CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten import config
from hasten.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from hasten.masks import Causal, Mask
from hasten.ops import checks, choose, decode_reference, host
from hasten.ops.alibi import ALiBi
from hasten.ops.decode_call import DecodeCall
from hasten.ops.kv import KV, ContiguousKV, PagedKV, RingKV, is_quantized
from hasten.ops.tiles import as_band

#: the implementations, and for each device type the order in which they are asked
NAMES = ("portable", "blockwise", "reference")
ORDER = {"cuda": NAMES}
ORDER_ELSEWHERE = ("blockwise", "reference")

Forward = Callable[[Tensor, KV, DecodeCall], tuple[Tensor, Tensor]]


def decode_attention(
    q: Tensor,
    keys: KV,
    mask: Mask | None = None,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: ALiBi | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    shared_prefix: int = 0,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of the newest tokens of each sequence over its KV cache.

    q: (batch, seqlen_q, num_heads, head_dim), the last seqlen_q tokens of each sequence, which are in the cache already
    (`append_kv`); or packed (total_q, num_heads, head_dim) with cu_seqlens_q int32 (batch + 1,) and max_seqlen_q, for
    sequences with different numbers of new tokens. Dtype float16, bfloat16, float32 or float64, that of the cache
    unless it stores 8-bit numbers. keys: `PagedKV`, `ContiguousKV` or `RingKV`; num_heads is a multiple of their heads.

    Query i of a sequence stands at position cache_seqlens - seqlen_q + i. mask: Causal() by default, Full(), Window, or
    an `&` of these; a ring takes Window(left, 0) with left + seqlen_q <= capacity. softmax_scale, softcap, sinks and
    bias=ALiBi(slopes) as in `hasten.attention`.
    shared_prefix: how many first tokens all sequences have in common, a multiple of page_size: every row of the block
    table begins with the same pages (a sequence shorter than that, as far as it goes). They are read once for the whole
    batch, through the first row of the table. It changes speed and rounding, nothing else; it is not used with a
    window, nor above 16 queries a sequence. See `common_prefix`.

    Returns out (batch, seqlen_q, num_heads, head_dim_v) or (total_q, ...), contiguous; with return_lse also lse,
    float32 (batch, num_heads, seqlen_q) or (num_heads, total_q). A row that sees no key, as every row of a sequence of
    length 0, gives out = 0 and lse = -inf. Nothing in the cache but visible keys can reach an output.
    No gradients: an input that requires them raises. Deterministic: for calls of up to 16 queries a sequence without
    shared_prefix, the bits of a row depend on its own sequence alone, not on the batch or the capacity.
    On a GPU nothing waits for the device, and the call can be captured in a CUDA graph and replayed with other lengths
    and tables; lengths above the capacity count as the capacity there, and raise on a CPU.
    """
    mask = Causal() if mask is None else mask
    if bias is not None and not isinstance(bias, ALiBi):
        raise ArgumentTypeError("bias", "ALiBi(slopes) or None", type(bias).__name__, "use hasten.attention")
    slopes = None if bias is None else bias.slopes
    check_queries(q, keys, cu_seqlens_q, max_seqlen_q)
    checks.check_numbers(softmax_scale, softcap, 0.0)
    checks.check_extras(q, q, sinks, None, slopes, q.ndim == 3)
    check_no_gradients(q=q, keys=keys.keys, values=keys.values, sinks=sinks, slopes=slopes)
    q = q if q.stride(-1) == 1 or q.shape[-1] == 1 else q.contiguous()
    longest = _longest(q, cu_seqlens_q, max_seqlen_q)
    left, right = _band(mask, keys, longest)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if softmax_scale <= 0.0:  # implementations take the row maximum before scaling
        q, softmax_scale = (-q, -softmax_scale) if softmax_scale < 0.0 else (q * 0.0, 1.0)
    call = DecodeCall(
        softmax_scale=softmax_scale,
        max_seqlen_q=longest,
        left=left,
        right=right,
        softcap=0.0 if softcap is None else float(softcap),
        sinks=None if sinks is None else sinks.to(wide).contiguous(),
        slopes=None if slopes is None else slopes.to(wide).reshape(-1, q.shape[-2]).contiguous(),
        cu_seqlens_q=cu_seqlens_q,
        shared_prefix=_prefix(shared_prefix, keys, left, cu_seqlens_q),
    )
    out, lse = _run(q, keys, call, choose_decode(q, keys, call, implementation)[0])
    return (out, lse) if return_lse else out


def choose_decode(q: Tensor, keys: KV, call: DecodeCall, forced: str | None) -> tuple[str, dict[str, str]]:
    """(name of the implementation, why each one before it in the order was passed over); as `choose.choose`.

    A name in HASTEN_IMPLEMENTATION that only other ops have, as hopper, leaves the choice free here.
    """
    if forced is None:
        forced = config.forced_implementation()
        forced = None if forced in set(choose.NAMES) - set(NAMES) else forced
    if forced is not None and forced not in NAMES:
        raise ArgumentError("implementation", f"one of {', '.join(NAMES)}", repr(forced), "or leave it out")
    refused: dict[str, str] = {}
    for name in [forced] if forced else ORDER.get(q.device.type, ORDER_ELSEWHERE):
        reason = _refusal(name, q, keys, call)
        if reason is None:
            return name, refused
        if forced:
            raise UnsupportedError(forced, reason, "leave implementation out to have another one chosen")
        refused[name] = reason
    raise UnsupportedError("any", "; ".join(f"{name}: {why}" for name, why in refused.items()), "see decode_attention")


def load(name: str) -> Forward:
    """The forward of that name; triton is imported by those who use it."""
    if name == "portable":
        from hasten.ops.portable import decode_launch

        return decode_launch.forward
    from hasten.ops import blockwise, reference

    attend = blockwise.forward if name == "blockwise" else reference.forward
    return partial(decode_reference.forward, attend=attend)


def _refusal(name: str, q: Tensor, keys: KV, call: DecodeCall) -> str | None:
    if name != "portable":
        return None
    reason = choose.no_triton(q)
    if reason is not None:
        return reason
    from hasten.ops.portable import decode_launch

    return decode_launch.refuses(q, keys, call)


def _run(q: Tensor, keys: KV, call: DecodeCall, name: str) -> tuple[Tensor, Tensor]:
    """Through the operator where something traces, else straight to the implementation: 20 us less."""
    if type(q) is Tensor and not torch.compiler.is_compiling():
        with torch.cuda.device_of(q):  # Triton launches on the current device
            return load(name)(q, keys, call)
    out, lse = _operator(
        q,
        keys.keys,
        keys.values,
        keys.block_table,
        keys.cache_seqlens,
        keys.key_scales,
        keys.value_scales,
        call.sinks,
        call.slopes,
        call.cu_seqlens_q,
        keys.kind,
        call.left,
        call.right,
        call.softmax_scale,
        call.softcap,
        call.max_seqlen_q,
        call.shared_prefix,
        name,
    )
    return out, lse


@torch.library.custom_op("hasten::decode_attention", mutates_args=())
def _operator(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    kind: str,
    left: int | None,
    right: int | None,
    softmax_scale: float,
    softcap: float,
    max_seqlen_q: int,
    shared_prefix: int,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    call = DecodeCall(
        softmax_scale=softmax_scale,
        max_seqlen_q=max_seqlen_q,
        left=left,
        right=right,
        softcap=softcap,
        sinks=sinks,
        slopes=slopes,
        cu_seqlens_q=cu_seqlens_q,
        shared_prefix=shared_prefix,
    )
    view = view_of(kind, keys, values, block_table, cache_seqlens, key_scales, value_scales)
    with torch.cuda.device_of(q):
        return load(implementation)(q, view, call)


@_operator.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    sizes = (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty((*q.shape[:-1], values.shape[-1])), q.new_empty(sizes, dtype=dtype)


def view_of(kind: str, keys: Tensor, values: Tensor, block_table: Tensor | None, *rest: Any) -> KV:
    """The view of that kind; rest: cache_seqlens, key_scales, value_scales."""
    if block_table is not None:
        return PagedKV(keys, values, block_table, *rest)
    return (RingKV if kind == RingKV.kind else ContiguousKV)(keys, values, *rest)


def check_queries(q: Tensor, keys: KV, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None) -> None:
    """Raise unless q fits the cache in the dense or packed layout."""
    if not isinstance(keys, PagedKV | ContiguousKV):
        raise ArgumentTypeError("keys", "PagedKV, ContiguousKV or RingKV", type(keys).__name__, "make a view first")
    if not isinstance(q, Tensor) or q.dtype not in checks.DTYPES:
        got = q.dtype if isinstance(q, Tensor) else type(q).__name__
        raise ArgumentTypeError("q", "a floating tensor of 16, 32 or 64 bits", got, "convert it with .to()")
    packed = cu_seqlens_q is not None
    layout = "(total_q, num_heads, head_dim)" if packed else "(batch, seqlen_q, num_heads, head_dim)"
    if q.ndim != (3 if packed else 4):
        raise ArgumentError("q", f"shape {layout}", tuple(q.shape), "packed queries need cu_seqlens_q, others none")
    if q.device != keys.keys.device:
        raise ArgumentError("q", f"the device of the cache, {keys.keys.device}", q.device, "move one of them")
    if q.shape[-1] != keys.keys.shape[-1]:
        raise ArgumentError("q", f"head_dim {keys.keys.shape[-1]} as the cache has", q.shape[-1], f"it is {layout}")
    if q.shape[-2] == 0 or q.shape[-2] % keys.keys.shape[2]:
        hint = "each K/V head serves the same number of query heads"
        raise ArgumentError("q", f"a multiple of {keys.keys.shape[2]} heads", q.shape[-2], hint)
    if not is_quantized(keys) and q.dtype != keys.keys.dtype:
        raise ArgumentTypeError("q", f"the dtype of the cache, {keys.keys.dtype}", q.dtype, "convert q")
    batch = q.shape[0]
    if cu_seqlens_q is not None:
        check_packed(q, cu_seqlens_q)
        batch = cu_seqlens_q.shape[0] - 1
    elif max_seqlen_q is not None:
        raise ArgumentError("max_seqlen_q", "None without cu_seqlens_q", max_seqlen_q, "it is q.shape[1]")
    if batch != keys.batch:
        raise ArgumentError("q", f"{keys.batch} sequences as the cache has", batch, f"the layout is {layout}")


def check_packed(q: Tensor, cu_seqlens_q: Tensor) -> None:
    """Raise unless cu_seqlens_q can count the rows of q."""
    if not isinstance(cu_seqlens_q, Tensor) or cu_seqlens_q.dtype != torch.int32:
        what = cu_seqlens_q.dtype if isinstance(cu_seqlens_q, Tensor) else type(cu_seqlens_q).__name__
        raise ArgumentTypeError("cu_seqlens_q", "an int32 tensor", what, "convert it with .to(torch.int32)")
    if cu_seqlens_q.ndim != 1 or cu_seqlens_q.shape[0] < 1 or cu_seqlens_q.device != q.device:
        got = f"{tuple(cu_seqlens_q.shape)} on {cu_seqlens_q.device}"
        raise ArgumentError("cu_seqlens_q", f"shape (batch + 1,) on {q.device}", got, "it ends with the total")


def check_no_gradients(**tensors: Tensor | None) -> None:
    """Raise if autograd would want a gradient of any of them."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                hint = "call it under torch.no_grad(), or use hasten.attention"
                raise ArgumentError(name, "a tensor without gradients", "requires_grad=True", hint)


def _longest(q: Tensor, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None) -> int:
    if cu_seqlens_q is None:
        return q.shape[1]
    if max_seqlen_q is None:
        raise ArgumentError("max_seqlen_q", "an int with cu_seqlens_q", None, "the host knows how many it packed")
    if isinstance(max_seqlen_q, Tensor) or not hasattr(max_seqlen_q, "__index__") or max_seqlen_q < 0:
        raise ArgumentTypeError("max_seqlen_q", "an int >= 0", repr(max_seqlen_q), "reading a tensor would wait")
    if cu_seqlens_q.device.type == "cpu":
        host.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    return int(max_seqlen_q)


def _band(mask: Mask, keys: KV, seqlen_q: int) -> tuple[int | None, int | None]:
    """(left, right) of the mask; raises for other masks, and for a ring that could have overwritten a visible key."""
    if not isinstance(mask, Mask):
        raise ArgumentTypeError("mask", "a hasten mask", type(mask).__name__, "Causal() is the default")
    band = as_band(mask)
    if band is None or band.padding is not None:
        hint = "lengths are in the cache; use hasten.attention for other masks"
        raise ArgumentError("mask", "Full, Causal, a plain Window, or an & of them", repr(mask), hint)
    if isinstance(keys, RingKV):
        if band.left is None or band.right != 0:
            hint = "a ring forgets; use ContiguousKV or PagedKV"
            raise ArgumentError("mask", "Window(left, 0) with a ring", repr(mask), hint)
        if band.left + seqlen_q > keys.capacity:
            got = f"left {band.left} + seqlen_q {seqlen_q}"
            raise ArgumentError("mask", f"left + seqlen_q <= {keys.capacity}, the ring", got, "make the ring larger")
    return band.left, band.right


def _prefix(shared_prefix: int, keys: KV, left: int | None, cu_seqlens_q: Tensor | None) -> int:
    if not isinstance(shared_prefix, int) or isinstance(shared_prefix, bool) or shared_prefix < 0:
        raise ArgumentTypeError("shared_prefix", "an int >= 0", repr(shared_prefix), "count tokens on the host")
    if shared_prefix == 0:
        return 0
    if not isinstance(keys, PagedKV):
        raise ArgumentError("shared_prefix", "0 without pages", shared_prefix, "only pages can be shared")
    if cu_seqlens_q is not None:
        raise ArgumentError("shared_prefix", "0 with packed queries", shared_prefix, "give q as (batch, seqlen_q, ...)")
    if shared_prefix % keys.page_size or shared_prefix > keys.capacity:
        expected = f"a multiple of page_size {keys.page_size} up to {keys.capacity}"
        raise ArgumentError("shared_prefix", expected, shared_prefix, "round it down")
    return shared_prefix if left is None else 0
