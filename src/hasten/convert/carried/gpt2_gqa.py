"""GPT-2 with fewer key/value heads than query heads; with one, transformers' own GPTBigCode is the same model.

Travels inside a checkpoint written by hasten; loads with `trust_remote_code=True` where hasten is not installed.
"""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from .grouped import GroupedConfig, attend, cached, narrow, no_static_shape, split_heads


class GPT2GQAConfig(GroupedConfig, GPT2Config):
    """GPT2Config with `kv_heads` and `kv_index`."""

    model_type = "gpt2_gqa"
    _auto_class = "AutoConfig"  # save_pretrained writes this file beside it


class GPT2GQAAttention(GPT2Attention):
    """A layer of GPT-2 whose c_attn holds all q heads, then the k heads, then the v heads."""

    def forward(
        self, hidden_states: Any, past_key_values: Any = None, attention_mask: Any = None, **options: Any
    ) -> Any:
        """As GPT2Attention's, of self-attention: (out (batch, seqlen_q, n_embd), weights or None)."""
        projected = self.c_attn(hidden_states)
        query, key, value = split_heads(projected, self.num_heads, self.num_key_value_heads, self.head_dim)
        cache = getattr(past_key_values, "self_attention_cache", past_key_values)
        key, value = cached(self, cache, key, value)
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        scale = scale / (self.layer_idx + 1) if self.scale_attn_by_inverse_layer_idx else scale
        out, weights = attend(
            self, query, key, value, attention_mask, scaling=scale, dropout=self.attn_dropout.p, **options
        )
        return self.resid_dropout(self.c_proj(out.flatten(-2))), weights


class GPT2GQALMHeadModel(GPT2LMHeadModel):
    """GPT2LMHeadModel with the layers that `config.kv_heads` names narrowed."""

    config_class = GPT2GQAConfig
    _auto_class = "AutoModelForCausalLM"
    _get_static_cache_init_shape = no_static_shape

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        narrow(self, config, GPT2GQAAttention, ("c_attn",))


CLASSES = {"gpt2": (GPT2GQAConfig, GPT2GQALMHeadModel, "AutoModelForCausalLM")}
