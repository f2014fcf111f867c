"""Drafts are what followed the last few tokens where they last occurred."""

from __future__ import annotations

import random

import pytest

from hasten.engine.lookup import SIZES, Lookup, before_first, num_confirmed


def by_search(tokens, count):
    """The same by looking at every place."""
    for size in SIZES:
        places = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]
        if places and len(tokens) >= size:
            whole = list(tokens)
            for index in range(count):
                whole.append(whole[places[-1] + index])
            return whole[len(tokens) :]
    return []


def test_the_last_place_counts_and_the_longest_match():
    assert Lookup().draft([1, 2, 3, 9, 1, 2, 3, 8, 7, 1, 2, 3], 3) == [8, 7, 1]
    assert Lookup().draft([5, 2, 3, 4, 9, 2, 3, 6, 5, 2, 3], 1) == [4]


def test_a_repetition_goes_on():
    assert Lookup().draft([7, 1, 2, 1, 2, 1], 5) == [2, 1, 2, 1, 2]
    assert Lookup().draft([4, 4, 4], 3) == [4, 4, 4]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3], [1, 1]])
def test_nothing_is_known_of_what_did_not_occur(tokens):
    assert Lookup().draft(tokens, 4) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_growing_text_is_read_as_a_whole_one(seed):
    draw = random.Random(seed)
    tokens, lookup = [draw.randrange(3) for _ in range(draw.randrange(10))], Lookup()
    for _ in range(60):
        assert lookup.draft(tokens, 4) == by_search(tokens, 4) == Lookup().draft(tokens, 4)
        tokens += [draw.randrange(3) for _ in range(draw.randint(1, 4))]


def test_what_is_confirmed_ends_at_the_first_other_token():
    assert [num_confirmed([1, 2, 3], chosen) for chosen in ([1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4])] == [3, 1, 0]
    assert num_confirmed([], [5]) == 0


def test_a_draft_ends_before_what_ends_the_text():
    assert before_first([1, 2, 3, 2], {2, 3}) == [1] and before_first([1, 2], {9}) == [1, 2]
