"""Tiny multi-head models of every architecture that `to_gqa` knows, with biases and norms drawn at random too."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.models import tiny

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
LLAMA = {**tiny.LLAMA, **HEADS}
GEMMA = {**tiny.GEMMA, **HEADS, "layer_types": tiny.ALTERNATING}
PHI3 = {**tiny.PLAIN, **HEADS, "sliding_window": tiny.WINDOW}
FALCON = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "multi_query": False,
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}

# name -> configuration class, model class, options
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, "attention_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": tiny.WINDOW}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", LLAMA),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", LLAMA),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", PHI3),
    "phi3-half-rotary": ("Phi3Config", "Phi3ForCausalLM", {**PHI3, **HALF_ROTARY}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", tiny.GPT2),
    "gpt2-scaled-by-layer": ("GPT2Config", "GPT2LMHeadModel", {**tiny.GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**tiny.PLAIN, **HALF_ROTARY}),
    "falcon-parallel": ("FalconConfig", "FalconForCausalLM", {**FALCON, "parallel_attn": True}),
    "falcon-serial": ("FalconConfig", "FalconForCausalLM", {**FALCON, "parallel_attn": False}),
    "falcon-alibi": ("FalconConfig", "FalconForCausalLM", {**FALCON, "parallel_attn": False, "alibi": True}),
    "falcon-new": ("FalconConfig", "FalconForCausalLM", {**FALCON, "new_decoder_architecture": True}),
    "t5": ("T5Config", "T5ForConditionalGeneration", tiny.T5),
    "bart": ("BartConfig", "BartForConditionalGeneration", tiny.BART),
}
#: those whose G = 2 no class of transformers holds
CARRIED = ("gpt2", "gpt2-scaled-by-layer", "gpt_neox", "falcon-serial", "falcon-alibi", "t5", "bart")


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model with random weights, biases and gains, attention far from uniform, in evaluation mode."""
    torch.manual_seed(0)
    config_name, model_name, own = FAMILIES[name]
    config = getattr(transformers, config_name)(**{**own, **options})
    if name == "falcon-alibi":
        config._attn_implementation = "sdpa"  # transformers' eager Falcon adds the biases of ALiBi twice
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model: Any, seqlen: int = 11) -> Tensor:
    """(2, seqlen, vocab) of a model on fixed tokens."""
    given: dict[str, Any] = {"input_ids": tiny.tokens(2, seqlen)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = tiny.tokens(2, seqlen - 2, seed=2)
    return model(**given).logits


def equal_heads(model: Any, num_groups: int) -> Any:
    """The model with the key and value heads of each group made equal, in place."""
    from hasten.convert import heads

    state = model.state_dict()
    for site in heads.sites(model):
        read = heads.read(site, state)
        index = torch.arange(site.num_kv_heads) // (site.num_kv_heads // num_groups)
        index = index * (site.num_kv_heads // num_groups)
        same = heads.Heads(read.q, read.k[index], read.v[index], read.o)
        for tensor_name, tensor in heads.write(site, same, state, site.layout).items():
            state[tensor_name].copy_(tensor)
    return model
