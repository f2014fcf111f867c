"""What a call adds to the scores of a piece, beside q.k: hidden cells, bias and ALiBi as one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.ops.blockwise.pieces import Piece
from hasten.ops.call import Call


@dataclass(frozen=True)
class Problem:
    """One dense attention: a call, the number its first sequence has among packed ones, and key position of query 0.

    q (batch, seqlen_q, num_heads, head_dim), k and v likewise, in the dtype of the computation.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    call: Call
    sequence: int = 0

    @property
    def group_size(self) -> int:
        """Query heads of one K/V head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def offset(self) -> int:
        """Key position of query 0."""
        return self.k.shape[1] - self.q.shape[1]

    def kv_heads(self, piece: Piece) -> slice:
        """The K/V heads of the query heads of a piece."""
        return slice(piece.head.start // self.group_size, (piece.head.stop - 1) // self.group_size + 1)

    def queries(self, rows: Tensor, piece: Piece) -> Tensor:
        """(batch, heads, rows, ...) view of a piece of `rows` (batch, seqlen_q, num_heads, ...)."""
        return rows[piece.batch, piece.query, piece.head].transpose(1, 2)

    def keys(self, rows: Tensor, piece: Piece) -> Tensor:
        """(batch, kv_heads, keys, ...) of a piece of `rows` (batch, seqlen_k, num_kv_heads, ...)."""
        if isinstance(piece.key, slice):
            return rows[piece.batch, piece.key, self.kv_heads(piece)].transpose(1, 2)
        return rows[piece.batch, :, self.kv_heads(piece)].index_select(1, piece.key).transpose(1, 2)

    def add_keys(self, total: Tensor, piece: Piece, grad: Tensor) -> None:
        """Add `grad` (batch, kv_heads, keys, ...) to the rows of `total` (batch, seqlen_k, ...) of a piece."""
        grad = grad.transpose(1, 2)
        if isinstance(piece.key, slice):
            total[piece.batch, piece.key, self.kv_heads(piece)] += grad
        else:
            total[piece.batch, :, self.kv_heads(piece)].index_add_(1, piece.key, grad)

    def bias(self, piece: Piece) -> Tensor | None:
        """The bias of a piece, each dimension its size or 1."""
        return None if self.call.bias is None else of_bias(self.call.bias, piece).to(self.q.dtype)

    def distance(self, piece: Piece) -> Tensor:
        """(rows, keys): |position of the query - key|."""
        query = torch.arange(piece.query.start, piece.query.stop, device=self.q.device)[:, None]
        return (query + self.offset - piece.positions(self.q.device)).abs().to(self.q.dtype)

    def slopes(self, piece: Piece) -> Tensor | None:
        """(batch or 1, heads, 1, 1): ALiBi slopes of a piece."""
        if self.call.slopes is None:
            return None
        batch = piece.batch if self.call.slopes.shape[0] > 1 else slice(0, 1)
        return self.call.slopes[batch, piece.head, None, None].to(self.q.dtype)

    def additive(self, piece: Piece) -> Tensor | None:
        """What is added to the scores: 4 dimensions, each the size of the piece or 1; -inf hides. None if nothing."""
        matrix, slopes = self.bias(piece), self.slopes(piece)
        if slopes is not None:
            alibi = -slopes * self.distance(piece)
            matrix = alibi if matrix is None else matrix + alibi
        if piece.hidden is not None:
            matrix = piece.hidden if matrix is None else matrix + piece.hidden
        return matrix


def of_bias(bias: Tensor, piece: Piece) -> Tensor:
    """The part of `bias` (or of its gradient) that a piece reads; a copy if the piece lists its keys."""
    batch, head, query, key = bias.shape
    bias = bias[
        piece.batch if batch > 1 else slice(None),
        piece.head if head > 1 else slice(None),
        piece.query if query > 1 else slice(None),
    ]
    if key == 1:
        return bias
    return bias[..., piece.key] if isinstance(piece.key, slice) else bias.index_select(-1, piece.key)
