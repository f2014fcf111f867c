"""Stop strings in a stream of text: found across pieces, never shown, not even the beginning of one.

Called by `generate` with pieces of text as they come; knows no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through until one of the strings occurs; `found` is then that string."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that may be shown now: nothing that a stop string could still begin with, or after one."""
        if self.found is not None:
            return ""
        text = self._held + piece
        matches = [(text.find(one) + len(one), -len(one), one) for one in self._strings if one in text]
        if matches:
            end, _, self.found = min(matches)  # the first to be complete, however the text is cut into pieces
            self._held = ""
            return text[: end - len(self.found)]
        held = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The text held back, once no more will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """How long the longest end of `text` is that begins `string`, which is not in it."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if string.startswith(text[len(text) - size :])), 0)
