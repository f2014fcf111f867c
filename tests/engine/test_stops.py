"""Stop strings: found across pieces, trimmed, and not even their beginning is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine.stops import StopStrings


def run(strings, pieces):
    """(pieces shown, what was held at the end, the string found)"""
    stops = StopStrings(strings)
    shown = [stops.push(piece) for piece in pieces]
    return shown, stops.flush(), stops.found


@pytest.mark.parametrize(
    ("strings", "pieces", "shown", "held", "found"),
    [
        (["END"], ["some E", "N", "D more"], ["some ", "", ""], "", "END"),
        (["END"], ["some E", "N", "X"], ["some ", "", "ENX"], "", None),
        (["END"], ["some E", "N"], ["some ", ""], "EN", None),
        (["END"], ["a END b"], ["a "], "", "END"),
        (["b", "abc"], ["abc"], ["a"], "", "b"),
        (["b", "abc"], ["a", "b", "c"], ["", "a", ""], "", "b"),
        (["ab", "b"], ["xab"], ["x"], "", "ab"),
        (["aab"], ["aa", "ab"], ["", "a"], "", "aab"),
        (["\n\n"], ["x\n", "\ny"], ["x", ""], "", "\n\n"),
        ([], ["x", "y"], ["x", "y"], "", None),
        (["END"], ["END", "more"], ["", ""], "", "END"),
    ],
)
def test_table(strings, pieces, shown, held, found):
    assert run(strings, pieces) == (shown, held, found)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_however_the_text_is_cut_the_same_is_shown(text, strings, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, held, found = run(strings, pieces)
    by_character, held_by_character, found_by_character = run(strings, text)
    assert ("".join(shown) + held, found) == ("".join(by_character) + held_by_character, found_by_character)
    assert not any(string in "".join(shown) + held for string in strings)


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=4))
def test_what_is_shown_could_not_have_begun_a_stop(text, string):
    stops = StopStrings([string])
    shown = ""
    for size, character in enumerate(text, start=1):
        shown += stops.push(character)
        if stops.found:
            break
        rest = text[len(shown) : size]
        assert text[:size] == shown + rest and string.startswith(rest)
        assert not any(string.startswith(text[start:size]) for start in range(len(shown)))
