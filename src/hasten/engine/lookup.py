"""Prompt lookup: drafts of the next tokens, from what followed the last few where they occurred before.

The engine computes a draft along with the token before it and keeps what its own choice confirms, so that tokens do
not depend on drafts. Called by core.py; plain numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# how many of the last tokens must have occurred before, the most first: one alone is too weak a sign
SIZES = (3, 2)
#: tokens of a draft at most: with the token before them, what decode kernels compute at once
MOST = 15


class Lookup:
    """Where each few tokens of one growing sequence last occurred."""

    def __init__(self) -> None:
        self._num_read = 0
        self._follows: dict[tuple[int, ...], int] = {}  # a few tokens -> the place after them, where there is a token

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """`count` tokens that may come after `tokens`, which have grown since the last call; often none.

        A repetition that reaches the end goes on: after a b a b come a b a b.
        """
        for place in range(max(self._num_read, 1), len(tokens)):
            for size in SIZES:
                if place >= size:
                    self._follows[tuple(tokens[place - size : place])] = place
        self._num_read = max(self._num_read, len(tokens))
        for size in SIZES:
            last = tuple(tokens[-size:])
            if last in self._follows:
                place = self._follows[last]
                period = len(tokens) - place
                return [tokens[place + index % period] for index in range(count)]
        return []


def num_confirmed(draft: Sequence[int], chosen: Sequence[int]) -> int:
    """How many tokens of a draft were chosen: those before the first that was not."""
    pairs = enumerate(zip(draft, chosen, strict=False))
    return next((index for index, (token, own) in pairs if token != own), len(draft))


def before_first(draft: Sequence[int], ends: Iterable[int]) -> list[int]:
    """The draft before a token that would end the text, after which nothing is computed."""
    places = [draft.index(end) for end in ends if end in draft]
    return list(draft[: min(places, default=len(draft))])


__all__ = ["MOST", "Lookup", "before_first", "num_confirmed"]
