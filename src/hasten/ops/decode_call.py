"""One decode attention call, checked: everything an implementation is told besides the queries and the cache.

Made by `decode.py`, read by its implementations: functions (q, keys, call) -> (out, lse) in the layouts of
`decode.decode_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DecodeCall:
    """The terms of one call.

    Query i of a sequence stands at p = cache_seqlens - seqlen_q + i and sees keys p - left ... p + right that are in
    the cache; None is unlimited. score(p, n) = softcap * tanh(softmax_scale * q.k / softcap) - slope * |p - n|.

    max_seqlen_q: queries of the longest sequence, of every one if not packed. softcap 0 means none. sinks:
    (num_heads,) float32. slopes: (batch or 1, num_heads) float32. cu_seqlens_q: int32 (batch + 1,) if packed.
    shared_prefix: how many first tokens all sequences share, by the same entries of the block table; 0 means none.
    """

    softmax_scale: float
    max_seqlen_q: int
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    shared_prefix: int = 0
