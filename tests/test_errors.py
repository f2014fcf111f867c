"""Errors are one line, keep their fields, are the built-in kind a caller expects, and survive a process boundary."""

from __future__ import annotations

import pickle

import pytest

from hasten import errors

EXAMPLES = [
    (
        errors.ArgumentError("q", "4 dimensions", 3, "add a batch"),
        ValueError,
        "q: expected 4 dimensions, got 3; add a batch",
    ),
    (
        errors.ArgumentTypeError("q", "a Tensor", "list", "wrap it"),
        TypeError,
        "q: expected a Tensor, got list; wrap it",
    ),
    (
        errors.UnsupportedError("portable", "head_dim 512 is above 256", "leave implementation=None"),
        NotImplementedError,
        "implementation 'portable' cannot do this: head_dim 512 is above 256; leave implementation=None",
    ),
    (
        errors.CheckpointError("a/b", "no config.json", "name a folder"),
        errors.HastenError,
        "a/b: no config.json; name a folder",
    ),
    (
        errors.MissingExtraError("bench", "a plot"),
        ImportError,
        "a plot needs the extra 'bench'; run: pip install 'hasten[bench]'",
    ),
]


@pytest.mark.parametrize(("error", "kind", "message"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_message_kind_and_pickle(error, kind, message):
    assert isinstance(error, errors.HastenError)
    assert isinstance(error, kind)
    assert str(error) == message
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == message


def test_a_value_with_line_breaks_still_makes_one_line():
    error = errors.ArgumentError("mask", "a Mask", "tensor([[1],\n        [0]])", "see hasten.Dense")
    assert str(error) == "mask: expected a Mask, got tensor([[1], [0]]); see hasten.Dense"
