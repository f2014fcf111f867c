"""Masks that are cheaper as another call: documents become packed sequences, dilation becomes strides.

Both say the same attention with no cell wasted. Callers: `attention.py` for dilation, which only rearranges;
`operators.py` for documents, whose bounds have to be read.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from hasten.masks import And, Causal, Documents, Full, Mask, Window
from hasten.ops.call import Call
from hasten.ops.host import can_read, derived, from_values, host_copy


def split_documents(mask: Mask) -> tuple[Documents, Mask] | None:
    """(documents, the band they are joined with) if the mask is exactly that, else None."""
    if not isinstance(mask, And | Documents):
        return None
    parts = mask.masks if isinstance(mask, And) else (mask,)
    documents = [part for part in parts if isinstance(part, Documents)]
    bands = [
        part for part in parts if isinstance(part, Full | Causal) or (isinstance(part, Window) and part.dilation == 1)
    ]
    if len(documents) != 1 or len(bands) != len(parts) - 1:
        return None
    return documents[0], (Full() if not bands else bands[0] if len(bands) == 1 else And(tuple(bands)))


def pack_documents(q: Tensor, k: Tensor, call: Call) -> Call | None:
    """The packed call that equals this dense one, for q and k flattened to (batch * seqlen, heads, head_dim).

    None if the documents do not cover every row from first to last, or may not be looked at now.
    """
    split = split_documents(call.mask)
    batch, seqlen = q.shape[0], q.shape[1]
    if split is None or call.is_packed or call.bias is not None or k.shape[1] != seqlen or call.seed is not None:
        return None
    if call.slopes is not None and call.slopes.shape[0] > 1:
        return None
    documents, band = split
    if not can_read(documents.cu_seqlens):
        return None
    lengths = (batch, seqlen, str(q.device))
    packed, longest = derived(
        documents.cu_seqlens, lengths, lambda: _packed_bounds(documents.cu_seqlens, batch, seqlen, q.device)
    )
    if packed is None:
        return None
    call = replace(call, max_seqlen_q=longest, max_seqlen_k=longest)
    return replace(call, mask=band, cu_seqlens_q=packed, cu_seqlens_k=packed)


def _packed_bounds(cu_seqlens: Tensor, batch: int, seqlen: int, device: torch.device) -> tuple[Tensor | None, int]:
    """(where the documents of all rows begin in the flattened batch, the longest); None if they leave gaps."""
    columns = cu_seqlens.shape[-1]
    values = host_copy(cu_seqlens)
    rows = [values[start : start + columns] for start in range(0, len(values), columns)]
    if any(row[0] != 0 or row[-1] != seqlen or list(row) != sorted(row) for row in rows):
        return None, 0
    rows = rows * (batch // len(rows))
    bounds = [number * seqlen + start for number, row in enumerate(rows) for start in row[:-1]] + [batch * seqlen]
    bounds = sorted(set(bounds))  # empty documents, which some callers use as filling, cost programs
    longest = max((after - before for before, after in itertools.pairwise(bounds)), default=0)
    return from_values(tuple(bounds), device), longest


def dilation(q: Tensor, k: Tensor, call: Call) -> int:
    """d > 1 if the call equals d plain-window calls on every d-th row of q, k and v; else 1."""
    mask = call.mask
    if not isinstance(mask, Window) or not isinstance(mask.dilation, int) or call.is_packed:
        return 1
    extras = (call.bias, call.slopes, call.seed)
    if any(extra is not None for extra in extras) or min(q.shape[1], k.shape[1]) < mask.dilation:
        return 1
    return mask.dilation


def undilated(mask: Mask) -> Window:
    """The plain window that a dilated one is on every d-th row."""
    assert isinstance(mask, Window)
    return Window(mask.left, mask.right)


def interleave(parts: list[Tensor], dim: int) -> Tensor:
    """Undo rows residue, residue + step, ... along `dim`: parts[r][i] goes to i * len(parts) + r."""
    longest = max(part.shape[dim] for part in parts)
    total = sum(part.shape[dim] for part in parts)
    padded = []
    for part in parts:
        missing = longest - part.shape[dim]
        filler = part.new_zeros((*part.shape[:dim], missing, *part.shape[dim + 1 :]))
        padded.append(torch.cat([part, filler], dim=dim) if missing else part)
    return torch.stack(padded, dim=dim + 1).flatten(dim, dim + 1).narrow(dim, 0, total).contiguous()
