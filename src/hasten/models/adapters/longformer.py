"""Longformer of transformers: the same parameters and outputs, without padding, matrices of masks or waits.

Its model pads to a multiple of the window, makes a mask of seqlen x seqlen and reads values in every layer; these
three classes do none of that. Heads, embeddings and feed-forward layers remain transformers' own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.longformer import modeling_longformer as theirs
from transformers.models.longformer.modeling_longformer import (
    LongformerBaseModelOutput,
    LongformerBaseModelOutputWithPooling,
)

from hasten.errors import ArgumentError
from hasten.models.longformer import Pattern, attend
from hasten.models.tokens import Tokens, from_additive, read_tokens


class ServedSelfAttention:
    """What the self-attention layers of Longformer and LED have in common: all of it."""

    implementation: str | None = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tokens | Tensor | None = None, *others: Any, **options: Any
    ) -> tuple[Tensor]:
        """((batch, seqlen, hidden_size),). attention_mask: tokens, or as transformers has it, (batch, seqlen)."""
        layer: Any = self
        if options.get("output_attentions") or (len(others) > 3 and others[3]):
            refuse_attentions(True)
        if isinstance(attention_mask, Tensor):
            attention_mask = from_additive(attention_mask)
        pattern = Pattern(2 * layer.one_sided_attn_window_size)
        dropout_p = layer.dropout if layer.training else 0.0
        return (attend(layer, hidden_states, attention_mask or Tokens(), pattern, dropout_p, self.implementation),)


def refuse_attentions(is_asked: bool) -> None:
    """Raise if attention weights are asked for."""
    if is_asked:
        hint = "load the model anew, without hasten.accelerate, to see the weights"
        raise ArgumentError("output_attentions", "False: no attention weights exist to be returned", True, hint)


class LongformerSelfAttention(ServedSelfAttention, theirs.LongformerSelfAttention):
    """The attention of a layer."""


class LongformerEncoder(theirs.LongformerEncoder):
    """The layers, one after the other."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tokens | Tensor | None = None,
        padding_len: int = 0,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """Hidden states (batch, seqlen, hidden_size) through all layers; outputs as in transformers."""
        refuse_attentions(output_attentions)
        tokens = from_additive(attention_mask) if isinstance(attention_mask, Tensor) else attention_mask
        states = [hidden_states]
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask=tokens)[0]
            states.append(hidden_states)
        seen = tuple(state[:, : state.shape[1] - padding_len] for state in states) if output_hidden_states else None
        last = hidden_states[:, : hidden_states.shape[1] - padding_len]
        if not return_dict:
            return (last,) if seen is None else (last, seen)
        return LongformerBaseModelOutput(last_hidden_state=last, hidden_states=seen)


class LongformerModel(theirs.LongformerModel):
    """Embeddings, layers, pooler."""

    implementation: str | None = None
    global_capacity: int | None = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """As in transformers, at the length given: input_ids (batch, seqlen), masks (batch, seqlen)."""
        refuse_attentions(bool(self.config.output_attentions if output_attentions is None else output_attentions))
        given = one_of(input_ids, inputs_embeds)
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        tokens = read_tokens(
            attention_mask,
            global_attention_mask,
            batch=given.shape[0],
            seqlen=given.shape[1],
            device=given.device,
            global_capacity=self.global_capacity,
        )
        hidden_states = self.embeddings(
            input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids, inputs_embeds=inputs_embeds
        )
        encoded = self.encoder(
            hidden_states,
            attention_mask=tokens,
            output_hidden_states=chosen(output_hidden_states, self.config.output_hidden_states),
            return_dict=True,
        )
        pooled = None if self.pooler is None else self.pooler(encoded.last_hidden_state)
        if not chosen(return_dict, self.config.return_dict):
            return (encoded.last_hidden_state, pooled, *encoded.to_tuple()[1:])
        return LongformerBaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state, pooler_output=pooled, hidden_states=encoded.hidden_states
        )


def one_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The one of the two that is given; raises ArgumentError for none or both."""
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ArgumentError("input_ids", "either input_ids or inputs_embeds", got, "give one of them")
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    return given


def chosen(asked: bool | None, configured: bool) -> bool:
    """What a call asks for, or else the configuration."""
    return configured if asked is None else asked


CLASSES = {kind.__name__: kind for kind in (LongformerSelfAttention, LongformerEncoder, LongformerModel)}
