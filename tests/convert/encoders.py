"""Tiny encoders and encoder-decoders with random weights, to be converted."""

from __future__ import annotations

import torch
import transformers

VOCAB = 67
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
DISTILBERT = {
    "vocab_size": VOCAB,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 64,
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
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
OPTIONS = {"Electra": {**BERT, "embedding_size": 32}, "DistilBert": DISTILBERT, "Bart": BART}


def build(family: str, task: str = "Model", **options):
    """A model of transformers in evaluation mode, e.g. build("Bert", "ForMaskedLM")."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**OPTIONS.get(family, BERT), **options})
    model = getattr(transformers, f"{family}{task}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embeddings.position" in name or parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    return model


def ids(batch: int, seqlen: int):
    """int64 (batch, seqlen) without special tokens."""
    return torch.randint(5, VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(1))
