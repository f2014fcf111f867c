"""T5 whose decoder has fewer key/value heads than query heads, in self- and cross-attention; the encoder is as ever.

Travels inside a checkpoint written by hasten; loads with `trust_remote_code=True` where hasten is not installed.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import EncoderDecoderCache, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from .grouped import GroupedConfig, attend, narrow, no_static_shape


class T5GQAConfig(GroupedConfig, T5Config):
    """T5Config with `kv_heads` and `kv_index`."""

    model_type = "t5_gqa"
    _auto_class = "AutoConfig"  # save_pretrained writes this file beside it


class T5GQAAttention(T5Attention):
    """A layer of T5's decoder with `num_key_value_heads` heads in k and v."""

    def forward(
        self,
        hidden_states: Any,
        mask: Any = None,
        key_value_states: Any = None,
        position_bias: Any = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        """As T5Attention's: (out (batch, seqlen_q, d_model), position bias, weights or None)."""
        is_cross = key_value_states is not None
        past = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
        past = past.clone() if isinstance(past, torch.Tensor) else past  # a static cache counts up in place
        query = self._split(self.q(hidden_states))
        key, value = self._keys(key_value_states if is_cross else hidden_states, is_cross, past_key_values)
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.compute_bias(query.shape[2], key.shape[2], query.device, past_seen_tokens=past)
        elif position_bias is None:
            position_bias = query.new_zeros(1, self.n_heads, query.shape[2], key.shape[2])
        out, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            scaling=1.0,
            dropout=self.dropout,
            position_bias=position_bias,
            **options,
        )
        return self.o(out.flatten(-2)), position_bias, weights

    def _split(self, projected: Any) -> Any:
        return projected.unflatten(-1, (-1, self.key_value_proj_dim)).transpose(1, 2)

    def _keys(self, states: Any, is_cross: bool, cache: Any) -> tuple[Any, Any]:
        """Keys and values so far; those of the encoder are projected once."""
        is_both = isinstance(cache, EncoderDecoderCache)
        own = (cache.cross_attention_cache if is_cross else cache.self_attention_cache) if is_both else cache
        if is_cross and is_both and cache.is_updated.get(self.layer_idx):
            return own.layers[self.layer_idx].keys, own.layers[self.layer_idx].values
        key, value = self._split(self.k(states)), self._split(self.v(states))
        if own is not None:
            key, value = own.update(key, value, self.layer_idx)
            if is_cross and is_both:
                cache.is_updated[self.layer_idx] = True
        return key, value


class T5GQAForConditionalGeneration(T5ForConditionalGeneration):
    """T5ForConditionalGeneration with the layers that `config.kv_heads` names narrowed."""

    config_class = T5GQAConfig
    _auto_class = "AutoModelForSeq2SeqLM"
    _get_static_cache_init_shape = no_static_shape

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        narrow(self, config, T5GQAAttention, ("k", "v"))


CLASSES = {"t5": (T5GQAConfig, T5GQAForConditionalGeneration, "AutoModelForSeq2SeqLM")}
