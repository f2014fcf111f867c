"""Sequences over several kinds of layers: they grow together or not at all, and need what was said they would."""

from __future__ import annotations

import random

import pytest

from hasten.cache.ledger import Ledger
from hasten.cache.pages import OutOfPages
from hasten.errors import ArgumentError


def ledger(*num_pages, windows=(None, 3), page_size=2):
    return Ledger(windows, num_pages, page_size)


def test_all_kinds_grow_or_none_does():
    pages = ledger(8, 2)
    one = pages.open()
    with pytest.raises(OutOfPages, match="no room for 5 more tokens after 0"):
        one.grow(5)
    assert pages.num_free == (8, 2) and one.num_tokens == 0
    one.grow(4)
    assert pages.num_free == (6, 0) and one.num_pages == (2, 2)
    one.slide()
    assert not one.can_grow(1) and pages.num_free == (6, 0)  # token 4 sees 1, 2, 3: both pages
    pages.check_integrity([one])
    one.free()
    pages.check_integrity([])


def test_a_cut_that_one_kind_cannot_make_changes_no_kind():
    pages = ledger(8, 8)
    one = pages.open()
    one.grow(9)
    one.slide()
    with pytest.raises(ArgumentError, match="window begins"):
        one.truncate(5)
    assert one.num_tokens == 9 and [table.num_tokens for table in one.tables] == [9, 9]
    one.truncate(0)
    pages.check_integrity([])


def test_a_fork_copies_in_every_kind():
    pages = ledger(8, 8)
    one = pages.open()
    one.grow(3)
    two = one.fork()
    copies = two.grow(1)
    assert [len(each) for each in copies] == [1, 1]
    pages.check_integrity([one, two])


def test_pages_of_others_count():
    pages = ledger(8, 8)
    one = pages.open()
    one.grow(4)
    pages.pools[0].share(one.tables[0].pages)
    pages.check_integrity([one], [one.tables[0].pages])
    with pytest.raises(AssertionError, match="counted 2 times, held 1 times"):
        pages.check_integrity([one])


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
@pytest.mark.parametrize("window", [None, 0, 1, 5, 40])
def test_a_sequence_never_holds_more_than_was_said(page_size, window):
    for seed in range(60):
        draw = random.Random(seed)
        chunk, length = draw.randint(1, 9), draw.randint(1, 60)
        pages = Ledger((window,), (100,), page_size)
        (most,) = pages.pages_of(length, chunk)
        exact = Ledger((window,), (most,), page_size)
        assert exact.fits(length, chunk) and exact.has_room(length, chunk) and not exact.has_room(length, chunk, 1)
        one = exact.open()
        while one.num_tokens < length:
            one.slide()
            one.grow(min(draw.randint(1, chunk), length - one.num_tokens))
        one.free()
        exact.check_integrity([])
