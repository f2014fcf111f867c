"""The public attention: checks, defaults, the cheaper equal call, the choice of an implementation.

Called by users and by `models/`. Knows no kernel: implementations are named by `choose.py` and run by
`operators.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.errors import ArgumentError, ArgumentTypeError
from hasten.masks import Full, Mask
from hasten.ops import checks, choose, host, operators, reference, rewrite
from hasten.ops.alibi import ALiBi
from hasten.ops.call import Call


@dataclass(frozen=True)
class Prepared:
    """Checked tensors and the call they belong to."""

    q: Tensor
    k: Tensor
    v: Tensor
    call: Call


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | ALiBi | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention (FlashAttention, arXiv 2205.14135 and 2307.08691): memory linear in length.

    q: (batch, seqlen_q, num_heads, head_dim); k: (batch, seqlen_k, num_kv_heads, head_dim);
    v: (batch, seqlen_k, num_kv_heads, head_dim_v). Packed, with cu_seqlens_q/k int32 (batch + 1,):
    (total, heads, head_dim). One dtype of float16, bfloat16, float32, float64; any strides.
    num_heads is a multiple of num_kv_heads: query head i reads K/V head i // (num_heads // num_kv_heads).

    mask: who sees whom, bottom-right aligned when seqlen_q != seqlen_k; None is Full().
    softmax_scale: head_dim ** -0.5 by default. softcap c: scores become c * tanh(score / c).
    sinks: (num_heads,), one more logit a head that takes probability and gives nothing.
    bias: added to the scores; a tensor broadcastable to (batch, num_heads, seqlen_q, seqlen_k), in which
    -inf hides a cell, or ALiBi(slopes). dropout_p: of probabilities, drawn from PyTorch's generator.
    max_seqlen_q/k: of packed sequences; read from cu_seqlens if left out (once a tensor).
    deterministic: the same gradients, bit for bit, on every run; also asked for by
    torch.use_deterministic_algorithms. implementation: forces one or raises UnsupportedError.

    Returns out (batch, seqlen_q, num_heads, head_dim_v), contiguous, of q's dtype; with return_lse also the
    natural log-sum-exp of the scores, float32 (float64 for float64), (batch, num_heads, seqlen_q), or
    (num_heads, total_q) packed. Both are differentiable, in q, k, v, sinks, bias and slopes; the
    reference implementation also twice. A row that sees no key gives out = 0, lse = -inf, zero gradients.
    Raises ArgumentError or ArgumentTypeError that names the argument.
    """
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    ready = prepare(q, k, v, mask, softmax_scale, softcap, sinks, bias, dropout_p, *sequences, deterministic)
    out, lse = _rewritten(ready.q, ready.k, ready.v, ready.call, implementation)
    return (out, lse) if return_lse else out


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    softmax_scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | ALiBi | None,
    dropout_p: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    deterministic: bool = False,
) -> Prepared:
    """Check everything and fill in defaults. Arguments, shapes and errors are those of `attention`."""
    packed = checks.check_packing(q, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
    q, k, v = _autocast(q, k, v)
    checks.check_tensors(q, k, v, packed)
    mask = Full() if mask is None else mask
    checks.check_numbers(softmax_scale, softcap, dropout_p)
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    checks.check_mask(mask, q, k, 0 if packed else q.shape[0], packed)
    slopes = bias.slopes if isinstance(bias, ALiBi) else None
    matrix = None if isinstance(bias, ALiBi) else bias
    checks.check_extras(q, k, sinks, matrix, slopes, packed)
    if softmax_scale <= 0.0:  # the kernels take the row maximum before scaling; both turns are exact in any dtype
        q, softmax_scale = (-q, -softmax_scale) if softmax_scale < 0.0 else (q * 0.0, 1.0)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    call = Call(
        mask=mask,
        softmax_scale=softmax_scale,
        max_seqlen_q=_longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q) if packed else q.shape[1],
        max_seqlen_k=_longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k) if packed else k.shape[1],
        softcap=0.0 if softcap is None else float(softcap),
        dropout_p=float(dropout_p),
        sinks=None if sinks is None else sinks.to(wide),
        bias=None if matrix is None else matrix.reshape((1,) * (4 - matrix.ndim) + matrix.shape),
        slopes=None if slopes is None else slopes.to(wide).reshape(-1, q.shape[-2]),
        seed=torch.randint(2**62, (1,), device=q.device) if dropout_p > 0.0 else None,
        cu_seqlens_q=None if cu_seqlens_q is None else cu_seqlens_q.to(torch.int32),
        cu_seqlens_k=None if cu_seqlens_k is None else cu_seqlens_k.to(torch.int32),
        deterministic=bool(deterministic) or torch.are_deterministic_algorithms_enabled(),
    )
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        host.check_cu_seqlens("cu_seqlens_q", call.cu_seqlens_q, q.shape[0], call.max_seqlen_q)
        host.check_cu_seqlens("cu_seqlens_k", call.cu_seqlens_k, k.shape[0], call.max_seqlen_k)
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return Prepared(q, k, v, call)


