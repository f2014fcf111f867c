"""The attention interface of transformers, served by `hasten.attention`; and the registration of both halves.

A layer calls `forward` with its own q, k, v, the mask its model made (see masking.py), and what its
architecture adds: softcap, sinks, a relative bias. Nothing here knows an architecture.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from hasten.errors import ArgumentError, ArgumentTypeError
from hasten.masks import And, Causal, Dense, Documents, Full, Mask, Window
from hasten.models.masking import ModelMask, make_mask
from hasten.ops.attention import attention
from hasten.ops.choose import NAMES

NAME = "hasten"


def register() -> None:
    """Make attn_implementation="hasten" known to transformers, the attention and its masks.

    Also "hasten-reference", "hasten-blockwise" and so on, one for each implementation, which force it. Done when
    `hasten.models` is imported; doing it again changes nothing.
    """
    for implementation in (None, *NAMES):
        AttentionInterface.register(name_of(implementation), partial(forward, implementation=implementation))
        AttentionMaskInterface.register(name_of(implementation), make_mask)


def name_of(implementation: str | None) -> str:
    """The attn_implementation that forces an implementation; None is the free choice, "hasten"."""
    if implementation is None:
        return NAME
    if implementation not in NAMES:
        expected = f"one of {', '.join(NAMES)}"
        raise ArgumentError("implementation", expected, repr(implementation), "or leave it out")
    return f"{NAME}-{implementation}"


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | ModelMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, in the form that transformers prescribes.

    query (batch, num_heads, seqlen_q, head_dim), key and value (batch, num_kv_heads, seqlen_k, head_dim), of any
    strides; they are read as they lie. attention_mask: what the model's mask maker returned, or a tensor of 4
    dimensions, bool (True is visible) or float (added to the scores). position_bias: added to the scores,
    with gradient. s_aux: (num_heads,), attention sinks. sliding_window counts only without a mask.

    Returns (out (batch, seqlen_q, num_heads, head_dim), None): there are no attention weights to return.
    """
    _refuse(module, others)
    mask, bias = _who_sees_whom(module, query, key, attention_mask, is_causal, sliding_window)
    if isinstance(attention_mask, ModelMask) and attention_mask.num_keys is not None:
        key, value = key[:, :, : attention_mask.num_keys], value[:, :, : attention_mask.num_keys]
        position_bias = None if position_bias is None else position_bias[..., : attention_mask.num_keys]
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        _packed(mask, query, key, others),
        softmax_scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        bias=bias,
        dropout_p=dropout if module.training else 0.0,
        implementation=implementation,
    )
    assert isinstance(out, Tensor)
    return out, None


def _refuse(module: nn.Module, others: dict[str, Any]) -> None:
    """Raise for what a layer asks and hasten cannot give; other keywords are hints to other kernels."""
    if others.get("output_attentions"):
        hint = "load the model with attn_implementation='eager' to see the weights"
        raise ArgumentError("output_attentions", "False: no attention weights exist to be returned", True, hint)
    for name in ("cache", "sinks", "block_indices"):
        if others.get(name) is not None:
            got = f"{type(others[name]).__name__} from {type(module).__name__}"
            raise ArgumentError(name, "nothing", got, "use attn_implementation='sdpa' or 'eager' for this")


def _who_sees_whom(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | ModelMask | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> tuple[Mask, Tensor | None]:
    """(mask, bias) that say what `attention_mask` says; without one, the layer's own causality."""
    if isinstance(attention_mask, ModelMask):
        return attention_mask.mask, None
    if attention_mask is None:
        return _own_mask(module, query.shape[2], key.shape[2], is_causal, sliding_window), None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4:
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        hint = f"{type(module).__name__} made it on its own; use attn_implementation='eager'"
        raise ArgumentError("attention_mask", "(batch, heads or 1, seqlen_q, seqlen_k)", shape, hint)
    if attention_mask.dtype == torch.bool:
        return Dense(attention_mask), None
    if attention_mask.dtype.is_floating_point:
        return Full(), attention_mask
    raise ArgumentTypeError("attention_mask", "bool or float", attention_mask.dtype, "True means visible")


def _own_mask(
    module: nn.Module, seqlen_q: int, seqlen_k: int, is_causal: bool | None, sliding_window: int | None
) -> Mask:
    """The mask of a layer whose model made none: as in transformers, causal unless it says otherwise."""
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not is_causal or (seqlen_q == 1 and sliding_window is None):
        return Full()
    if seqlen_q not in (1, seqlen_k):
        got = f"none, for {seqlen_q} queries over {seqlen_k} keys in {type(module).__name__}"
        raise ArgumentError("attention_mask", "a mask", got, "it is not known where the queries stand")
    return Causal() if sliding_window is None else Window(sliding_window - 1, 0)


def _packed(mask: Mask, query: Tensor, key: Tensor, others: dict[str, Any]) -> Mask:
    """The mask within the packed sequences that a flattening collator gave as `cu_seq_lens_q`, if it did."""
    cu_seqlens = others.get("cu_seq_lens_q")
    parts = mask.masks if isinstance(mask, And) else (mask,)
    if cu_seqlens is None or any(isinstance(part, Documents) for part in parts):
        return mask
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        got = f"batch {query.shape[0]}, {query.shape[2]} queries, {key.shape[2]} keys"
        raise ArgumentError(
            "cu_seq_lens_q", "one row of packed sequences and no cache", got, "pass position_ids instead"
        )
    return mask & Documents(cu_seqlens)
