"""Llama and its kin with another number of key/value heads in each layer, which their classes cannot be told.

Travels inside a checkpoint written by hasten; loads with `trust_remote_code=True` where hasten is not installed.
The attention layers keep their own forward: it reads the number of groups from the layer.
"""

from __future__ import annotations

from typing import Any

import transformers

from .grouped import GroupedConfig, narrow, no_static_shape

_SEPARATE = ("k_proj", "v_proj")
_BASES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SEPARATE),
    "mistral": ("MistralConfig", "MistralForCausalLM", _SEPARATE),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _SEPARATE),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _SEPARATE),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _SEPARATE),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _SEPARATE),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", _SEPARATE),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", ("qkv_proj",)),
}


def _classes(model_type: str, config_name: str, model_name: str, names: tuple[str, ...]) -> tuple[Any, Any, str]:
    """(configuration, model, Auto class) of one architecture, made from transformers' own two."""
    base: Any = getattr(transformers, model_name)
    parents = (GroupedConfig, getattr(transformers, config_name))
    body = {"__module__": __name__, "model_type": f"{model_type}_gqa", "_auto_class": "AutoConfig"}
    config = type(config_name.replace("Config", "GQAConfig"), parents, body)

    def __init__(self: Any, config: Any) -> None:
        base.__init__(self, config)
        narrow(self, config, None, names)

    methods = {
        "__module__": __name__,
        "__init__": __init__,
        "config_class": config,
        "_auto_class": "AutoModelForCausalLM",
        "_get_static_cache_init_shape": no_static_shape,
    }
    return config, type(model_name.replace("For", "GQAFor"), (base,), methods), "AutoModelForCausalLM"


CLASSES = {name: _classes(name, *names) for name, names in _BASES.items()}
globals().update({kind.__name__: kind for pair in CLASSES.values() for kind in pair[:2]})  # auto_map finds by name
