"""PyTorch's own attentions: scaled_dot_product_attention by back end, and FlexAttention."""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.bench.bound import Bound, heads_first, packed
from hasten.bench.problems import Pattern, Problem

_LARGEST_DENSE_MASK = 1 << 30


def bind_sdpa(backend: SDPBackend, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """torch's scaled_dot_product_attention with one back end, on contiguous (batch, heads, seqlen, head_dim)."""
    pattern = problem.pattern
    if backend == SDPBackend.FLASH_ATTENTION and pattern.mean_length and q.device.type == "cuda":
        return _bind_varlen(problem, q, k, v)
    q, k, v = heads_first(q, k, v)
    matrix = None if pattern.is_dense else problem.mask(q.device).keep(problem.seqlen, device=q.device)
    has_groups = problem.num_kv_heads != problem.num_heads

    def run() -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=matrix, is_causal=pattern.is_causal, enable_gqa=has_groups
        )

    return Bound(run, (q, k, v), heads_first=True, context=partial(sdpa_kernel, backend))


def _bind_varlen(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """The same back end for documents: torch's varlen_attn."""
    varlen_attn: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    q, k, v = packed(q, k, v)
    bounds, longest = problem.cu_seqlens(q.device)
    is_new = "window_size" in inspect.signature(varlen_attn).parameters
    words: dict[str, Any] = {"window_size": (-1, 0)} if is_new else {"is_causal": True}

    def run() -> Tensor:
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, **words)
        assert isinstance(out, Tensor)
        return out

    return Bound(run, (q, k, v), is_packed=True)


def sdpa_refuses(takes_matrix: bool, problem: Problem, device: torch.device) -> str | None:
    """Why a back end cannot do a problem, or None; `takes_matrix`: any mask, as a boolean matrix."""
    if problem.pattern.is_dense:
        return None
    if not takes_matrix and device.type == "cuda":
        if not problem.pattern.mean_length:
            return "takes no mask but causal"
        has_groups = problem.num_kv_heads != problem.num_heads
        return "takes documents with as many K/V heads as query heads only" if has_groups else None
    return "the mask as a matrix is too large" if problem.seqlen**2 > _LARGEST_DENSE_MASK else None


def bind_flex(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """FlexAttention compiled for exactly this problem, on contiguous (batch, heads, seqlen, head_dim)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # imports the compiler

    q, k, v = heads_first(q, k, v)
    length, has_groups = problem.seqlen, problem.num_kv_heads != problem.num_heads
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    blocks = None
    if problem.pattern != Pattern():
        blocks = create_block_mask(
            problem.pattern.mask_mod(length, q.device), None, None, length, length, device=str(q.device)
        )

    def run() -> Tensor:
        out = compiled(q, k, v, block_mask=blocks, enable_gqa=has_groups)
        assert isinstance(out, Tensor)
        return out

    return Bound(run, (q, k, v), heads_first=True)


def forget_compiled() -> None:
    """Start the compiler anew: past eight shapes it would give up and run FlexAttention uncompiled."""
    torch.compiler.reset()
