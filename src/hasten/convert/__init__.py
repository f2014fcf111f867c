"""How one architecture becomes another: checkpoints in, checkpoints that plain transformers loads out.

Each converter has its file and is loaded when first used: `hasten.convert.to_longformer(model, ...)`.
"""

from __future__ import annotations

import importlib
from typing import Any

from hasten.convert.report import Report

#: converter -> the file here that holds it
_HOMES: dict[str, str] = {"to_gqa": "gqa", "to_mha": "gqa", "to_longformer": "longformer", "to_led": "led"}

__all__ = ["Report", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"hasten.convert.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hasten.convert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
