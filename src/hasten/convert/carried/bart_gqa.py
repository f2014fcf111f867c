"""BART whose decoder has fewer key/value heads than query heads, in self- and cross-attention; the encoder is as ever.

Travels inside a checkpoint written by hasten; loads with `trust_remote_code=True` where hasten is not installed.
"""

from __future__ import annotations

from typing import Any

from transformers import BartConfig, BartForConditionalGeneration, EncoderDecoderCache
from transformers.models.bart.modeling_bart import BartAttention

from .grouped import GroupedConfig, attend, narrow, no_static_shape


class BartGQAConfig(GroupedConfig, BartConfig):
    """BartConfig with `kv_heads` and `kv_index`."""

    model_type = "bart_gqa"
    _auto_class = "AutoConfig"  # save_pretrained writes this file beside it


class BartGQAAttention(BartAttention):
    """A layer of BART's decoder with `num_key_value_heads` heads in k and v."""

    def forward(
        self,
        hidden_states: Any,
        key_value_states: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        """As BartAttention's: (out (batch, seqlen_q, d_model), weights or None)."""
        is_cross = key_value_states is not None
        query = self._split(self.q_proj(hidden_states))
        key, value = self._keys(key_value_states if is_cross else hidden_states, is_cross, past_key_values)
        out, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=self.dropout, **options
        )
        return self.out_proj(out.flatten(-2)), weights

    def _split(self, projected: Any) -> Any:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _keys(self, states: Any, is_cross: bool, cache: Any) -> tuple[Any, Any]:
        """Keys and values so far; those of the encoder are projected once."""
        is_both = isinstance(cache, EncoderDecoderCache)
        own = (cache.cross_attention_cache if is_cross else cache.self_attention_cache) if is_both else cache
        if is_cross and is_both and cache.is_updated.get(self.layer_idx):
            return own.layers[self.layer_idx].keys, own.layers[self.layer_idx].values
        key, value = self._split(self.k_proj(states)), self._split(self.v_proj(states))
        if own is not None:
            key, value = own.update(key, value, self.layer_idx)
            if is_cross and is_both:
                cache.is_updated[self.layer_idx] = True
        return key, value


class BartGQAForConditionalGeneration(BartForConditionalGeneration):
    """BartForConditionalGeneration with the layers that `config.kv_heads` names narrowed."""

    config_class = BartGQAConfig
    _auto_class = "AutoModelForSeq2SeqLM"
    _get_static_cache_init_shape = no_static_shape

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        narrow(self, config, BartGQAAttention, ("k_proj", "v_proj"))


CLASSES = {"bart": (BartGQAConfig, BartGQAForConditionalGeneration, "AutoModelForSeq2SeqLM")}
