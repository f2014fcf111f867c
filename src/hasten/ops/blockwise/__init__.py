"""Tiled attention in PyTorch: the CPU, and any device without Triton. Memory is linear in length.

A call is cut into pieces of rows with the keys they visit (pieces.py); each goes to PyTorch's own CPU flash kernel
where that is exact (flash.py), else through scores of a few rows (scores.py). float16 and bfloat16 are computed
in float32: on the CPU that is as fast, and the kernel's own rounding of probabilities costs half a digit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hasten.masks import Causal, Full, Window
from hasten.ops.blockwise import flash, scores
from hasten.ops.blockwise.pieces import Piece, Sizes, pieces, without_padding
from hasten.ops.blockwise.problem import Problem
from hasten.ops.call import Call, Gradients
from hasten.ops.host import host_copy

__all__ = ["backward", "forward", "refuses"]


def refuses(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    """None: every call is inside the envelope, on every device."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), contiguous, in the layouts of `call.py`."""
    if not call.is_packed:
        return _dense_forward(q, k, v, call, 0)
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    dense, sequences = _sequences(call)
    for number, (own_q, own_k) in enumerate(sequences):
        own_out, own_lse = _dense_forward(q[None, own_q], k[None, own_k], v[None, own_k], dense, number)
        out[own_q] = own_out[0]
        lse[:, own_q] = own_lse[0]
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Gradients:
    """Gradients, contiguous, in the layouts of q, k, v and of the extras of the call."""
    if not call.is_packed:
        return _dense_backward(dout, dlse, _problem(q, k, v, call, 0), out, lse)
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    dsinks, dslopes = (None if t is None else torch.zeros_like(t) for t in (call.sinks, call.slopes))
    dense, sequences = _sequences(call)
    for number, (own_q, own_k) in enumerate(sequences):
        problem = _problem(q[None, own_q], k[None, own_k], v[None, own_k], dense, number)
        own_dlse = None if dlse is None else dlse[None, :, own_q]
        own = _dense_backward(dout[None, own_q], own_dlse, problem, out[None, own_q], lse[None, :, own_q])
        dq[own_q], dk[own_k], dv[own_k] = own.dq[0], own.dk[0], own.dv[0]
        for total, part in ((dsinks, own.dsinks), (dslopes, own.dslopes)):
            if total is not None and part is not None:
                total += part
    return Gradients(dq, dk, dv, dsinks, None, dslopes)


def _sequences(call: Call) -> tuple[Call, list[tuple[slice, slice]]]:
    """The call of one packed sequence, and the rows of q and k of each."""
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    starts = host_copy(call.cu_seqlens_q), host_copy(call.cu_seqlens_k)
    rows = ([slice(*ends) for ends in itertools.pairwise(values)] for values in starts)
    return replace(call, cu_seqlens_q=None, cu_seqlens_k=None), list(zip(*rows, strict=True))


def _dense_forward(q: Tensor, k: Tensor, v: Tensor, call: Call, sequence: int) -> tuple[Tensor, Tensor]:
    keys = _whole_keys(q, k, v, call)
    if keys is None:
        out, lse = _forward(_problem(q, k, v, call, sequence))
        return out.to(q.dtype), lse
    if keys.stop - keys.start < k.shape[1]:
        k, v = k[:, keys], v[:, keys]
    is_causal = q.shape[1] > 1 and isinstance(call.mask, Causal)
    if q.dtype in (torch.float32, torch.float64):
        return flash.whole(q, k, v, call.softmax_scale, is_causal)
    out, lse = flash.whole(q.float(), k.float(), v.float(), call.softmax_scale, is_causal)
    return out.to(q.dtype), lse


def _whole_keys(q: Tensor, k: Tensor, v: Tensor, call: Call) -> slice | None:
    """The keys of one call of the flash kernel that is the whole answer, all visible or square causal; None if none is.

    The path of every decoded token: about a microsecond.
    """
    if call.softcap or not (call.sinks is call.bias is call.slopes is call.seed is None):
        return None
    (batch, seqlen_q, _, head_dim), seqlen_k = q.shape, k.shape[1]
    if head_dim != v.shape[3] or not (batch and seqlen_q and seqlen_k) or q.device.type != "cpu":
        return None
    mask = call.mask
    if isinstance(mask, Full) or (isinstance(mask, Causal) and seqlen_q in (1, seqlen_k)):
        return slice(0, seqlen_k)
    if seqlen_q == 1 and isinstance(mask, Window) and mask.dilation == 1:
        return slice(0 if mask.left is None else max(0, seqlen_k - 1 - mask.left), seqlen_k)
    return None


