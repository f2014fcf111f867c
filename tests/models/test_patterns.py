"""Mask functions of transformers are read for what they are; those made of anything else are not."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils as made

from hasten.masks import Causal, Documents, Full, Window
from hasten.models import patterns
from hasten.models.patterns import Pattern

IDS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]])
STARTS = [[False, True, False, False], [True, False, False, True]]


@pytest.mark.parametrize(
    ("mask_function", "left", "right"),
    [
        (made.causal_mask_function, None, 0),
        (made.bidirectional_mask_function, None, None),
        (made.sliding_window_causal_mask_function(4), 3, 0),
        (made.sliding_window_bidirectional_mask_function(4), 4, 4),
        (made.and_masks(made.sliding_window_causal_mask_function(4), made.sliding_window_overlay(3)), 2, 0),
    ],
    ids=["causal", "bidirectional", "sliding", "sliding both", "nested"],
)
def test_bands_are_read(mask_function, left, right):
    assert patterns.read(mask_function) == Pattern(left, right)


def test_packed_sequences_are_read():
    pattern = patterns.read(made.and_masks(made.causal_mask_function, made.packed_sequence_mask_function(IDS)))
    assert (pattern.left, pattern.right, pattern.starts.tolist()) == (None, 0, STARTS)


def test_positions_counted_within_sequences_are_read_only_where_the_sequences_are_separate():
    remap = getattr(made, "remap_positions_for_packed_sequence", None)
    if remap is None:
        pytest.skip("this version of transformers does not count positions within sequences")
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 0, 1, 2, 0]])
    remapped = remap(made.sliding_window_causal_mask_function(2), positions)
    pattern = patterns.read(made.and_masks(made.packed_sequence_mask_function(IDS), remapped))
    assert (pattern.left, pattern.right, pattern.starts.tolist()) == (1, 0, STARTS)
    assert patterns.read(remapped) is None
    assert patterns.read(made.and_masks(remapped, made.causal_mask_function)) is None


@pytest.mark.parametrize(
    "mask_function",
    [
        made.or_masks(made.causal_mask_function, made.bidirectional_mask_function),
        made.and_masks(made.causal_mask_function, lambda b, h, q, k: q >= k),
        made.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64)),
        made.padding_mask_function(torch.ones(1, 4, dtype=torch.bool)),
        lambda b, h, q, k: q >= k,
    ],
    ids=["or", "custom inside", "chunked", "padding", "custom"],
)
def test_what_is_not_known_is_not_read(mask_function):
    assert patterns.read(mask_function) is None


@pytest.mark.parametrize(
    ("mask_function", "local_size", "is_bidirectional", "expected"),
    [
        (made.causal_mask_function, None, False, Pattern(None, 0)),
        (made.bidirectional_mask_function, None, True, Pattern()),
        (made.sliding_window_causal_mask_function(4), 4, False, Pattern(3, 0)),
        (made.sliding_window_bidirectional_mask_function(4), 4, True, Pattern(4, 4)),
        (made.and_masks(made.bidirectional_mask_function, made.causal_mask_function), None, True, None),
        (made.or_masks(made.causal_mask_function, made.bidirectional_mask_function), None, False, None),
    ],
    ids=["causal", "bidirectional", "sliding", "sliding both", "no size", "or"],
)
def test_what_is_concluded_while_tracing(mask_function, local_size, is_bidirectional, expected):
    assert patterns.traced(mask_function, local_size, is_bidirectional, None) == expected


@pytest.mark.parametrize("window", [None, 1, 3])
def test_where_sequences_begin_is_asked_of_the_function_while_tracing(window):
    band = made.causal_mask_function if window is None else made.sliding_window_causal_mask_function(window)
    packed = made.and_masks(band, made.packed_sequence_mask_function(IDS))
    pattern = patterns.traced(packed, window, False, torch.empty(2, 5))
    named = pattern.band(5) & patterns.documents(pattern.starts, False)
    expected = made.sdpa_mask(2, 5, 5, mask_function=packed, allow_is_causal_skip=False)
    assert torch.equal(named.keep(5, batch=2), expected)


def test_a_window_that_reaches_all_keys_is_none():
    assert Pattern(4, 0).band(6) == Window(4, 0)
    assert Pattern(4, 0).band(5) == Causal()
    assert Pattern(None, None).band(5) == Full()
    assert Pattern(4, 4).band(9) == Window(4, 4)


@pytest.mark.parametrize("can_read", [True, False])
def test_documents_of_rows_that_differ(can_read):
    mask = patterns.documents(torch.tensor(STARTS), can_read)
    assert torch.equal(mask.keep(5, batch=2), Documents(torch.tensor([[0, 2, 5, 5], [0, 1, 4, 5]])).keep(5, batch=2))


def test_one_sequence_a_row_is_no_documents():
    assert patterns.documents(torch.zeros(2, 4, dtype=torch.bool), True) is None
