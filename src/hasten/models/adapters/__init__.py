"""Classes that stand in for those of transformers which do not call its attention interface.

One file an architecture, each with `CLASSES`: the name of a class of transformers to a subclass of it with
another `forward`. A module is served by changing its class, so parameters, hooks, adapters of PEFT and names
stay as they are, and what `save_pretrained` writes is what plain transformers loads.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

#: module of transformers -> the file here that serves its classes; loaded when a model has one of them
HOMES = {
    "transformers.models.longformer.modeling_longformer": "hasten.models.adapters.longformer",
    "transformers.models.led.modeling_led": "hasten.models.adapters.led",
}


def has_adapter(kind: type) -> bool:
    """True if a class belongs to an architecture that is served here, as transformers' own or already as ours."""
    return kind.__module__ in HOMES or kind.__module__ in HOMES.values()


def is_served(kind: type) -> bool:
    """True if modules of this class are served here, or will be after `serve`."""
    return kind.__module__ in HOMES.values() or _class_for(kind) is not None


def serve(model: nn.Module, implementation: str | None, global_capacity: int | None) -> None:
    """Have every module of a model that has a class here be one of that class, in place."""
    module: Any
    for module in model.modules():
        kind = _class_for(type(module))
        if kind is not None:
            module.__class__ = kind
        if is_served(type(module)):
            module.implementation, module.global_capacity = implementation, global_capacity


def _class_for(kind: type) -> type | None:
    home = HOMES.get(kind.__module__)
    if home is None:
        return None
    found: type | None = importlib.import_module(home).CLASSES.get(kind.__name__)
    return found
