"""Masks of users become tokens: what is equal for all rows costs nothing, what is wrong is named."""

from __future__ import annotations

import pytest
import torch

from hasten.errors import ArgumentError, ArgumentTypeError
from hasten.masks import Dense, Global, Padding
from hasten.models.tokens import from_additive, read_tokens
from tests.models.longformers import MASKS, codes, user_masks

CPU = torch.device("cpu")
SIZES = {"batch": 3, "seqlen": 12, "device": CPU}


def read(attention_mask=None, global_tokens=None, **options):
    return read_tokens(attention_mask, global_tokens, **SIZES, **options)


def seen(tokens):
    """(is_real, is_global), bool (3, 12) each, from what the layers are told."""
    everything = torch.ones(3, 12, dtype=torch.bool)
    real = everything if tokens.keys is None else tokens.keys.keep(12, batch=3)[:, 0, 0]
    if tokens.columns is None:
        return real, ~everything
    return real, tokens.columns.keep(12, batch=3)[:, 0, 0]


@pytest.mark.parametrize("name", MASKS)
def test_both_forms_of_a_mask_say_the_same(name):
    made = codes(name, 3, 12)
    additive = torch.tensor([-1e4, 0.0, 1e4])[made]
    for tokens in (read(made), read(made.float()), read(*user_masks(name, 3, 12)), from_additive(additive)):
        real, is_global = seen(tokens)
        assert torch.equal(real, made > 0)
        assert torch.equal(is_global, made == 2)
        rows, places = (made == 2).nonzero(as_tuple=True)
        if tokens.positions is not None:
            assert tokens.positions[tokens.holds].tolist() == places.tolist()
            assert tokens.holds.sum(1).tolist() == [rows.tolist().count(row) for row in range(3)]


def test_what_is_plain_is_told_plainly():
    assert read().keys is read(torch.ones(3, 12)).keys is None
    assert read(torch.ones(3, 12)).columns is None
    right = read(codes("right", 3, 12))
    assert right.keys == Padding([9, 12, 12])
    assert right.columns == Global((0,), queries=False)
    assert isinstance(read(codes("holes", 3, 12)).keys, Dense)
    assert read(codes("left", 3, 12)).keys == Padding([12, 12, 8], "left")


def test_positions_are_a_third_form():
    assert torch.equal(seen(read(None, (0, 5)))[1].nonzero()[:, 1], torch.tensor([0, 5] * 3))
    by_row = read(None, [[0], [], [3, 11]])
    assert by_row.holds.sum(1).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"attention_mask": torch.full((3, 12), 3)}, "attention_mask: expected values 0, 1 and 2, got 3"),
        ({"attention_mask": torch.full((3, 12), -1e4)}, "attention_mask: expected values 0, 1 and 2, got -10000.0"),
        ({"attention_mask": torch.full((3, 12), 0.5)}, "got 0.5"),
        (
            {"attention_mask": torch.full((3, 12), 2), "global_tokens": torch.ones(3, 12)},
            "attention_mask: expected values 0 and 1, got 2; .*the other mask says global",
        ),
        ({"global_tokens": torch.full((3, 12), 2)}, "global_attention_mask: expected values 0 and 1, got 2"),
        ({"attention_mask": torch.ones(3, 11)}, r"attention_mask: expected shape \(3, 12\), got shape \(3, 11\)"),
        ({"attention_mask": torch.ones(3, 1, 12, 12)}, "attention_mask: expected shape"),
        ({"global_tokens": (0, 12)}, "global_tokens: expected positions from 0 to 11, got 12 in row 0"),
        ({"global_tokens": [[0], [-1], []]}, "global_tokens: .* got -1 in row 1"),
        ({"global_tokens": [[0], [1]]}, "global_tokens: expected 3 lists"),
        ({"global_tokens": (0, 1), "global_capacity": 1}, "global_capacity: expected at least 2, got 1"),
        ({"global_capacity": -1}, "global_capacity: expected a number of tokens >= 0"),
    ],
    ids=range(12),
)
def test_bad_masks_are_named(given, words):
    with pytest.raises(ArgumentError, match=words) as caught:
        read(given.pop("attention_mask", None), given.pop("global_tokens", None), **given)
    assert "\n" not in str(caught.value)


def test_a_list_is_no_mask():
    with pytest.raises(ArgumentTypeError, match="attention_mask"):
        read([1] * 12)


def test_values_that_came_unseen_are_named_when_they_are_read(monkeypatch):
    monkeypatch.setattr("hasten.models.tokens._expect_values", lambda *_: None)  # as for masks on a GPU
    with pytest.raises(ArgumentError, match="attention_mask: expected values 0, 1 and 2, got values from 1 to 3"):
        read(torch.tensor([[1, 3] + [1] * 10] * 3))
