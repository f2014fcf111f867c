"""How many pages an engine takes, and how long a sequence of a model may get. What a token
costs beside others. Called when an engine is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hasten.cache.paged import Kind, free_bytes, kinds_of, page_bytes
from hasten.engine.runner import context_length
from hasten.errors import ArgumentError

KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
CPU_BYTES = 2**30  # of a pool that nobody gave a size
CUDA_SHARE = 0.85  # of the memory that is free once the model is there; the rest is for its activations


def num_pages(
    layers: Sequence[Kind],
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    wanted: int | None,
    memory_bytes: int | None,
    context: int | None,
    max_running: int,
    max_batch_tokens: int,
) -> list[int]:
    """Pages of each kind, of K and V kept in `dtype`: as many as are wanted or `memory_bytes` hold, or a good number.

    `wanted` is of the layers that keep everything. Layers with a window get what all running sequences can use, and
    never more than the others. Raises ArgumentError for both or for too little.
    """
    if wanted is not None and memory_bytes is not None:
        raise ArgumentError("memory_bytes", "nothing beside num_pages", memory_bytes, "give one of them")
    kinds = kinds_of(layers)
    most = [_useful(kind, page_size, context, max_running, max_batch_tokens) for kind in kinds]
    sizes = [page_bytes(layers, kind, page_size, dtype) for kind in kinds]
    if wanted is not None:
        return [wanted if kind.window is None else min(wanted, one) for kind, one in zip(kinds, most, strict=True)]
    share = memory_bytes if memory_bytes is not None else _share(device)
    counts = _within(share, sizes, most)
    if min(counts) < 1:
        got = f"{share:,} bytes, where a page takes {sum(sizes):,}"
        raise ArgumentError("memory_bytes", "room for at least a page beside the unused one", got, "give more")
    return counts


def cost(model: Any, layers: Sequence[Kind]) -> Callable[[int, int], float]:
    """FLOPs of computing tokens behind others, but for a factor: those of the weights and those of the attention."""
    weights = sum(one.numel() for one in model.parameters()) - model.get_input_embeddings().weight.numel()
    num_heads = int(getattr(model.config.get_text_config(decoder=True), "num_attention_heads", 1))
    per_key = sum(num_heads * (layer.head_dim + layer.head_dim_v) for layer in layers)
    return lambda before, count: count * (weights + per_key * (before + count / 2))


def stored_as(kv_dtype: str | None, dtype: torch.dtype) -> torch.dtype:
    """How K and V of a model of `dtype` are kept; raises ArgumentError for a name that is none."""
    if kv_dtype is None:
        return dtype
    if kv_dtype not in KV_DTYPES:
        raise ArgumentError("kv_dtype", f"one of {', '.join(KV_DTYPES)}", repr(kv_dtype), "or leave it out")
    return KV_DTYPES[kv_dtype]


def longest(config: Any) -> int | None:
    """The most tokens of a sequence that is computed as it would be alone; None if the model sets no limit.

    With LongRoPE, all positions change where a sequence grows beyond the original length, and K in a cache with them:
    sequences end there.
    """
    context = context_length(config)
    ropes = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings")
            context = min(one for one in (context, original) if isinstance(one, int))
    return context


def _within(memory_bytes: int, sizes: Sequence[int], most: Sequence[int]) -> list[int]:
    """As many pages of every kind as fit, the same number of each until a kind has all it can use."""
    counts = [0] * len(sizes)
    left = memory_bytes - sum(sizes)  # the null pages
    growing = list(range(len(sizes)))
    while growing:
        more = min(left // sum(sizes[kind] for kind in growing), *(most[kind] - counts[kind] for kind in growing))
        if more <= 0:
            break
        for kind in growing:
            counts[kind] += more
            left -= more * sizes[kind]
        growing = [kind for kind in growing if counts[kind] < most[kind]]
    return counts


def _useful(kind: Kind, page_size: int, context: int | None, max_running: int, max_batch_tokens: int) -> int:
    """The most pages of a kind that sequences can hold at once."""
    longest_pages = 2**40 if context is None else -(-context // page_size)
    if kind.window is None:
        return max_running * longest_pages
    own = -(-kind.window // page_size) + 2  # a window that begins in the middle of a page, and the next page
    return max_running * min(own, longest_pages) + -(-max_batch_tokens // page_size)


def _share(device: torch.device) -> int:
    return int(CUDA_SHARE * free_bytes(device)) if device.type == "cuda" else min(CPU_BYTES, free_bytes(device) // 2)


__all__ = ["longest", "num_pages", "stored_as"]
