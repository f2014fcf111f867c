"""A mask as a string and tensors, the form in which it crosses a custom operator, and back.

`And(Window(256, 256), Padding(#0;, 'left'))` with one tensor: `#i;` is the i-th tensor.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from hasten.masks.algebra import And, Mask, Or
from hasten.masks.bands import Causal, Full, Window
from hasten.masks.data import BlockSparse, Dense, Documents, Global, Padding

_KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (And, Or, Full, Causal, Window, Global, BlockSparse, Documents, Padding, Dense)
}


def encode(mask: Mask) -> tuple[str, list[Tensor]]:
    """The mask as text and the tensors it refers to."""
    return mask.parts()


def decode(text: str, tensors: Sequence[Tensor]) -> Mask:
    """The mask that `encode` took apart."""
    return _build(_parse(text), tensors) if tensors else _without_tensors(text)


@lru_cache(maxsize=1024)
def _without_tensors(text: str) -> Any:
    return _build(_parse(text), ())


@lru_cache(maxsize=1024)
def _parse(text: str) -> ast.Call:
    tree = ast.parse(text.replace("#", "_").replace(";", ""), mode="eval").body
    assert isinstance(tree, ast.Call), text
    return tree


def _build(node: ast.expr, tensors: Sequence[Tensor]) -> Any:
    if isinstance(node, ast.Name):
        return tensors[int(node.id[1:])]
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    assert isinstance(node.func, ast.Name)
    kind = _KINDS[node.func.id]
    arguments = [_build(argument, tensors) for argument in node.args]
    named = {word.arg: _build(word.value, tensors) for word in node.keywords if word.arg}
    return kind(tuple(arguments)) if kind in (And, Or) else kind(*arguments, **named)
