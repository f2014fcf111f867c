"""What the key/value cache of a model costs for every possible number of heads, before anything is converted.

Arithmetic from a configuration: bytes, and tokens/s if decoding does nothing but read weights and cache once a step
at the full bandwidth of the memory. Real decoding is slower; the ratios between rows are what to look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hasten.convert.heads import Site, sites
from hasten.errors import ArgumentError


@dataclass(frozen=True)
class GPU:
    """Memory in bytes and its bandwidth in bytes/s, as the vendor states them."""

    memory: float
    bandwidth: float


GPUS: Mapping[str, GPU] = {
    "B200": GPU(180e9, 8.0e12),
    "H200": GPU(141e9, 4.8e12),
    "H100": GPU(80e9, 3.35e12),
    "A100-80GB": GPU(80e9, 2.039e12),
    "A100-40GB": GPU(40e9, 1.555e12),
    "L40S": GPU(48e9, 0.864e12),
    "L4": GPU(24e9, 0.300e12),
    "RTX4090": GPU(24e9, 1.008e12),
}
USABLE = 0.9  # of the memory; the rest is for activations and fragments


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One row: a number of key/value heads in every layer, and what follows from it at one context length.

    kv_bytes_per_token: of the decoder's self-attention, while no sliding window is full. source_bytes_per_token: of
    cross-attention, for each token of the encoder; its text is taken to be as long as the context.
    kv_bytes: of one sequence at the context. weight_bytes: of all weights. largest_batch: sequences that fit
    beside them. tokens_per_s_single, tokens_per_s_largest: the ceiling of decoding one, or that many, sequences.
    """

    num_kv_heads: int
    kv_bytes_per_token: int
    source_bytes_per_token: int
    kv_bytes: int
    weight_bytes: int
    largest_batch: int
    tokens_per_s_single: float
    tokens_per_s_largest: float


def costs(model: Any, *, gpu: str = "H200", context: int | None = None, dtype: torch.dtype | None = None) -> list[Cost]:
    """A row for the number of heads that the model has and for each that it could be converted to, most heads first.

    model: may be on the meta device. context: tokens; the longest that the model's positions allow if None. dtype: of
    weights and cache; the model's if None. Raises ArgumentError for an unknown GPU, architecture or context.
    """
    if gpu not in GPUS:
        raise ArgumentError("gpu", f"one of {', '.join(GPUS)}", repr(gpu), "or take one with a similar memory")
    length = longest_context(model.config) if context is None else context
    if length < 1:
        raise ArgumentError("context", "at least 1 token", str(length), "give the length you serve")
    found, itemsize = sites(model), (dtype or model.dtype).itemsize
    has = found[0].num_kv_heads
    counts = [count for count in range(has, 0, -1) if all(site.num_kv_heads % count == 0 for site in found)]
    return [_cost(model, found, count, GPUS[gpu], length, itemsize) for count in counts]


def _cost(model: Any, found: list[Site], count: int, gpu: GPU, context: int, itemsize: int) -> Cost:
    own, source = ([s for s in found if s.is_cross == is_cross] for is_cross in (False, True))
    per_token = {site.path: 2 * count * site.head_dim * itemsize for site in found}
    kv_bytes = sum(per_token[site.path] * _visible(model.config, site.layer, context) for site in own)
    kv_bytes += sum(per_token[site.path] * context for site in source)
    gone = sum(_kv_parameters(model, site) * (site.num_kv_heads - count) // site.num_kv_heads for site in found)
    weights = (sum(parameter.numel() for parameter in model.parameters()) - gone) * itemsize
    read = (_decoding_parameters(model) - gone) * itemsize
    batch = max(0, int((USABLE * gpu.memory - weights) // kv_bytes))
    return Cost(
        num_kv_heads=count,
        kv_bytes_per_token=sum(per_token[site.path] for site in own),
        source_bytes_per_token=sum(per_token[site.path] for site in source),
        kv_bytes=kv_bytes,
        weight_bytes=weights,
        largest_batch=batch,
        tokens_per_s_single=gpu.bandwidth / (read + kv_bytes),
        tokens_per_s_largest=batch * gpu.bandwidth / (read + batch * kv_bytes),
    )


def longest_context(config: Any) -> int:
    """Tokens that the model's positions allow; 2048 where they are relative and allow any."""
    return int(getattr(config, "max_position_embeddings", None) or 2048)


def _visible(config: Any, layer: int, context: int) -> int:
    """Tokens whose keys a layer keeps at this context."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or (kinds is not None and kinds[layer] != "sliding_attention"):
        return context
    return min(context, int(window))


def _kv_parameters(model: Any, site: Site) -> int:
    """Weights of k and v in one layer, without biases."""
    attention = model.get_submodule(site.path)
    weight = attention.get_submodule(site.layout.projections[-1]).weight
    width = weight.shape[0 if site.layout.is_transposed else 1]
    return int(2 * site.num_kv_heads * site.head_dim * width)


def _decoding_parameters(model: Any) -> int:
    """Weights that a decode step reads: no encoder, and no table of which it reads a row a token."""
    parts = dict(model.named_modules())
    encoder = next((part for name, part in parts.items() if name.split(".")[-1] == "encoder"), None)
    skipped = {} if encoder is None else {id(p): p for p in encoder.parameters()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    read = {id(p): p for p in model.parameters() if id(p) not in skipped}
    if table is not None and (head is None or head.weight is not table.weight):
        read.pop(id(table.weight), None)
    elif table is not None:
        read[id(table.weight)] = table.weight  # as the output matrix it is read whole
    return sum(parameter.numel() for parameter in read.values())
