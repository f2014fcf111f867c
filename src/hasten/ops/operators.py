"""Attention as PyTorch operators: what torch.compile, autograd and opcheck see.

`hasten::attention` and `hasten::attention_backward` carry the mask as text and tensors and name the
implementation; both are opaque to tracing, so tile lists are built inside, on real tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten import masks
from hasten.ops import choose, host, rewrite
from hasten.ops.call import Call, Gradients


def run(q: Tensor, k: Tensor, v: Tensor, call: Call, implementation: str) -> tuple[Tensor, Tensor]:
    """(out, lse) through the operator, differentiable once."""
    text, tensors = masks.encode(call.mask)
    out, lse = attention(
        q,
        k,
        v,
        call.sinks,
        call.bias,
        call.slopes,
        call.seed,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        tensors,
        text,
        call.max_seqlen_q,
        call.max_seqlen_k,
        call.softmax_scale,
        call.softcap,
        call.dropout_p,
        call.deterministic,
        implementation,
    )
    return out, lse


@torch.library.custom_op("hasten::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mask_tensors: Sequence[Tensor],
    mask: str,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one call; see `attention.attention` for shapes."""
    options = (mask, max_seqlen_q, max_seqlen_k, softmax_scale, softcap, dropout_p, deterministic)
    call = _call(sinks, bias, slopes, seed, cu_seqlens_q, cu_seqlens_k, mask_tensors, *options)
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        host.check_cu_seqlens("cu_seqlens_q", call.cu_seqlens_q, q.shape[0], max_seqlen_q)
        host.check_cu_seqlens("cu_seqlens_k", call.cu_seqlens_k, k.shape[0], max_seqlen_k)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return _forward(choose.load(implementation), q, k, v, call)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    sizes = (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(sizes, dtype=dtype)


@torch.library.custom_op("hasten::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mask_tensors: Sequence[Tensor],
    mask: str,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    implementation: str,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, sinks, bias, slopes; an empty tensor for what the call does not have."""
    options = (mask, max_seqlen_q, max_seqlen_k, softmax_scale, softcap, dropout_p, deterministic)
    call = _call(sinks, bias, slopes, seed, cu_seqlens_q, cu_seqlens_k, mask_tensors, *options, needs_bias)
    with torch.cuda.device_of(q):
        grads = _backward_of(choose.load(implementation), dout, dlse, q, k, v, out, lse, call)
    extra = [q.new_empty(0) if grad is None else grad for grad in grads[3:]]
    return grads.dq, grads.dk, grads.dv, extra[0], extra[1], extra[2]


@attention_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    *terms: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_bias = terms[-1]
    extra = [
        q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (sinks, bias if needs_bias else None, slopes)
    ]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), extra[0], extra[1], extra[2]


def _forward(module: choose.Implementation, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    packed = rewrite.pack_documents(q, k, call)
    if packed is None:
        return module.forward(q, k, v, call)
    out, lse = module.forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), packed)
    return out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()


def _backward_of(module: choose.Implementation, dout: Tensor, dlse: Tensor | None, *saved: Any) -> Gradients:
    q, k, v, out, lse, call = saved
    packed = rewrite.pack_documents(q, k, call)
    if packed is None:
        return module.backward(dout, dlse, *saved)
    rows = [tensor.flatten(0, 1) for tensor in (dout, q, k, v, out)]
    statistics = [None if tensor is None else tensor.transpose(0, 1).flatten(1) for tensor in (dlse, lse)]
    grads = module.backward(rows[0], statistics[0], *rows[1:], statistics[1], packed)
    sizes = q.shape[:2]
    dq, dk, dv = (grad.unflatten(0, sizes) for grad in (grads.dq, grads.dk, grads.dv))
    return grads._replace(dq=dq, dk=dk, dv=dv)


def _call(
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mask_tensors: Sequence[Tensor],
    mask: str,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    needs_bias: bool = True,
) -> Call:
    return Call(
        mask=masks.decode(mask, mask_tensors),
        softmax_scale=softmax_scale,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softcap=softcap,
        dropout_p=dropout_p,
        sinks=sinks,
        bias=bias,
        slopes=slopes,
        seed=seed,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        needs_bias=needs_bias,
        deterministic=deterministic,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, mask_tensors, options = inputs[:9], inputs[9], inputs[10:]
    ctx.save_for_backward(*tensors, *output, *mask_tensors)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, sinks, bias, slopes, seed, cu_q, cu_k, out, lse, *mask_tensors = ctx.saved_tensors
    unused = (None, None, None, [None] * len(mask_tensors), *(None for _ in ctx.options))
    if dout is None and dlse is None:
        return (None,) * 6 + unused
    dout = torch.zeros_like(out) if dout is None else dout
    needs = ctx.needs_input_grad
    saved = (q, k, v, out, lse, sinks, bias, slopes, seed, cu_q, cu_k)
    grads = attention_backward(dout, dlse, *saved, mask_tensors, *ctx.options, needs_bias=needs[4])
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
    return (*grads, *unused)


attention.register_autograd(_backward, setup_context=_setup)
