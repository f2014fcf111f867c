"""One attention call, checked: everything an implementation is told besides q, k and v.

Made by `attention.py`, read by every implementation. An implementation is a module or package with

    refuses(q, k, v, call) -> str | None      why this call is outside its envelope, None if inside
    forward(q, k, v, call) -> (out, lse)
    backward(dout, dlse, q, k, v, out, lse, call) -> Gradients

in the layouts of `attention.attention` (dense or packed, any strides but a last one of 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hasten.masks import Mask


@dataclass(frozen=True, kw_only=True)
class Call:
    """The terms of one attention.

    score(i, j) = softcap * tanh(softmax_scale * q_i.k_j / softcap) + bias(i, j) - slope * |position(i) - j|,
    visible where `mask` says so and the bias is not -inf; a sink is one more score of its head, without a value.

    sinks: (num_heads,) float32. bias: 4 dimensions, each the full size or 1, of any float dtype.
    slopes: (batch or 1, num_heads) float32 (ALiBi, arXiv 2108.12409). seed: int64 (1,), set iff dropout_p > 0.
    cu_seqlens: int32 (batch + 1,) on the device of q, both set or neither. max_seqlen: the longest
    sequence if packed, else the sequence length. softcap 0 means none; softmax_scale > 0.
    needs_bias: whether a backward has to return dbias (it costs a pass of its own). deterministic: whether
    backward has to give the same bits on every run; an implementation that always does need not look.
    """

    mask: Mask
    softmax_scale: float
    max_seqlen_q: int
    max_seqlen_k: int
    softcap: float = 0.0
    dropout_p: float = 0.0
    sinks: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    seed: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    needs_bias: bool = True
    deterministic: bool = False

    @property
    def is_packed(self) -> bool:
        """True if q, k, v are (total, heads, head_dim) with cu_seqlens."""
        return self.cu_seqlens_q is not None


class Gradients(NamedTuple):
    """What a backward returns: None for what the call does not have. dsinks and dslopes are float32."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor | None = None
    dbias: Tensor | None = None
    dslopes: Tensor | None = None
