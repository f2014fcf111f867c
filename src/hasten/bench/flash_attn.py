"""The flash-attn packages, on (batch, seqlen, heads, head_dim) or packed.

flash-attn-4 is told of a mask that is neither a band nor documents by lists of blocks, and of the cells of partial
blocks by a function in its language, CuTe, which it compiles with its kernel.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.bench.bound import Bound, as_given, cu_seqlens, packed
from hasten.bench.check import visible
from hasten.bench.problems import BLOCK, Problem


def bind(module: str, unlimited: int | None, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """The flash-attn packages, on (batch, seqlen, heads, head_dim); `unlimited` is how they write no window."""
    functions, pattern = importlib.import_module(module), problem.pattern
    if pattern.mean_length:
        q, k, v = packed(q, k, v)
        call = partial(functions.flash_attn_varlen_func, causal=True, **cu_seqlens(problem, q.device))
    else:
        q, k, v = as_given(q, k, v)
        window = (unlimited, unlimited) if pattern.is_dense else (pattern.left, pattern.right)
        call = partial(functions.flash_attn_func, causal=pattern.is_causal, window_size=window)

    def run() -> Tensor:
        out = call(q, k, v)
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, Tensor)
        return result

    return Bound(run, (q, k, v), is_packed=bool(pattern.mean_length))


def bind_4(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """As its elder sisters, and with lists of blocks."""
    if not (problem.pattern.num_global or problem.pattern.percent):
        return bind("flash_attn.cute", None, problem, q, k, v)
    q, k, v = as_given(q, k, v)
    return Bound(partial(blocks_function(problem, q.device), q, k, v), (q, k, v))


def refuses(takes_blocks: bool, problem: Problem, device: torch.device) -> str | None:
    """Why a package cannot do a problem, or None; `takes_blocks`: flash-attn-4 alone."""
    if problem.dtype.itemsize != 2:
        return "takes 16-bit inputs only"
    if not (problem.pattern.num_global or problem.pattern.percent):
        return None
    if not takes_blocks:
        return "has no global tokens and no lists of blocks"
    return "takes lists of blocks of 128 keys up to head_dim 128 only" if problem.head_dim > 128 else None


def blocks_function(problem: Problem, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """out of q, k, v (batch, seqlen, heads, head_dim), for a problem with global tokens or blocks."""
    cute = importlib.import_module("flash_attn.cute")
    tensors = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    kinds = block_kinds(problem, device)
    by_row = tensors(*(part for kind in kinds for part in block_list(kind)), block_size=(BLOCK, BLOCK))
    by_column = tensors(*(part for kind in kinds for part in block_list(kind.T)), block_size=(BLOCK, BLOCK))
    pattern = problem.pattern
    inside = longformer_function(pattern.left, pattern.num_global) if pattern.num_global else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = cute.flash_attn_func(
            q, k, v, mask_mod=inside, block_sparse_tensors=by_row, block_sparse_tensors_bwd=by_column
        )
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, Tensor)
        return result

    return run


@functools.lru_cache(maxsize=1)
def block_kinds(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    """bool (row blocks, key blocks) twice: blocks seen in part, blocks seen whole; of the mask's own definition."""
    seen, whole = [], []
    for rows in torch.arange(problem.seqlen, device=device).split(BLOCK):
        keep = visible(problem, rows)
        past_end = -problem.seqlen % BLOCK
        seen.append(F.pad(keep, (0, past_end)).any(0).reshape(-1, BLOCK).any(1))
        whole.append(F.pad(keep, (0, past_end), value=True).all(0).reshape(-1, BLOCK).all(1))
    full = torch.stack(whole)
    return torch.stack(seen) & ~full, full


def block_list(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are chosen and which, ascending, first: int32 (1, 1, rows), (1, 1, rows, columns)."""
    which = torch.argsort(chosen.int(), dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], which.int().contiguous()[None, None]


def longformer_function(window: int | None, num_global: int) -> Any:
    """The cells of a window with global tokens, in the peer's language."""
    cute = importlib.import_module("cutlass.cute")

    @cute.jit  # type: ignore[untyped-decorator]
    def visible(batch: Any, head: Any, query: Any, key: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
        near = (key >= query - window) & (key <= query + window)
        return near | (key < num_global) | (query < num_global)

    return visible
