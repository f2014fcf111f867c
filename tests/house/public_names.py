"""The public names of hasten: the one table to edit when a name is added or, with a note in CHANGELOG.md, removed."""

from __future__ import annotations

MASKS = ("Full", "Causal", "Window", "Global", "BlockSparse", "Documents", "Padding", "Dense")
BIASES = ("ALiBi",)
CACHES = ("PagedKV", "ContiguousKV", "RingKV", "common_prefix")  # views of a KV cache
TENSOR_FUNCTIONS = ("attention", "merge", "decode_attention", "append_kv")  # each states its shapes
REPORTS = ("explain",)  # takes what attention takes and says so
MODELS = ("accelerate",)
GENERATION = ("Engine", "PromptCache", "Sampling")
CONVERSION = ("convert",)  # a module, loaded when first used

PUBLIC_NAMES = {*MASKS, *BIASES, *CACHES, *TENSOR_FUNCTIONS, *REPORTS, *MODELS, *GENERATION, *CONVERSION}