def _problem(q: Tensor, k: Tensor, v: Tensor, call: Call, sequence: int) -> Problem:
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = without_padding(call.mask, k, v)
    return Problem(q.to(wide), k.to(wide), v.to(wide), call, sequence)


def _pieces(problem: Problem, *, for_flash: bool) -> Iterator[Piece]:
    q, k, call = problem.q, problem.k, problem.call
    sizes = Sizes(q.shape[0], q.shape[2], q.shape[1], k.shape[1], q.dtype, q.device)
    return pieces(call.mask, sizes, allow_causal=for_flash and call.bias is None and call.slopes is None)


def _forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) of any dense call, in the dtype of the computation."""
    call = problem.call
    if problem.q.device.type != "cpu" or call.softcap or call.seed is not None:
        with _full_precision(problem):
            out, lse = scores.forward(problem, _pieces(problem, for_flash=False))
    else:
        head_dim_v = problem.v.shape[3]
        problem = _one_head_dim(problem)
        out, lse = flash.forward(problem, _pieces(problem, for_flash=True))
        out = out[..., :head_dim_v]
    if call.sinks is not None:
        whole = torch.logaddexp(lse, call.sinks.to(lse.dtype)[:, None])
        share = torch.exp(lse - whole.masked_fill(whole == -torch.inf, 0.0))
        out, lse = out * share.transpose(1, 2)[..., None], whole
    return out.contiguous(), lse


def _full_precision(problem: Problem) -> torch.autocast:
    """Under autocast the products inside would be rounded to 16 bits; it has done its work on q, k and v."""
    return torch.autocast(problem.q.device.type, enabled=False)


def _one_head_dim(problem: Problem) -> Problem:
    """The same problem with zeros after the shorter of q, k and v: the flash kernel knows one head_dim."""
    q, k, v = problem.q, problem.k, problem.v
    missing = q.shape[3] - v.shape[3]
    pad = torch.nn.functional.pad
    if missing > 0:
        return replace(problem, v=pad(v, (0, missing)))
    return replace(problem, q=pad(q, (0, -missing)), k=pad(k, (0, -missing))) if missing else problem


def _dense_backward(dout: Tensor, dlse: Tensor | None, problem: Problem, out: Tensor, lse: Tensor) -> Gradients:
    call, dtype = problem.call, out.dtype
    head_dim, head_dim_v = problem.q.shape[3], problem.v.shape[3]
    dout = dout.to(problem.q.dtype)
    dbias = dslopes = dsinks = None
    if problem.q.dtype != out.dtype:
        out, _ = _forward(problem)  # the stored one was rounded: dq and dk would be a third less precise
    if call.sinks is not None:
        dsinks = _dsinks(dout, dlse, out, lse, call.sinks)
    needs_scores = call.softcap or call.seed is not None or call.slopes is not None or dlse is not None
    if problem.q.device.type != "cpu" or needs_scores or (call.bias is not None and call.needs_bias):
        with _full_precision(problem):
            dq, dk, dv, dbias, dslopes = scores.backward(dout, dlse, problem, lse, _pieces(problem, for_flash=False))
    else:
        problem = _one_head_dim(problem)
        missing = problem.v.shape[3] - head_dim_v
        if missing:
            dout, out = (torch.nn.functional.pad(t, (0, missing)) for t in (dout, out))
        dq, dk, dv = flash.backward(dout, problem, out, lse, _pieces(problem, for_flash=True))
        dq, dk, dv = dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim_v]
    dbias = None if dbias is None or call.bias is None else dbias.to(call.bias.dtype)
    dq, dk, dv = (t.to(dtype).contiguous() for t in (dq, dk, dv))
    return Gradients(dq, dk, dv, dsinks, dbias, dslopes)


def _dsinks(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """(num_heads,): a sink has probability exp(sink - lse) and value 0."""
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf))
    grad = -(dout * out).sum(-1).transpose(1, 2)
    return (share * (grad if dlse is None else grad + dlse)).sum((0, 2)).to(sinks.dtype)
