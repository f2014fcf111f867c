"""Folders as `save_pretrained` writes them, tiny and random, for tests that load them or break them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.engine.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def llama(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Write a Llama and its tokenizer; returns the model."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **options})).to(dtype).eval()
    save(model, folder)
    return model


def save(model: Any, folder: Path, **options: Any) -> None:
    """Write a model and the tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    TOKENIZER.save_pretrained(folder)
