"""Why a prompt was found in a prompt cache so far and no further: one value, and one line of it for a person.

Made by prefix.py. Nothing of another tenant is in it: who evicted is named only if it is the asker's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_REMARKS = 4096


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """What became of a page of tokens: for what it had to go ("room", "budget", "cleared"), for whom, and when.

    by: a request of the same tenant, as the engine calls it; None for anybody else's.
    """

    cause: str
    by: str | None
    age_s: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """num_found of num_asked tokens were taken over; what comes first after them is at `position`.

    reason: "whole" (all that could be: the last token is always computed), "empty" (nothing of this tenant is there),
    "differs" (another token follows in the cache: `cached`, where the prompt has `token`), "ended" (nothing follows),
    "evicted" (it was there, see `eviction`), "window" (the tokens are there up to `position`, but of layers with a
    window not all that the next token sees), "skipped" (the request did not ask).
    """

    num_asked: int
    num_found: int
    reason: str
    position: int
    token: int | None = None
    cached: int | None = None
    eviction: Eviction | None = None
    is_public: bool = False

    def line(self, decode: Callable[[Sequence[int]], str] | None = None) -> str:
        """One line for a person. decode: token ids to text."""
        found = f"{self.num_found:,} of {self.num_asked:,} tokens from the cache"
        token, cached = _shown(self.token, decode), _shown(self.cached, decode)
        at = f"token {self.position:,}"
        if self.reason == "differs":
            return f"{found}: {at} is {token}, the cache has {cached} there"
        if self.reason == "ended":
            return f"{found}: nothing in the cache goes on with {at}, {token}"
        if self.reason == "evicted" and self.eviction is not None:
            gone = {"room": "for room", "budget": "for its tenant's budget"}.get(self.eviction.cause, "when cleared")
            by = "" if self.eviction.by is None else f", by {self.eviction.by}"
            return f"{found}: what follows was evicted {self.eviction.age_s:,.1f} s ago {gone}{by}"
        if self.reason == "window":
            return f"{found}: {self.position:,} are known, but not all that layers with a window see at their end"
        return f"{found}" + {"empty": ": nothing is in it yet", "skipped": ": it was not asked"}.get(self.reason, "")


class Remarks:
    """The last pages of tokens that went, so that their absence can be explained; the oldest are forgotten."""

    def __init__(self, most: int = MAX_REMARKS) -> None:
        self._most = most
        self._found: OrderedDict[
            tuple[str | None, int, tuple[int, ...]], tuple[str, tuple[str | None, str] | None, float]
        ] = OrderedDict()

    def add(
        self,
        salt: str | None,
        trail: int,
        tokens: tuple[int, ...],
        cause: str,
        actor: tuple[str | None, str] | None,
        now_s: float,
    ) -> None:
        """Write down that the page of `tokens` behind `trail` has gone."""
        key = (salt, trail, tokens)
        self._found[key] = (cause, actor, now_s)
        self._found.move_to_end(key)
        if len(self._found) > self._most:
            self._found.popitem(last=False)

    def find(self, salt: str | None, trail: int, tokens: tuple[int, ...], now_s: float) -> Eviction | None:
        """What became of that page, if it is known."""
        found = self._found.get((salt, trail, tokens))
        if found is None:
            return None
        cause, actor, then_s = found
        by = actor[1] if actor is not None and actor[0] == salt else None
        return Eviction(cause=cause, by=by, age_s=now_s - then_s)


def _shown(token: int | None, decode: Callable[[Sequence[int]], str] | None) -> str:
    return str(token) if decode is None or token is None else f"{token} ({decode([token])!r})"


__all__ = ["Eviction", "Explanation", "Remarks"]
