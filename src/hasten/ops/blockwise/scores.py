"""The engine that computes scores in plain PyTorch, for what the flash kernel has no word for.

Softcap, dropout, a gradient through lse, gradients of bias and slopes. A few rows with all their keys at a time,
so the softmax is exact in one pass and the matrix of scores never exists. Tensors are float32 or float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.ops.blockwise.pieces import Piece, split
from hasten.ops.blockwise.problem import Problem, of_bias
from hasten.ops.dropout import keep_cells

_CELLS = 1 << 20  # of scores at a time


def forward(problem: Problem, work: Iterable[Piece]) -> tuple[Tensor, Tensor]:
    """(out (batch, seqlen_q, num_heads, head_dim_v), lse (batch, num_heads, seqlen_q)), sinks left out."""
    q, v = problem.q, problem.v
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    for piece in _small(problem, work):
        scores = _Scores.of(problem, piece).scores
        own_lse = scores.logsumexp(-1)
        # not exp(scores - lse): next to the lowest finite number the logarithm of the sum is lost in lse
        probs = scores.softmax(-1).masked_fill_((own_lse == -torch.inf)[..., None], 0.0)
        if problem.call.seed is not None:
            probs = probs * _kept(problem, piece)
        values = problem.keys(v, piece)
        problem.queries(out, piece).copy_(_ungroup(_group(probs, values) @ values, piece))
        lse[piece.batch, piece.head, piece.query] = own_lse
    return out, lse


@dataclass(frozen=True)
class _Scores:
    """queries (batch, kv_heads, group * rows, head_dim), keys (batch, kv_heads, keys, head_dim) and their scores
    (batch, heads, rows, keys), -inf where hidden; tanh of the scores before softcap, if there is one.
    """

    queries: Tensor
    keys: Tensor
    scores: Tensor
    tanh: Tensor | None

    @classmethod
    def of(cls, problem: Problem, piece: Piece) -> _Scores:
        softcap, tanh = problem.call.softcap, None
        keys = problem.keys(problem.k, piece)
        queries = _group(problem.queries(problem.q, piece), keys)
        scores = _ungroup(queries @ keys.mT, piece) * problem.call.softmax_scale
        if softcap:
            tanh = torch.tanh(scores / softcap)
            scores = softcap * tanh
        additive = problem.additive(piece)
        return cls(queries, keys, scores if additive is None else scores + additive, tanh)


class Grads(NamedTuple):
    """Gradients in the dtype of the computation; those of absent inputs are None."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    dslopes: Tensor | None


def backward(dout: Tensor, dlse: Tensor | None, problem: Problem, lse: Tensor, work: Iterable[Piece]) -> Grads:
    """Gradients of all but the sinks. `lse`: of the whole rows, sinks included."""
    call = problem.call
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (problem.q, problem.k, problem.v))
    dbias = dslopes = None
    if call.bias is not None and call.needs_bias:
        dbias = torch.zeros(call.bias.shape, dtype=dq.dtype, device=dq.device)
    if call.slopes is not None:
        dslopes = torch.zeros(call.slopes.shape, dtype=dq.dtype, device=dq.device)
    for piece in _small(problem, work):
        own = _Scores.of(problem, piece)
        values, own_dout = problem.keys(problem.v, piece), problem.queries(dout, piece)
        probs = _probs(own.scores, lse[piece.batch, piece.head, piece.query])
        dprobs = _ungroup(_group(own_dout, values) @ values.mT, piece)
        dropped = probs
        if call.seed is not None:
            kept = _kept(problem, piece)
            dropped, dprobs = probs * kept, dprobs * kept
        problem.add_keys(dv, piece, _group(dropped, values).mT @ _group(own_dout, values))
        centre = (probs * dprobs).sum(-1, keepdim=True)
        if dlse is not None:
            centre = centre - dlse[piece.batch, piece.head, piece.query, None]
        dscores = probs * (dprobs - centre)
        if dbias is not None:
            _add_bias(dbias, piece, dscores)
        if dslopes is not None:
            grad = -(dscores * problem.distance(piece)).sum((2, 3))
            if dslopes.shape[0] > 1:
                dslopes[piece.batch, piece.head] += grad
            else:
                dslopes[:, piece.head] += grad.sum(0, keepdim=True)
        if own.tanh is not None:
            dscores = dscores * (1.0 - own.tanh.square())
        dscores = _group(dscores * call.softmax_scale, own.keys)
        problem.queries(dq, piece).copy_(_ungroup(dscores @ own.keys, piece))
        problem.add_keys(dk, piece, dscores.mT @ own.queries)
    return Grads(dq, dk, dv, dbias, dslopes)


def _small(problem: Problem, work: Iterable[Piece]) -> Iterable[Piece]:
    return (small for piece in work for small in split(piece, problem.group_size, _CELLS))


def _group(rows: Tensor, keys: Tensor) -> Tensor:
    """(batch, heads, rows, ...) -> (batch, kv_heads, group * rows, ...): a group of heads reads its K/V once."""
    return rows.reshape(rows.shape[0], keys.shape[1], -1, rows.shape[-1])


def _ungroup(rows: Tensor, piece: Piece) -> Tensor:
    """Back to (batch, heads, rows, ...)."""
    return rows.reshape(rows.shape[0], -1, piece.rows, rows.shape[-1])


def _probs(scores: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])


def _kept(problem: Problem, piece: Piece) -> Tensor:
    """What dropout multiplies the probabilities of a piece by: 0 or 1 / (1 - dropout_p)."""
    call, device = problem.call, problem.q.device
    assert call.seed is not None
    batch = torch.arange(piece.batch.start, piece.batch.stop, device=device)[:, None, None, None] + problem.sequence
    head = torch.arange(piece.head.start, piece.head.stop, device=device)[:, None, None]
    query = torch.arange(piece.query.start, piece.query.stop, device=device)[:, None]
    sequence_head = batch * problem.q.shape[2] + head
    kept = keep_cells(call.seed, call.dropout_p, sequence_head, query, piece.positions(device))
    return kept.to(problem.q.dtype) / (1.0 - call.dropout_p)


def _add_bias(dbias: Tensor, piece: Piece, dscores: Tensor) -> None:
    """Add the gradient of a piece's scores to that of the bias, summed over the dimensions it shares."""
    shared = [dim for dim, size in enumerate(dbias.shape) if size == 1]
    grad = dscores.sum(shared, keepdim=True) if shared else dscores
    if isinstance(piece.key, slice) or dbias.shape[3] == 1:
        of_bias(dbias, piece).add_(grad)
    else:
        whole = replace(piece, key=slice(None))
        of_bias(dbias, whole).index_add_(-1, piece.key, grad)
