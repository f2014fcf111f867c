"""hasten: the Transformers you already have, faster, to train and to run, without changing what they compute.

`attention` and the masks are here at once; what needs transformers is loaded when first used. Importing this
loads neither triton nor transformers, and asks no device anything.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hasten.masks import BlockSparse, Causal, Dense, Documents, Full, Global, Padding, Window
from hasten.ops.alibi import ALiBi
from hasten.ops.append import append_kv
from hasten.ops.attention import attention
from hasten.ops.decode import decode_attention
from hasten.ops.explain import explain
from hasten.ops.kv import ContiguousKV, PagedKV, RingKV, common_prefix
from hasten.ops.merge import merge

if TYPE_CHECKING:
    from hasten import convert
    from hasten.cache import PromptCache
    from hasten.engine import Engine, Sampling
    from hasten.models.accelerate import accelerate

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "BlockSparse",
    "Causal",
    "ContiguousKV",
    "Dense",
    "Documents",
    "Engine",
    "Full",
    "Global",
    "Padding",
    "PagedKV",
    "PromptCache",
    "RingKV",
    "Sampling",
    "Window",
    "accelerate",
    "append_kv",
    "attention",
    "common_prefix",
    "convert",
    "decode_attention",
    "explain",
    "merge",
]

_LAZY = {
    "Engine": "hasten.engine",
    "PromptCache": "hasten.cache",
    "Sampling": "hasten.engine",
    "accelerate": "hasten.models",
}
_LAZY_MODULES = ("convert",)


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"hasten.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hasten' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_LAZY_MODULES])
