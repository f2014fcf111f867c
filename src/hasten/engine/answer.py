"""What becomes of one continuation: its tokens, its text as it may be shown, and why it ended.

Called with each new token, by `generate` for one request and by the engine for many. Knows no model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from hasten.engine.stops import StopStrings
from hasten.engine.text import TextStream


class Answer:
    """A continuation as it grows. after: tokens before it, which decide how its first one looks.

    ends: tokens that end it. stop: strings that do. limit: the most tokens it has. Without a tokenizer there is no
    text.
    """

    def __init__(
        self, tokenizer: Any, after: Sequence[int], ends: Collection[int], stop: Sequence[str], limit: int
    ) -> None:
        self.ends, self._limit = frozenset(ends), limit
        self._stops = StopStrings(stop)
        self._stream = None if tokenizer is None else TextStream(tokenizer, after)
        self.tokens: list[int] = []
        self.text = ""
        self.stopped_by: str | int | None = None

    def push(self, token: int) -> tuple[str, bool]:
        """(text that this token lets be shown, whether it was the last one).

        With the last token comes all that was held back. An end token has no text.
        """
        self.tokens.append(token)
        if token in self.ends:
            self.stopped_by = token
        is_last = self.stopped_by is not None or len(self.tokens) >= self._limit
        piece = "" if self._stream is None or self.stopped_by is not None else self._through(self._stream.push(token))
        if is_last:
            piece += self._held()
        self.text += piece
        return piece, is_last or self.stopped_by is not None

    def _held(self) -> str:
        if self._stream is None or self._stops.found is not None:
            return ""
        piece = self._through(self._stream.flush())
        return piece + self._stops.flush()

    def _through(self, text: str) -> str:
        shown = self._stops.push(text)
        if self._stops.found is not None:
            self.stopped_by = self._stops.found
        return shown


__all__ = ["Answer"]
