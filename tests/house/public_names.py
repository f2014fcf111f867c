"""The public names of hasten: the one table to edit when a name is added or, with a note in CHANGELOG.md, removed."""

from __future__ import annotations

MASKS = ("Full", "Causal", "Window", "Global", "BlockSparse", "Documents", "Padding", "Dense")
BIASES = ("ALiBi",)
TENSOR_FUNCTIONS = ("attention", "merge")  # each states its shapes
REPORTS = ("explain",)  # takes what attention takes and says so
MODELS = ("accelerate",)

PUBLIC_NAMES = {*MASKS, *BIASES, *TENSOR_FUNCTIONS, *REPORTS, *MODELS}