def _rewritten(q: Tensor, k: Tensor, v: Tensor, call: Call, implementation: str | None) -> tuple[Tensor, Tensor]:
    """Run the call, as an equal cheaper one where there is one (see rewrite.py)."""
    if implementation != "reference":
        step = rewrite.dilation(q, k, call)
        if step > 1:
            return _dilated(q, k, v, call, step, implementation)
    return _run(q, k, v, call, implementation)


def _dilated(
    q: Tensor, k: Tensor, v: Tensor, call: Call, step: int, implementation: str | None
) -> tuple[Tensor, Tensor]:
    """A dilated window as `step` plain windows on interleaved rows (Longformer, arXiv 2004.05150, 3.1)."""
    mask = rewrite.undilated(call.mask)
    shift = k.shape[1] - q.shape[1]
    outs, lses = [], []
    for residue in range(step):
        own = [q[:, residue::step], *(t[:, (residue + shift) % step :: step] for t in (k, v))]
        part = replace(call, mask=mask, max_seqlen_q=own[0].shape[1], max_seqlen_k=own[1].shape[1])
        out, lse = _run(own[0], own[1], own[2], part, implementation)
        outs.append(out)
        lses.append(lse)
    return rewrite.interleave(outs, 1), rewrite.interleave(lses, 2)


def _run(q: Tensor, k: Tensor, v: Tensor, call: Call, implementation: str | None) -> tuple[Tensor, Tensor]:
    name, _ = choose.choose(q, k, v, call, implementation)
    if name == "reference":  # plain PyTorch, so that autograd can differentiate it twice
        return reference.forward(q, k, v, call)
    return operators.run(q, k, v, call, name)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Under autocast for q's device, float32 goes in as the autocast dtype, as in PyTorch's own attention."""
    if not isinstance(q, Tensor):
        return q, k, v
    kind = q.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    is_wide = [isinstance(tensor, Tensor) and tensor.dtype == torch.float32 for tensor in (q, k, v)]
    return tuple(tensor.to(dtype) if wide else tensor for tensor, wide in zip((q, k, v), is_wide, strict=True))


def _longest(argument: str, given: int | None, cu_seqlens: Tensor | None) -> int:
    assert cu_seqlens is not None
    if given is not None:
        if isinstance(given, Tensor) or not hasattr(given, "__index__"):
            raise ArgumentTypeError(argument, "an int", repr(given), "read it from the tensor once, before the layers")
        if given < 0:
            raise ArgumentError(argument, "a length >= 0", given, "it is the longest sequence")
        return given if torch.compiler.is_compiling() else given.__index__()  # an int of numpy becomes one of Python
    if not host.can_read(cu_seqlens):
        raise ArgumentError(argument, "an int", None, "give it under torch.compile and in CUDA graphs")
    values = host.host_copy(cu_seqlens)
    return max((after - before for before, after in itertools.pairwise(values)), default=0)
