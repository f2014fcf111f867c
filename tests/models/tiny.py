"""Tiny random models of every architecture that the tests hold against `eager`, and inputs for them.

Weights are drawn wide enough that attention is far from uniform: a wrong mask changes logits by a lot.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

import hasten.models

VOCAB = 67
WINDOW = 4


@dataclass(frozen=True)
class Architecture:
    """One architecture: the names of its classes in transformers and what its configuration needs beyond `SIZES`."""

    name: str
    kind: str  # decoder, encoder, seq2seq
    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    softmax_in_own_dtype: bool = (
        False  # eager computes the softmax of most architectures in float32 whatever the model is
    )
    has_static_cache: bool = True

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """An eager model with random weights, in evaluation mode."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.options, **options}, attn_implementation="eager")
        model = getattr(transformers, self.model)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
        return model.to(dtype).eval()

    def pair(self, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
        """(eager model, accelerated copy of it)."""
        eager = self.build(dtype, **options)
        return eager, hasten.models.accelerate(copy.deepcopy(eager))


LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "head_dim")}
GEMMA = {**LLAMA, "num_hidden_layers": 3, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
OSS = {**LLAMA, "num_hidden_layers": 3, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES = (
    Architecture("llama", "decoder", "LlamaConfig", "LlamaForCausalLM", LLAMA),
    Architecture("mistral", "decoder", "MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": WINDOW}),
    Architecture("qwen2", "decoder", "Qwen2Config", "Qwen2ForCausalLM", LLAMA),
    Architecture("qwen3", "decoder", "Qwen3Config", "Qwen3ForCausalLM", LLAMA),
    Architecture(
        "gemma2",
        "decoder",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**GEMMA, "layer_types": ALTERNATING, "attn_logit_softcapping": 2.0},
    ),
    Architecture("gemma3", "decoder", "Gemma3TextConfig", "Gemma3ForCausalLM", {**GEMMA, "layer_types": ALTERNATING}),
    Architecture("gpt_oss", "decoder", "GptOssConfig", "GptOssForCausalLM", {**OSS, "layer_types": ALTERNATING}),
    Architecture("gpt2", "decoder", "GPT2Config", "GPT2LMHeadModel", GPT2, softmax_in_own_dtype=True),
    Architecture("gpt_neox", "decoder", "GPTNeoXConfig", "GPTNeoXForCausalLM", PLAIN),
    Architecture("phi", "decoder", "PhiConfig", "PhiForCausalLM", {**PLAIN, "num_key_value_heads": 2}),
    Architecture(
        "phi3",
        "decoder",
        "Phi3Config",
        "Phi3ForCausalLM",
        {**PLAIN, "num_key_value_heads": 2, "sliding_window": WINDOW},
    ),
    Architecture("bert", "encoder", "BertConfig", "BertForMaskedLM", PLAIN, softmax_in_own_dtype=True),
    Architecture("roberta", "encoder", "RobertaConfig", "RobertaForMaskedLM", PLAIN, softmax_in_own_dtype=True),
    Architecture("t5", "seq2seq", "T5Config", "T5ForConditionalGeneration", T5, softmax_in_own_dtype=True),
    Architecture("bart", "seq2seq", "BartConfig", "BartForConditionalGeneration", BART, softmax_in_own_dtype=True),
)
DECODERS = tuple(one for one in ARCHITECTURES if one.kind == "decoder")
GENERATORS = tuple(one for one in ARCHITECTURES if one.kind != "encoder")


def tokens(batch: int, seqlen: int, seed: int = 1) -> Tensor:
    """int64 (batch, seqlen) without special tokens."""
    return torch.randint(3, VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def padding(batch: int, seqlen: int, side: str) -> Tensor | None:
    """int64 (batch, seqlen): 1 for real tokens; `side` is none, ones, right, left, mixed or holes."""
    mask = torch.ones(batch, seqlen, dtype=torch.int64)
    if side == "none":
        return None
    if side in ("right", "mixed"):
        mask[0, seqlen - 3 :] = 0
    if side in ("left", "mixed"):
        mask[-1, :4] = 0
    if side == "holes":
        mask[0, 2:4] = 0
        mask[-1, 5] = 0
    return mask


def inputs(architecture: Architecture, batch: int = 2, seqlen: int = 11, side: str = "none") -> dict[str, Tensor]:
    """Keyword arguments of the model's forward."""
    given = {"input_ids": tokens(batch, seqlen)}
    mask = padding(batch, seqlen, side)
    if mask is not None:
        given["attention_mask"] = mask
    if architecture.kind == "seq2seq":
        given["decoder_input_ids"] = tokens(batch, seqlen - 2, seed=2)
        if side in ("left", "right"):
            decoder_mask = padding(batch, seqlen - 2, side)
            assert decoder_mask is not None
            given["decoder_attention_mask"] = decoder_mask
    return given


def real_positions(architecture: Architecture, given: dict[str, Tensor]) -> Tensor:
    """bool (batch, seqlen, 1): where logits mean something."""
    name = "decoder_attention_mask" if architecture.kind == "seq2seq" else "attention_mask"
    ids = given["decoder_input_ids" if architecture.kind == "seq2seq" else "input_ids"]
    return given.get(name, torch.ones_like(ids)).bool()[..., None]


def logits_and_gradients(
    model: Any, given: dict[str, Tensor], real: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits at real positions (0 elsewhere), and the gradient of a fixed function of them for every parameter."""
    model.zero_grad()
    logits = model(**given, **options).logits
    logits = torch.where(real, logits, 0.0)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
    (logits * weights).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value of `other`."""
    return ((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30)).item()
