"""The prompt cache as the scheduler and the core see it: what a sequence takes over, and what it leaves.

Joins sequences to the tree of cache/prefix.py. Plain numbers; called in the engine's thread alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hasten.cache.kept import Kept
from hasten.cache.ledger import Ledger
from hasten.cache.match import Match
from hasten.cache.pages import NULL_PAGE
from hasten.cache.prefix import PrefixTree
from hasten.engine.sequence import Sequence as Tokens

Version = tuple[int, ...]


class Prefixes:
    """What the sequences of one ledger share through a tree.

    version: of the weights; where it changes, everything is forgotten. kept: what is outside of the pages, if anything.
    """

    def __init__(self, tree: PrefixTree, version: Callable[[], Version] = tuple, kept: Kept | None = None) -> None:
        self.tree, self._version, self.kept = tree, version, kept
        self._known_version, self._epoch = version(), 0
        self._borrowed: list[tuple[int, int]] = []  # (kind, page) that copies of this step are made from

    @property
    def ledger(self) -> Ledger:
        """Whose pages they are."""
        return self.tree.ledger

    def release(self) -> None:
        """A step is on its way: what it copies from may go."""
        for kind, page in self._borrowed:
            self.ledger.pools[kind].free([page])
        self._borrowed.clear()

    def has_room(self, sequence: Tokens, chunk: int, spare: int) -> bool:
        """As `Ledger.has_room`, for a sequence that would begin with what is there."""
        match = self._lookup(sequence)
        most = self.ledger.pages_of(sequence.num_tokens, chunk)
        for kind, pool in enumerate(self.ledger.pools):
            found = [page for page in match.pages[kind] if page != NULL_PAGE] if match.num_tokens else []
            num_idle = sum(map(pool.is_idle, found))
            # one page of those found may be copied
            if max(0, most[kind] - len(found)) + 1 + spare > pool.num_available - num_idle:
                return False
        return True

    def take(self, sequence: Tokens, *, has_spare: bool) -> None:
        """Let a sequence that is let in begin with what is there. has_spare: a page of every kind can be copied."""
        self._check_version()
        sequence.epoch = self._epoch
        self.act_for(sequence)
        request = sequence.owner.request
        match = self._lookup(sequence)
        if self.kept is not None and request.kept:
            num_restored = self.kept.restore(match, request.kept, request.salt)
            request.restored_tokens, request.kept = num_restored, ()
            match = self._lookup(sequence) if num_restored else match
        match = self.tree.take(match, sequence.holding, request.salt, only_whole_pages=not has_spare)
        size = self.ledger.page_size
        if match.num_tokens % size:
            self._borrowed += [(kind, table.pages[-1]) for kind, table in enumerate(sequence.holding.tables)]
            for kind, page in self._borrowed[-len(self.ledger.pools) :]:
                self.ledger.pools[kind].share([page])
        landmark = match.num_known - match.num_known % size
        sequence.landmark = landmark if landmark > match.num_tokens else 0
        if request.explanation is None:
            request.explanation, request.cached_tokens = match.explanation, match.num_tokens

    def act_for(self, sequence: Tokens) -> None:
        """Who asks for pages now."""
        request = sequence.owner.request
        self.tree.actor = (request.salt, f"request {request.number}")

    def computed(self, sequence: Tokens, end: int) -> None:
        """Tokens up to `end` are computed: at the end of a prompt, and of what others knew, whole pages are left."""
        if 0 < sequence.landmark <= end:
            count, sequence.landmark = sequence.landmark, 0
            self.leave(sequence, count)
        if end == len(sequence.owner.request.prompt):
            self.leave(sequence, end - end % self.ledger.page_size)

    def leave(self, sequence: Tokens, num_computed: int, *, is_end: bool = False) -> None:
        """Leave the pages of the first tokens, which are computed; at its end, what they hold is also kept outside."""
        tokens = sequence.tokens[:num_computed]
        if tokens and sequence.epoch == self._epoch:
            self.act_for(sequence)
            salt = sequence.owner.request.salt
            self.tree.insert(tokens, sequence.holding, salt)
            if is_end and self.kept is not None:
                self.kept.save(tokens, salt)

    def give_way(self) -> bool:
        """Take pins back for who would be alone and still has no room; False if there are none."""
        return self.tree.give_way() > 0

    def held_pages(self) -> list[list[int]]:
        """Every page that is held here, by kind."""
        held = self.tree.held_pages()
        for kind, page in self._borrowed:
            held[kind].append(page)
        return held

    def _lookup(self, sequence: Tokens) -> Match:
        request = sequence.owner.request
        limit = len(sequence.tokens) - 1
        if request.sampling.prompt_logprobs is not None and len(request.prompt_logprobs) < len(request.prompt):
            limit = min(limit, len(request.prompt_logprobs) - 1)  # rows that nobody has read are computed
        return self.tree.lookup(sequence.tokens, request.salt, limit=limit)

    def _check_version(self) -> None:
        version = self._version()
        if version != self._known_version:
            self.tree.clear()
            if self.kept is not None:
                self.kept.turn_off()
            self._known_version = version
            self._epoch += 1


def versions(model: Any) -> Callable[[], Version]:
    """What tells that weights of a model were written in place since: the sum of torch's counts of writes."""
    parameters: Sequence[Any] = [one for one in model.parameters() if not one.is_inference()]
    return lambda: (sum(one._version for one in parameters),)


__all__ = ["Prefixes", "versions"]
