"""LED of transformers: Longformer attention in the encoder, `hasten.attention` in the decoder.

The encoder neither pads nor makes matrices of masks; the decoder's layers take masks and cache as every other model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.models.led import modeling_led as theirs
from transformers.models.led.modeling_led import LEDEncoderBaseModelOutput

from hasten.models import interface
from hasten.models.adapters.longformer import ServedSelfAttention, chosen, one_of, refuse_attentions
from hasten.models.masking import ModelMask
from hasten.models.tokens import read_tokens


class LEDEncoderSelfAttention(ServedSelfAttention, theirs.LEDEncoderSelfAttention):
    """The attention of an encoder layer."""


class LEDEncoder(theirs.LEDEncoder):
    """Embeddings and layers of the encoder."""

    implementation: str | None = None
    global_capacity: int | None = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """As in transformers, at the length given: input_ids (batch, seqlen), masks (batch, seqlen)."""
        refuse_attentions(bool(self.config.output_attentions if output_attentions is None else output_attentions))
        given = one_of(input_ids, inputs_embeds)
        tokens = read_tokens(
            attention_mask,
            global_attention_mask,
            batch=given.shape[0],
            seqlen=given.shape[1],
            device=given.device,
            global_capacity=self.global_capacity,
        )
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states = self.layernorm_embedding(embedded + self.embed_positions(embedded.shape[:2]))
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        states = [hidden_states]
        for layer in self.layers:
            is_dropped = self.training and self.layerdrop > 0.0 and bool(torch.rand([]) < self.layerdrop)
            if not is_dropped:
                hidden_states = layer(hidden_states, attention_mask=tokens)[0]
            states.append(hidden_states)
        seen = tuple(states) if chosen(output_hidden_states, self.config.output_hidden_states) else None
        if not chosen(return_dict, self.config.return_dict):
            return (hidden_states,) if seen is None else (hidden_states, seen)
        return LEDEncoderBaseModelOutput(last_hidden_state=hidden_states, hidden_states=seen)


class LEDDecoderAttention(theirs.LEDDecoderAttention):
    """Self- and cross-attention of a decoder layer."""

    implementation: str | None = None

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: ModelMask | Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, None, Any]:
        """((batch, seqlen_q, hidden_size), None, past_key_values). attention_mask: as the mask interface made it."""
        refuse_attentions(output_attentions)
        query = self._heads(self.q_proj(hidden_states))
        key, value = self._keys(hidden_states, key_value_states, past_key_values)
        out, _ = interface.forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout,
            is_causal=False,  # without a mask there is a single query, or all is visible
            implementation=self.implementation,
        )
        return self.out_proj(out.flatten(2)), None, past_key_values

    def _keys(self, hidden_states: Tensor, encoded: Tensor | None, past: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, num_heads, seqlen_k, head_dim), by way of the cache if there is one."""
        is_cross, caches = encoded is not None, isinstance(past, EncoderDecoderCache)
        own = past
        if caches:
            own = past.cross_attention_cache if is_cross else past.self_attention_cache
            if is_cross and past.is_updated.get(self.layer_idx):
                return own.layers[self.layer_idx].keys, own.layers[self.layer_idx].values
        source = hidden_states if encoded is None else encoded
        key, value = self._heads(self.k_proj(source)), self._heads(self.v_proj(source))
        if own is not None:
            key, value = own.update(key, value, self.layer_idx)
            if is_cross and caches:
                past.is_updated[self.layer_idx] = True
        return key, value

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)


CLASSES = {kind.__name__: kind for kind in (LEDEncoderSelfAttention, LEDEncoder, LEDDecoderAttention)}
