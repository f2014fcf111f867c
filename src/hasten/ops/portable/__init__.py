"""Attention in Triton for any GPU that Triton serves; runs on a CPU under TRITON_INTERPRET=1.

Envelope: float16, bfloat16, float32; head_dim and head_dim_v of 1 to 256; every feature of `call.py`, but
packed sequences only with masks that are a band. Deterministic, forward and backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.ops.call import Call
from hasten.ops.portable.launch import backward, forward
from hasten.ops.tiles import as_band

__all__ = ["backward", "forward", "refuses"]


def refuses(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    """Why the call is outside the envelope, or None."""
    if q.dtype == torch.float64:
        return "float64 is not offered (use reference or blockwise)"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"head_dim up to 256, got {max(q.shape[-1], v.shape[-1])}"
    band = as_band(call.mask) if call.is_packed else None
    if call.is_packed and (band is None or band.padding is not None):
        return f"packed sequences take Full, Causal and plain Window masks, got {call.mask!r}"
    return None
