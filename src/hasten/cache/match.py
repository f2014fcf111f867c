"""What a prefix tree has of a prompt: how far its tokens go, how much of that can be taken over, and why no more.

Layers with a window make the difference: tokens up to n can be taken over if, of every such layer, the pages are
there that the next token sees. Called by prefix.py; changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from hasten.cache.nodes import Node, Root, Tokens
from hasten.cache.pages import NULL_PAGE
from hasten.cache.reasons import Eviction, Explanation

Windows = Sequence[int | None]


@dataclass(frozen=True, kw_only=True)
class Match:
    """num_tokens of a prompt of num_asked can be taken over, in `pages` of each kind, at most `limit`.

    num_known: tokens that the tree knows, for which pages of layers with a window may be missing; so many could be
    taken over once somebody leaves those pages there. explanation: of what was taken (`PrefixTree.take`).
    """

    tokens: Sequence[int]
    limit: int
    num_tokens: int = 0
    num_known: int = 0
    nodes: tuple[Node, ...] = ()
    pages: tuple[tuple[int, ...], ...] = ()
    path: tuple[Node, ...] = field(default=(), repr=False)
    explanation: Explanation | None = None

    @property
    def num_asked(self) -> int:
        """Tokens of the prompt."""
        return len(self.tokens)


def find(root: Root | None, tokens: Sequence[int], limit: int, windows: Windows, page_size: int) -> Match:
    """The longest prefix of at most `limit` tokens below a root."""
    if root is None:
        return Match(tokens=tokens, limit=limit)
    path: list[Node] = []
    node: Node = root
    known = 0
    while known < limit:
        child, shared = node.nearest(tuple(tokens[known : min(known + page_size, limit)]))
        if child is None:
            break
        path.append(child)
        known += shared
        if shared < page_size:
            break
        node = child
    return _usable(Match(tokens=tokens, limit=limit, num_known=known, path=tuple(path)), known, windows, page_size)


def cut(match: Match, windows: Windows, page_size: int) -> Match:
    """The same, but whole pages alone."""
    return _usable(match, match.num_tokens - match.num_tokens % page_size, windows, page_size)


def explain(match: Match, root: Root, page_size: int, gone: Callable[[int, Tokens], Eviction | None]) -> Match:
    """The same with its explanation, of which a tenant's own tree (`root`) and the public one are the only sources.

    gone: what became of the page of these tokens behind a trail.
    """
    is_short = match.num_tokens < match.num_known
    whole = Explanation(
        num_asked=match.num_asked,
        num_found=match.num_tokens,
        reason="window" if is_short else "whole",
        position=match.num_known,
        is_public=bool(match.nodes) and match.nodes[0].root.salt is None,
    )
    if match.num_known >= match.limit:
        return replace(match, explanation=whole)
    last: Node = match.path[-1] if match.path else root
    inside = match.num_known - last.start if match.path else 0
    is_behind = inside == len(last.tokens)
    next_page = tuple(match.tokens[match.num_known : match.num_known + page_size])
    eviction = gone(last.trail, next_page) if is_behind else None
    follows = last.tokens[inside:] if not is_behind else last.keys[0] if last.keys else ()
    if eviction is not None:
        reason = "evicted"
    elif is_short:
        reason = "window"
    elif follows:
        reason = "differs"
    else:
        reason = "ended" if match.path else "empty"
    cached = follows[0] if reason == "differs" else None
    token = match.tokens[match.num_known]
    return replace(match, explanation=replace(whole, reason=reason, token=token, cached=cached, eviction=eviction))


def _usable(match: Match, most: int, windows: Windows, page_size: int) -> Match:
    """Of the known tokens, at most `most`, the longest prefix for which every layer has what the next token sees."""
    gaps = _gaps(match.path, windows)
    count = most
    while count > 0:
        last = -(-count // page_size) - 1
        if all(gaps[kind][last] < _first_page(window, count, page_size) for kind, window in enumerate(windows)):
            break
        count = last * page_size
    nodes = match.path[: -(-count // page_size)]
    pages = tuple(
        tuple(NULL_PAGE if place < first else node.pages[kind] for place, node in enumerate(nodes))
        for kind, first in enumerate(_first_page(window, count, page_size) for window in windows)
    )
    return replace(match, num_tokens=count, nodes=nodes, pages=pages)


def _gaps(path: Sequence[Node], windows: Windows) -> list[list[int]]:
    """For each kind and each page of a path, the last place up to it where a page is missing; -1 for none."""
    found: list[list[int]] = []
    for kind in range(len(windows)):
        gaps: list[int] = []
        last = -1
        for place, node in enumerate(path):
            last = place if node.pages[kind] == NULL_PAGE else last
            gaps.append(last)
        found.append(gaps)
    return found


def _first_page(window: int | None, count: int, page_size: int) -> int:
    """The first page that a token behind `count` others sees."""
    return 0 if window is None else max(0, count - window) // page_size


__all__ = ["Match", "cut", "explain", "find"]
