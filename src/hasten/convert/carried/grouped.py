"""Attention with fewer key/value heads than query heads, for classes of transformers that have none of it.

Travels inside a checkpoint beside the file that imports it; written by hasten, needs torch and transformers only.
A model's `config.kv_heads` gives the number of key/value heads of each attention layer by its path, and
`config.kv_index` which one each query head reads, for layers where groups are uneven or not contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attend(
    module: Any, query: Any, key: Any, value: Any, mask: Any, *, scaling: float, dropout: float, **options: Any
) -> tuple[Any, Any]:
    """Attention through transformers' registry; eager is the function below.

    query: (batch, num_heads, seqlen_q, head_dim). key, value: (batch, num_kv_heads, seqlen_k, head_dim). Returns
    (batch, seqlen_q, num_heads, head_dim) and the weights, or None.
    """
    if module.kv_index is not None:  # groups that no class can express: a head of K and V for every query head
        key, value = key[:, module.kv_index], value[:, module.kv_index]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    rate = dropout if module.training else 0.0
    return function(module, query, key, value, mask, scaling=scaling, dropout=rate, **options)


def eager(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    scaling: float,
    dropout: float = 0.0,
    position_bias: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Plain attention; shapes as in `attend`. position_bias is added to the scaled scores."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    for bias in (position_bias, attention_mask):
        if bias is not None:
            scores = scores + bias
    weights = nn.functional.dropout(scores.softmax(-1).to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def narrow(model: Any, config: Any, kind: type | None, names: tuple[str, ...]) -> None:
    """Give each attention layer the key/value heads that the configuration says, and the forward of `kind`.

    names: (k, v), or the one projection that holds q, k and v. The layers are those that transformers built: only
    these projections are replaced, by narrower ones of the same class.
    """
    for path, num_kv_heads in config.kv_heads.items():
        attention = model.get_submodule(path)
        size, num_heads = head_sizes(config)
        kept = num_heads if len(names) == 1 else 0
        num_matrices = 2 if len(names) == 1 else 1
        for name in names:
            resize(attention, name, (kept + num_matrices * num_kv_heads) * size)
        index = config.kv_index.get(path)
        attention.kv_index = None if index is None else list(index)
        attention.num_key_value_heads = num_kv_heads
        attention.num_key_value_groups = 1 if index is not None else num_heads // num_kv_heads
        if kind is not None:
            attention.__class__ = kind  # the layer as transformers built it, with another forward


def head_sizes(config: Any) -> tuple[int, int]:
    """(head_dim, number of query heads) of the layers that are narrowed."""
    num_heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    return getattr(config, "head_dim", None) or config.hidden_size // num_heads, num_heads


def resize(attention: Any, name: str, rows: int) -> None:
    """Put an uninitialised projection with `rows` outputs in the place of another, same class, bias and dtype."""
    old = getattr(attention, name)
    if isinstance(old, nn.Linear):
        new = type(old)(old.in_features, rows, bias=old.bias is not None)
    else:  # Conv1D
        new = type(old)(rows, old.weight.shape[0])
    setattr(attention, name, new.to(device=old.weight.device, dtype=old.weight.dtype))


def cached(attention: Any, cache: Any, key: Any, value: Any) -> tuple[Any, Any]:
    """The keys and values so far, these included; the cache may be None."""
    return (key, value) if cache is None else cache.update(key, value, attention.layer_idx)


class GroupedConfig:
    """What a configuration with `kv_heads` and `kv_index` has beyond its base."""

    kv_heads: dict[str, int]
    kv_index: dict[str, list[int]]


def no_static_shape(model: Any) -> None:
    """Tell `generate` that a static cache cannot be made before the first keys are seen: layers may differ."""
    return None


def split_heads(projected: torch.Tensor, num_heads: int, num_kv_heads: int, size: int) -> Any:
    """(batch, seqlen, (num_heads + 2 num_kv_heads) head_dim) -> q, k, v, each (batch, its heads, seqlen, head_dim)."""
    heads = projected.unflatten(-1, (-1, size)).transpose(1, 2)
    return heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
