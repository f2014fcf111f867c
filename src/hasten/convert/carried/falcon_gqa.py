"""Falcon with groups where transformers' class has none: one after the other (parallel_attn=False), or per layer.

Travels inside a checkpoint written by hasten; loads with `trust_remote_code=True` where hasten is not installed.
"""

from __future__ import annotations

from typing import Any

from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from .grouped import GroupedConfig, attend, cached, narrow, no_static_shape, split_heads


class FalconGQAConfig(GroupedConfig, FalconConfig):
    """FalconConfig with `kv_heads` and `kv_index`."""

    model_type = "falcon_gqa"
    _auto_class = "AutoConfig"  # save_pretrained writes this file beside it


class FalconGQAAttention(FalconAttention):
    """A layer of Falcon whose query_key_value holds all q heads, then the k heads, then the v heads."""

    def forward(
        self,
        hidden_states: Any,
        alibi: Any = None,
        attention_mask: Any = None,
        layer_past: Any = None,
        position_embeddings: Any = None,
        **options: Any,
    ) -> Any:
        """As FalconAttention's: (out (batch, seqlen_q, hidden_size), weights or None)."""
        projected = self.query_key_value(hidden_states)
        query, key, value = split_heads(projected, self.num_heads, self.num_key_value_heads, self.head_dim)
        if alibi is None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = cached(self, layer_past, key, value)
        rate = self.attention_dropout.p
        # with ALiBi the model has put the biases into the mask
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.inv_norm_factor, dropout=rate)
        return self.dense(out.flatten(-2)), weights


class FalconGQAForCausalLM(FalconForCausalLM):
    """FalconForCausalLM with the layers that `config.kv_heads` names narrowed."""

    config_class = FalconGQAConfig
    _auto_class = "AutoModelForCausalLM"
    _get_static_cache_init_shape = no_static_shape

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        narrow(self, config, FalconGQAAttention, ("query_key_value",))


CLASSES = {"falcon": (FalconGQAConfig, FalconGQAForCausalLM, "AutoModelForCausalLM")}
