"""Text from tokens as they come, in whole characters.

A character of up to four bytes may be spread over several tokens, and what a token looks like may depend on
those before it. Called by `generate`; knows no model and no stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNDECODED = "\N{REPLACEMENT CHARACTER}"
_MOST_UNDECODED = 3  # bytes of an unfinished character, each a token and a mark at most
_WINDOW = 16  # tokens decoded with the next one: enough for a character, and for a space that the token before decides


class TextStream:
    """The text of a growing list of tokens, a piece at a time; the pieces joined are the decoded whole.

    after: tokens that come before, such as the prompt's, and are not shown. Special tokens are left out. A
    replacement character appears only where bytes are no UTF-8: as soon as what follows shows it, else in `flush`.
    """

    def __init__(self, tokenizer: Any, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens, text = self._tail(list(after))
        self._num_shown = len(text)  # characters of the window's text that are out
        self._num_waiting = 0  # tokens since the text last ended in a whole character

    def push(self, token: int) -> str:
        """The text that this token completes, often none."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        num_marks = len(text) - len(text.rstrip(_UNDECODED))
        self._num_waiting = self._num_waiting + 1 if num_marks else 0
        if self._num_waiting > _MOST_UNDECODED:  # the first of them completes no character any more
            num_marks = min(num_marks, _MOST_UNDECODED)
        end = len(text) - num_marks
        piece = text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        if len(self._tokens) >= 2 * _WINDOW and end == len(text):
            tokens, tail = self._tail(self._tokens)
            if text.endswith(tail):
                self._tokens, self._num_shown = tokens, len(tail)
        return piece

    def flush(self) -> str:
        """What is left once no more tokens will come."""
        text = self._decode(self._tokens)
        piece, self._num_shown = text[self._num_shown :], len(text)
        return piece

    def _tail(self, tokens: list[int]) -> tuple[list[int], str]:
        """The last tokens, from where a character begins, and their text."""
        for size in range(_WINDOW, _WINDOW + 4):
            text = self._decode(tokens[-size:])
            if not text.startswith(_UNDECODED):
                break
        return tokens[-size:], text

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
