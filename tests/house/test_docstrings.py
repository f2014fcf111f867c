"""What is public says what it does; what takes tensors says their shapes."""

from __future__ import annotations

import inspect
import re

import pytest

import hasten
from tests.house import rules
from tests.house.public_names import TENSOR_FUNCTIONS

# at least two named dimensions in parentheses: (batch, seqlen_q, num_heads, head_dim)
SHAPE = re.compile(r"\(\s*(batch|total\w*|num_heads|num_kv_heads|seqlen_\w+)\s*,\s*\w+")


def has_shapes(docstring: str | None) -> bool:
    return docstring is not None and SHAPE.search(docstring) is not None


def test_every_public_name_has_a_docstring():
    wrong = [line for module, source in rules.modules().items() for line in rules.docstring_violations(module, source)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", TENSOR_FUNCTIONS)
def test_every_public_tensor_function_names_its_shapes(name):
    assert has_shapes(inspect.getdoc(getattr(hasten, name))), f"hasten.{name}: the docstring names no shape"


def test_a_missing_docstring_is_refused():
    assert len(rules.docstring_violations("m", "x = 1\n")) == 1
    assert len(rules.docstring_violations("m", '"""M."""\ndef f(): ...\nclass C: ...\ndef _g(): ...\n')) == 2


def test_all_decides_what_is_public():
    source = '"""M."""\n__all__ = ["f"]\ndef f(): ...\ndef g(): ...\n'
    assert rules.docstring_violations("m", source) == ["m:3: f is public and has no docstring"]


def test_a_computed_all_hides_nothing():
    source = '"""M."""\n__all__ = [*NAMES]\ndef f(): ...\ndef g(): ...\n'
    assert len(rules.docstring_violations("m", source)) == 2


def test_a_docstring_without_shapes_is_refused():
    assert has_shapes("q: (batch, seqlen_q, num_heads, head_dim)")
    assert not has_shapes("q: the queries (see the paper)")
    assert not has_shapes(None)
