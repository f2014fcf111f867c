"""Text in whole characters: the pieces joined are the decoded whole, and no unfinished character is shown."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine.text import TextStream
from tests.engine.tiny_tokenizers import byte_fallback, byte_level

MARK = "\N{REPLACEMENT CHARACTER}"
TEXTS = [
    "plain words",
    "héllo, ß and ñ",
    "中文字符",
    "😀 then 🏳️‍🌈 and 👩‍👩‍👧",
    "a" * 80 + "😀" * 40 + "中" * 40,
    f"a real {MARK} in the text",
    "  spaces   kept\n\n\tand lines\n",
]
BYTES = byte_level()
PIECES = byte_fallback()
TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte_level", "byte_fallback"])


def pieces(tokenizer, ids, after=()):
    stream = TextStream(tokenizer, after)
    return [*(stream.push(token) for token in ids), stream.flush()]


@TOKENIZERS
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_pieces_join_to_the_text_and_split_no_character(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids) == text
    assert MARK in text or not any(MARK in piece for piece in shown)


@given(text=st.text(max_size=60))
def test_any_text_comes_back(text):
    ids = BYTES.encode(text, add_special_tokens=False)
    assert "".join(pieces(BYTES, ids)) == text


def test_random_tokens_give_what_decoding_them_together_gives():
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(3, len(BYTES)) for _ in range(70)]
        assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids)


def test_an_unfinished_character_is_held_and_shown_as_invalid_only_at_the_end():
    ids = BYTES.encode("a😀", add_special_tokens=False)
    shown = pieces(BYTES, ids[:-1])
    assert shown[0] == "a" and set(shown[1:-1]) <= {""} and shown[-1] == MARK


def test_invalid_bytes_are_shown_when_what_follows_proves_them_invalid():
    ids = BYTES.encode("😀", add_special_tokens=False)[:2] + BYTES.encode("ab", add_special_tokens=False)
    shown = pieces(BYTES, ids)
    assert shown[:2] == ["", ""] and shown[2] == f"{MARK}a"


def test_a_space_that_depends_on_the_token_before_is_kept():
    prompt, ids = PIECES.encode("the cat", add_special_tokens=False), [PIECES.convert_tokens_to_ids("▁sat")]
    assert "".join(pieces(PIECES, ids)) == "sat"
    assert "".join(pieces(PIECES, ids, after=prompt)) == " sat"


@TOKENIZERS
def test_after_a_prompt_that_ends_in_many_bytes(tokenizer):
    prompt = tokenizer.encode("😀" * 12, add_special_tokens=False)
    ids = tokenizer.encode("x😀" * 12, add_special_tokens=False)
    together = tokenizer.decode(prompt + ids)
    assert "".join(pieces(tokenizer, ids, after=prompt)) == together.removeprefix("😀" * 12)


def test_special_tokens_are_left_out():
    ids = [BYTES.bos_token_id, *BYTES.encode("hi", add_special_tokens=False), BYTES.eos_token_id]
    assert "".join(pieces(BYTES, ids)) == "hi"


def test_the_window_does_not_grow_with_the_text():
    stream = TextStream(BYTES)
    for token in BYTES.encode("word " * 400, add_special_tokens=False):
        stream.push(token)
    assert len(stream._tokens) <= 40
