"""Model classes for results that transformers has no class for; each file also travels inside the checkpoint.

So a file here imports torch, transformers and its neighbours, never hasten: `from_pretrained(folder,
trust_remote_code=True)` runs it where hasten is not installed. `register()` makes hasten's own loading find them.
"""

from __future__ import annotations

import importlib
from typing import Any

#: model_type of the base -> the file here
FILES = {
    "t5": "t5_gqa",
    "bart": "bart_gqa",
    "gpt2": "gpt2_gqa",
    "gpt_neox": "gpt_neox_gqa",
    "falcon": "falcon_gqa",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), "layers_gqa"),
}


def load(base_model_type: str) -> tuple[Any, Any, str]:
    """(configuration class, model class, name of the Auto class that loads it) for a base architecture."""
    module = importlib.import_module(f"hasten.convert.carried.{FILES[base_model_type]}")
    return module.CLASSES[base_model_type]


def register() -> None:
    """Tell transformers' Auto classes of this process about every class here, so that no code of a checkpoint runs."""
    import transformers  # only registration needs it here

    for name in FILES:
        config, model, auto = load(name)
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        getattr(transformers, auto).register(config, model, exist_ok=True)
