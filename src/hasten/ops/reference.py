"""The oracle: attention by its definition, in plain PyTorch, for every feature.

Materialises the whole score matrix and leaves the gradients to autograd, so that every dtype up to
float64, every device and double backward work. The tests hold all else against it; nothing calls it for speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.masks import Cells
from hasten.ops.call import Call
from hasten.ops.dropout import keep_cells


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of the contract; differentiable, twice too.

    Dense: q (batch, seqlen_q, num_heads, head_dim) -> out (..., head_dim_v), lse (batch, num_heads, seqlen_q).
    Packed: q (total_q, num_heads, head_dim) -> out (total_q, ...), lse (num_heads, total_q).
    """
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the products
        return _dense(q, k, v, call, 0) if call.cu_seqlens_q is None else _packed(q, k, v, call)


def _packed(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    outs, lses = [], []
    for number in range(len(starts_q) - 1):
        own_q = slice(starts_q[number], starts_q[number + 1])
        own_k = slice(starts_k[number], starts_k[number + 1])
        out, lse = _dense(q[None, own_q], k[None, own_k], v[None, own_k], call, number)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=-1)


def refuses(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    """None: the oracle takes everything."""
    return None


def _dense(q: Tensor, k: Tensor, v: Tensor, call: Call, sequence: int) -> tuple[Tensor, Tensor]:
    """One batch, or one packed sequence (which is number `sequence`) as a batch of one."""
    batch, seqlen_q, num_heads, _ = q.shape
    seqlen_k, num_kv_heads = k.shape[1], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    group_size = num_heads // num_kv_heads
    q_heads = q.to(dtype).transpose(1, 2)
    k_heads = k.to(dtype).transpose(1, 2).repeat_interleave(group_size, dim=1)
    v_heads = v.to(dtype).transpose(1, 2).repeat_interleave(group_size, dim=1)
    cells = _cells(batch, num_heads, seqlen_q, seqlen_k, q.device)
    call.mask.check(batch, num_heads, seqlen_q, seqlen_k)
    keep = call.mask.visible(cells).expand(batch, num_heads, seqlen_q, seqlen_k)
    if call.bias is not None:
        keep = keep & (call.bias > -torch.inf)
    used = keep.any(dim=2).unsqueeze(-1)  # what stands in a key that no query sees must not matter, be it NaN
    k_heads, v_heads = torch.where(used, k_heads, 0.0), torch.where(used, v_heads, 0.0)

    scores = q_heads @ k_heads.transpose(-1, -2) * call.softmax_scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        scores = scores + torch.where(call.bias > -torch.inf, call.bias.to(dtype), 0.0)
    if call.slopes is not None:
        slopes = call.slopes.to(dtype)[:, :, None, None]
        scores = scores - slopes * (cells.position - cells.key).abs()
    probs, lse = _softmax(torch.where(keep, scores, -torch.inf), call.sinks)
    if call.seed is not None:
        sequence_head = (cells.batch + sequence) * num_heads + cells.head
        kept = keep_cells(call.seed, call.dropout_p, sequence_head, cells.query, cells.key)
        probs = torch.where(kept, probs / (1.0 - call.dropout_p), 0.0)
    out = (probs @ v_heads).transpose(1, 2).to(q.dtype).contiguous()
    return out, lse if lse.dtype == torch.float64 else lse.float()


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp of scores with -inf for hidden; a row without keys gives 0 and -inf."""
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    if scores.shape[-1] == 0:
        return scores, scores.sum(-1) - torch.inf
    seen = (scores > -torch.inf).any(dim=-1, keepdim=True)
    finite = torch.where(seen, scores, 0.0)
    probs = torch.where(seen, torch.softmax(finite, dim=-1), 0.0)  # exp(scores - lse) loses the bits of a large lse
    lse = torch.where(seen.squeeze(-1), torch.logsumexp(finite, dim=-1), -torch.inf)
    return (probs if sinks is None else probs[..., :-1]), lse


def _cells(batch: int, num_heads: int, seqlen_q: int, seqlen_k: int, device: torch.device) -> Cells:
    return Cells(
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(num_heads, device=device)[:, None, None],
        torch.arange(seqlen_q, device=device)[:, None],
        torch.arange(seqlen_k, device=device),
        seqlen_q,
        seqlen_k,
    )
