"""Attention as PyTorch operators: what torch.compile, autograd and opcheck see.

`hasten::attention` and `hasten::attention_backward` carry the mask as text and tensors and name the
implementation; both are opaque to tracing, so tile lists are built inside, on real tensors.
Defined with `torch.library.Library`: `torch.library.custom_op` costs 150 us more a call with that many arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hasten import masks
from hasten.ops import choose, host, rewrite
from hasten.ops.call import Call, Gradients

_disable_dynamo: Any = torch._disable_dynamo  # type: ignore[attr-defined]  # loads dynamo on first use, not now
_PLAIN = (Tensor, torch.nn.Parameter)
_library = torch.library.Library("hasten", "FRAGMENT")


def run(q: Tensor, k: Tensor, v: Tensor, call: Call, implementation: str) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable once: through the operator where someone sees it, else without the dispatcher."""
    text, tensors = masks.encode(call.mask)
    inputs = (
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
    if torch.compiler.is_compiling() or is_seen(*inputs[:6]):
        return torch.ops.hasten.attention.default(*inputs)
    return _apply_eagerly(_Attention, 6, lambda *_: _forward(implementation, q, k, v, call), *inputs)


def is_seen(first: Tensor, *others: Tensor | None) -> bool:
    """Whether more than autograd takes part in a call of these tensors: it has to be the operator then.

    Modes (fake tensors, tracing, checkpointing by operator, counters of FLOPs), transforms of torch.func, profilers;
    and tensors that are subclasses or that PyTorch would not give to a kernel as they are, as its keys for
    dispatch tell: without data, batched, the negative of another, zeros that are not stored.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return True
    plain_keys, keys_of = _plain_keys(first.device.type), torch._C._dispatch_keys
    for tensor in (first, *others):
        if tensor is not None and (type(tensor) not in _PLAIN or keys_of(tensor).raw_repr() not in plain_keys):
            return True
    return False


@lru_cache
def _plain_keys(device_type: str) -> tuple[int, ...]:
    """The keys for dispatch of an ordinary tensor and of an inference tensor; none if it has no data."""
    if device_type == "meta":
        return ()
    keys = []
    for is_inference in (False, True):
        with torch.inference_mode(is_inference):
            keys.append(torch._C._dispatch_keys(torch.empty(0, device=device_type)).raw_repr())
    return tuple(keys)


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
    call = _call(True, sinks, bias, slopes, seed, cu_seqlens_q, cu_seqlens_k, mask_tensors, *options)
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        host.check_cu_seqlens("cu_seqlens_q", call.cu_seqlens_q, q.shape[0], max_seqlen_q)
        host.check_cu_seqlens("cu_seqlens_k", call.cu_seqlens_k, k.shape[0], max_seqlen_k)
    return _forward(implementation, q, k, v, call)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    sizes = (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(sizes, dtype=dtype)


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
    call = _call(needs_bias, sinks, bias, slopes, seed, cu_seqlens_q, cu_seqlens_k, mask_tensors, *options)
    grads = _backward_of(implementation, dout, dlse, q, k, v, out, lse, call)
    extra = [q.new_empty(0) if grad is None else grad for grad in grads[3:]]
    return grads.dq, grads.dk, grads.dv, extra[0], extra[1], extra[2]


def _fake_attention_backward(
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


def _forward(implementation: str, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    module, packed = choose.load(implementation), rewrite.pack_documents(q, k, call)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        if packed is None:
            return module.forward(q, k, v, call)
        out, lse = module.forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), packed)
    return out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()


def _backward_of(implementation: str, dout: Tensor, dlse: Tensor | None, *saved: Any) -> Gradients:
    q, k, v, out, lse, call = saved
    module, packed = choose.load(implementation), rewrite.pack_documents(q, k, call)
    with torch.cuda.device_of(q):
        if packed is None:
            return module.backward(dout, dlse, *saved)
        rows = [tensor.flatten(0, 1) for tensor in (dout, q, k, v, out)]
        statistics = [None if tensor is None else tensor.transpose(0, 1).flatten(1) for tensor in (dlse, lse)]
        grads = module.backward(rows[0], statistics[0], *rows[1:], statistics[1], packed)
    sizes = q.shape[:2]
    dq, dk, dv = (grad.unflatten(0, sizes) for grad in (grads.dq, grads.dk, grads.dv))
    return grads._replace(dq=dq, dk=dk, dv=dv)


def _call(
    needs_bias: bool,
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


class _Attention(torch.autograd.Function):
    """Autograd of the operator: its own backward is the other operator.

    The first six inputs, which may want gradients, come apart and the others as one: each argument costs 0.4 us.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Any], rest: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, Tensor]:
        out, lse = compute(*inputs, *rest)
        ctx.save_for_backward(*inputs, *rest[:3], out, lse, *rest[3])
        ctx.options = rest[4:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, sinks, bias, slopes, seed, cu_q, cu_k, out, lse, *mask_tensors = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 8
        dout = torch.zeros_like(out) if dout is None else dout
        needs = ctx.needs_input_grad[2:]
        terms: tuple[Any, ...] = (sinks, bias, slopes, seed, cu_q, cu_k, mask_tensors, *ctx.options)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_seen(dout, dlse, q, k, v, *terms[:3]):
            operator = torch.ops.hasten.attention_backward.default
            grads = operator(dout, dlse, q, k, v, out, lse, *terms, needs[4])
        else:
            call = _call(needs[4], *terms[:-1])
            grads = _backward_of(terms[-1], dout, dlse, q, k, v, out, lse, call)
        return (None, None, *(grad if need else None for grad, need in zip(grads, needs, strict=True)))


class _AttentionBackward(torch.autograd.Function):
    """Autograd of the backward operator: there is none, which is said when someone asks."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Any], rest: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, ...]:
        return compute(*inputs, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError("attention is differentiable once; implementation='reference' is twice")


def _apply_or(
    function: type[torch.autograd.Function], num_tensors: int, compute: Callable[..., Any], *inputs: Any
) -> Any:
    """compute(*inputs), as `function` if one of the first tensors wants a gradient."""
    if torch.is_grad_enabled():
        for tensor in inputs[:num_tensors]:
            if tensor is not None and tensor.requires_grad:
                return function.apply(compute, inputs[num_tensors:], *inputs[:num_tensors])
    return compute(*inputs)


_apply_eagerly = _disable_dynamo(_apply_or)


def _define(
    operator: Callable[..., Any], fake: Callable[..., Any], function: type[torch.autograd.Function], num_tensors: int
) -> None:
    """Register an operator by its annotations; dynamo looks into no frame of ours below it."""
    name = operator.__name__
    schema = torch.library.infer_schema(operator, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _disable_dynamo(operator), "CompositeExplicitAutograd")
    torch.library.register_fake(f"hasten::{name}", fake, lib=_library)
    overload = getattr(torch.ops.hasten, name).default

    def below_autograd(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*inputs)

    def kernel(*inputs: Any) -> Any:
        return _apply_or(function, num_tensors, below_autograd, *inputs)

    _library.impl(name, _disable_dynamo(kernel), "Autograd")


_define(attention, _fake_attention, _Attention, 6)
_define(attention_backward, _fake_attention_backward, _AttentionBackward, 10)
