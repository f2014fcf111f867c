"""Exact union of attention over disjoint keys, from each part's output and log-sum-exp.

Used for split keys, cascades, ring attention and Longformer's parts. Differentiable in every input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.errors import ArgumentError


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over all keys, from (out, lse) over disjoint sets of them.

    out: (batch, seqlen_q, num_heads, head_dim_v) with lse (batch, num_heads, seqlen_q), or packed
    (total_q, num_heads, head_dim_v) with lse (num_heads, total_q). A part with lse = -inf adds nothing;
    if all have it, out = 0 and lse = -inf. Sums in float32. Raises ArgumentError on unequal shapes.
    Source: FlashAttention, arXiv 2205.14135, section 3.1 (softmax by blocks).
    """
    if not parts:
        raise ArgumentError("parts", "at least one (out, lse)", "none", "leave merge out if there is nothing to merge")
    out0, lse0 = parts[0]
    for number, (out, lse) in enumerate(parts):
        want = (out.shape[1], out.shape[0]) if out.ndim == 3 else (out.shape[0], out.shape[2], out.shape[1])
        if out.shape != out0.shape or tuple(lse.shape) != tuple(want):
            got = f"out {tuple(out.shape)}, lse {tuple(lse.shape)}"
            raise ArgumentError(
                f"parts[{number}]", f"out {tuple(out0.shape)}, lse {tuple(lse0.shape)}", got, "split keys only"
            )
    lses = torch.stack([lse for _, lse in parts])
    seen = (lses > -torch.inf).any(dim=0)
    lse = torch.logsumexp(torch.where(seen, lses, 0.0), dim=0)
    weights = torch.where(seen, torch.exp(lses - lse), 0.0).transpose(-1, -2).unsqueeze(-1)
    total = weights[0] * out0
    for weight, (out, _) in zip(weights[1:], parts[1:], strict=True):
        total = total + weight * out
    return total.to(out0.dtype), torch.where(seen, lse, -torch.inf)
