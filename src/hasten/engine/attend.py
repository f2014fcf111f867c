"""Attention of one new token over what a KV cache holds: every key there is visible, so there is no mask.

Called by the graph of a recorded decode step (step.py). Writes the new K and V, and knows no model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.cache import KVCache, KVLayer
from hasten.ops.attention import attention

HALVES = (torch.float16, torch.bfloat16)


def attend(
    cache: KVCache,
    layer: int,
    query: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    left: int | None,
    softcap: float | None,
) -> Tensor:
    """Put K and V of one token in the cache, and attend from it to the last `left` tokens before it (None: to all).

    query (batch, num_heads, 1, head_dim), key_states and value_states (batch, num_kv_heads, 1, head_dim), bias
    (batch or 1, num_heads, 1, at least as many keys as there are). Returns (batch, 1, num_heads, head_dim).
    """
    store: KVLayer = cache.layers[layer]
    store.write(key_states, value_states)
    first = 0 if left is None else max(0, store.length - 1 - left)
    if bias is not None:
        bias = bias[..., first : store.length]
    keys, values = store.read(first)
    return _attend(query, keys, values, bias, sinks, scale, softcap)


def attend_encoder(
    cache: KVCache,
    layer: int,
    query: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attend from one token to all that the encoder wrote. Shapes as in `attend`."""
    keys, values = cache.layers[layer].read()
    return _attend(query, keys, values, bias, sinks, scale, softcap)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """One query over keys (batch, num_kv_heads, length, head_dim) that are all visible."""
    if softcap is not None or sinks is not None:
        options = {"softmax_scale": scale, "softcap": softcap, "sinks": sinks, "bias": bias}
        out = attention(*(each.transpose(1, 2) for each in (query, keys, values)), **options)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return out
    batch, num_heads, _, _ = query.shape
    num_kv_heads, dtype = keys.shape[1], query.dtype
    grouped = (batch, num_kv_heads, num_heads // num_kv_heads, -1)  # the heads of a group are rows over the same keys
    rows = query.reshape(grouped)
    if dtype in HALVES and query.device.type == "cpu":
        # PyTorch's CPU kernel for one half-precision query is 3.4 times slower than widening K and V for it
        rows, keys, values, bias = rows.float(), keys.float(), values.float(), None if bias is None else bias.float()
    if bias is not None:
        bias = bias.expand(batch, num_heads, 1, keys.shape[2]).reshape(grouped)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias, scale=scale)
    return out.to(dtype).reshape(batch, 1, num_heads, -1)
