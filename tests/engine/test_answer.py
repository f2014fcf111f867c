"""A continuation as it grows: ends, limits, text held back and given at the end. Whole requests: test_generate.py."""

from __future__ import annotations

import pytest

from hasten.engine.answer import Answer
from tests.engine.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
END = TOKENIZER.eos_token_id


def run(text, stop=(), limit=100, end=()):
    answer = Answer(TOKENIZER, (), {END}, stop, limit)
    pieces = []
    for token in [*TOKENIZER.encode(text, add_special_tokens=False), *end]:
        piece, is_last = answer.push(token)
        pieces.append(piece)
        if is_last:
            break
    assert "".join(pieces) == answer.text
    return answer, pieces, is_last


def test_the_limit_gives_what_was_held():
    whole = TOKENIZER.encode("ab EN", add_special_tokens=False)
    answer, pieces, is_last = run("ab EN", ("END",), len(whole))
    assert is_last and answer.text == "ab EN" and answer.stopped_by is None and pieces[-1]


@pytest.mark.parametrize("text", ["a😀", "中文 é"])
def test_half_a_character_is_not_shown(text):
    answer, pieces, _ = run(text)
    assert answer.text == text and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_end_token_has_no_text_and_is_counted():
    answer, _, is_last = run("ab", end=(END,))
    assert is_last and answer.text == "ab" and answer.stopped_by == END and answer.tokens[-1] == END


def test_a_stop_string_ends_the_text_before_it():
    answer, _, is_last = run("one END two", ("END",))
    assert is_last and answer.text == "one " and answer.stopped_by == "END"
