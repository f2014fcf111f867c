"""The engine that is PyTorch's own CPU flash kernel, one call a piece.

Serves what the kernel computes exactly: any mask, bias and ALiBi as an additive matrix for one piece, grouped
heads by index. Tensors here are float32 or float64, with one head_dim for q, k and v. The kernel wants at least
one query and one key (it divides by their number) and gives lse = 0 to rows that see nothing. Its backward takes
the lse and out of whole rows, so pieces are differentiated one by one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hasten.ops.blockwise.pieces import Piece, split
from hasten.ops.blockwise.problem import Problem

_CELLS = 1 << 22  # of an additive matrix made for one kernel call
_forward = torch._scaled_dot_product_flash_attention_for_cpu  # 2 us less a call than through torch.ops
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def whole(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) where every row sees all keys, or square causal; dense layouts of `call.py`, no size 0."""
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if q.shape[1] == 1:
        batch, _, num_heads, head_dim = q.shape
        rows = q.reshape(batch, k.shape[2], -1, head_dim)  # the heads of a group, as rows, read K/V once
        out, lse = _forward(rows, keys, values, scale=softmax_scale)
        return out.reshape(batch, 1, num_heads, head_dim), lse.reshape(batch, num_heads, 1)
    out, lse = _forward(q.transpose(1, 2), keys, values, 0.0, is_causal, scale=softmax_scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def forward(problem: Problem, work: Iterable[Piece]) -> tuple[Tensor, Tensor]:
    """(out (batch, seqlen_q, num_heads, head_dim), lse (batch, num_heads, seqlen_q)), sinks left out."""
    q, k, v, call = problem.q, problem.k, problem.v, problem.call
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    for piece in _small(problem, work):
        tensors = problem.queries(q, piece), problem.keys(k, piece), problem.keys(v, piece)
        additive = problem.additive(piece)
        expanded = None if additive is None else _expanded(additive, piece)
        own, own_lse = _forward(*tensors, 0.0, piece.is_causal, attn_mask=expanded, scale=call.softmax_scale)
        if additive is not None:
            own_lse = own_lse.masked_fill(additive.amax(-1) == -torch.inf, -torch.inf)
        problem.queries(out, piece).copy_(own)
        lse[piece.batch, piece.head, piece.query] = own_lse
    return out, lse


def backward(
    dout: Tensor, problem: Problem, out: Tensor, lse: Tensor, work: Iterable[Piece]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the layouts of q, k, v. `out`, `lse`: of the whole rows, sinks included."""
    q, k, v, call = problem.q, problem.k, problem.v, problem.call
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # a hidden cell has probability exp(-inf - lse)
    for piece in _small(problem, work):
        rows = (problem.queries(t, piece) for t in (dout, q, out))
        own_dout, own_q, own_out = rows
        additive = problem.additive(piece)
        grads = _backward(
            own_dout,
            own_q,
            problem.keys(k, piece),
            problem.keys(v, piece),
            own_out,
            lse[piece.batch, piece.head, piece.query],
            0.0,
            piece.is_causal,
            attn_mask=None if additive is None else _expanded(additive, piece),
            scale=call.softmax_scale,
        )
        problem.queries(dq, piece).copy_(grads[0])
        problem.add_keys(dk, piece, grads[1])
        problem.add_keys(dv, piece, grads[2])
    return dq, dk, dv


def _small(problem: Problem, work: Iterable[Piece]) -> Iterable[Piece]:
    """The pieces, split where their additive matrix has to be made."""
    if problem.call.bias is None and problem.call.slopes is None:
        return work
    if problem.call.slopes is None:
        return (p for piece in work for p in ([piece] if piece.hidden is None else _split(problem, piece)))
    return (p for piece in work for p in _split(problem, piece))


def _split(problem: Problem, piece: Piece) -> Iterable[Piece]:
    return split(piece, problem.group_size, _CELLS)


def _expanded(additive: Tensor, piece: Piece) -> Tensor:
    size = piece.batch.stop - piece.batch.start, piece.head.stop - piece.head.start, piece.rows, piece.num_keys
    return additive.expand(size)
