"""GPT-NeoX with fewer key/value heads than query heads, which no class of transformers is.

Travels inside a checkpoint written by hasten; loads with `trust_remote_code=True` where hasten is not installed.
"""

from __future__ import annotations

from typing import Any

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, apply_rotary_pos_emb

from .grouped import GroupedConfig, attend, cached, narrow, no_static_shape, split_heads


class GPTNeoXGQAConfig(GroupedConfig, GPTNeoXConfig):
    """GPTNeoXConfig with `kv_heads` and `kv_index`."""

    model_type = "gpt_neox_gqa"
    _auto_class = "AutoConfig"  # save_pretrained writes this file beside it


class GPTNeoXGQAAttention(GPTNeoXAttention):
    """A layer of GPT-NeoX whose query_key_value holds all q heads, then the k heads, then the v heads."""

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Any = None,
        layer_past: Any = None,
        position_embeddings: Any = None,
        **options: Any,
    ) -> Any:
        """As GPTNeoXAttention's: (out (batch, seqlen_q, hidden_size), weights or None)."""
        projected, num_heads = self.query_key_value(hidden_states), self.config.num_attention_heads
        query, key, value = split_heads(projected, num_heads, self.num_key_value_heads, self.head_size)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = cached(self, layer_past, key, value)
        out, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=self.attention_dropout, **options
        )
        return self.dense(out.flatten(-2)), weights


class GPTNeoXGQAForCausalLM(GPTNeoXForCausalLM):
    """GPTNeoXForCausalLM with the layers that `config.kv_heads` names narrowed."""

    config_class = GPTNeoXGQAConfig
    _auto_class = "AutoModelForCausalLM"
    _get_static_cache_init_shape = no_static_shape

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        narrow(self, config, GPTNeoXGQAAttention, ("query_key_value",))


CLASSES = {"gpt_neox": (GPTNeoXGQAConfig, GPTNeoXGQAForCausalLM, "AutoModelForCausalLM")}
