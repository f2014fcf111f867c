"""Which tokens of which sequences the next forward computes, under a budget of tokens and of pages.

First come, first served. A step first gives every decoding sequence its token, then prompts what is left of the
budget, cut where it ends, then lets waiting sequences in; drafts of what may come next take what nobody else wants.
Where pages run out, the last to have come gives its up and computes again later. Plain and deterministic: no tensor,
no model, no clock of its own.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field, replace

from hasten.cache.ledger import Ledger
from hasten.cache.pages import Copy
from hasten.engine.prefixes import Prefixes
from hasten.engine.sequence import Sequence, State
from hasten.errors import ArgumentError


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + count` of a sequence, for which it now has room, and pages to copy before.

    is_last: nothing known is left after it, so its last row gives the next token. is_pending: its last token has not
    been read from the device. num_draft: how many of the count are the first tokens of the sequence's draft.
    """

    sequence: Sequence
    start: int
    count: int
    copies: tuple[list[Copy], ...]
    is_last: bool
    is_pending: bool
    num_draft: int = 0


@dataclass
class Step:
    """What one forward computes: `chunks`, those of one token first; and who was preempted for it."""

    budget: int
    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Waiting and running sequences, each in order of arrival.

    max_batch_tokens: of one forward. max_running: sequences in the batches at once. prefixes: where sequences take
    over what others left, if they do.
    Raises ArgumentError for settings under which a prompt could wait for ever.
    """

    def __init__(
        self, ledger: Ledger, *, max_batch_tokens: int, max_running: int, prefixes: Prefixes | None = None
    ) -> None:
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_running", max_running)):
            if value < 1:
                raise ArgumentError(name, "at least 1", value, "leave it out for a good one")
        if max_running > max_batch_tokens:
            expected = f"at least max_running, {max_running}, so that each sequence has a token in every step"
            raise ArgumentError("max_batch_tokens", expected, max_batch_tokens, "raise it or lower max_running")
        self.ledger, self.max_batch_tokens, self.max_running = ledger, max_batch_tokens, max_running
        self.prefixes = prefixes
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def is_idle(self) -> bool:
        """True if there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def sequences(self) -> list[Sequence]:
        """All that wait or run."""
        return [*self.running, *self.waiting]

    def fits(self, num_tokens: int, num_sequences: int = 1) -> bool:
        """True if so many sequences that grow to so many computed tokens can be served at once."""
        return self.ledger.fits(num_tokens, self.max_batch_tokens, num_sequences)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn."""
        sequence.state = State.WAITING
        insort(self.waiting, sequence, key=_arrival)

    def fork(self, sequence: Sequence, arrival: tuple[int, int]) -> Sequence:
        """A running sequence once more, with the same tokens in the same pages; takes one of its seats."""
        assert sequence.state is State.RUNNING, f"a {sequence.state.value} sequence cannot be forked"
        sequence.seats = max(1, sequence.seats - 1)
        other = Sequence(
            tokens=list(sequence.tokens),
            holding=sequence.holding.fork(),
            arrival=arrival,
            deadline_s=sequence.deadline_s,
            most=sequence.most,
            epoch=sequence.epoch,
            is_of_group=sequence.is_of_group,
            state=State.RUNNING,
        )
        insort(self.running, other, key=_arrival)
        return other

    def finish(self, sequence: Sequence, *, is_broken: bool = False) -> None:
        """Let a sequence go, whatever its state, with all that it holds; once more changes nothing.

        is_broken: what it computed is for nobody else.
        """
        if sequence.state is not State.FINISHED:
            if self.prefixes is not None and not is_broken:
                self.prefixes.leave(sequence, sequence.num_computed, is_end=True)
            (self.waiting if sequence.state is State.WAITING else self.running).remove(sequence)
            sequence.state = State.FINISHED
            sequence.holding.free()

    def expired(self, now_s: float) -> list[Sequence]:
        """Those whose deadline is past."""
        return [one for one in self.sequences if one.deadline_s is not None and one.deadline_s <= now_s]

    def schedule(self) -> Step:
        """What to compute next; the pages for it are taken, and count as computed from now on."""
        step = Step(self.max_batch_tokens)
        running = list(self.running)
        for sequence in [one for one in running if one.num_left == 1] + [one for one in running if one.num_left > 1]:
            self._advance(sequence, step)
        if not step.preempted:
            self._admit(step)
            step.chunks = sorted((self._with_draft(chunk, step) for chunk in step.chunks), key=_is_long)
        return step

    def _with_draft(self, chunk: Chunk, step: Step) -> Chunk:
        """A decoding sequence's token, and as much of its draft as the budget and free pages allow."""
        sequence = chunk.sequence
        if chunk.is_pending or not chunk.is_last or chunk.count > 1:
            return chunk
        num_draft = min(len(sequence.draft), step.budget, sequence.most - sequence.num_computed)
        while num_draft > 0 and not sequence.holding.can_grow(num_draft):
            num_draft -= 1
        if num_draft <= 0:
            return chunk
        sequence.holding.grow(num_draft)  # copies nothing: it has just written to the same page
        step.budget -= num_draft
        return replace(chunk, count=chunk.count + num_draft, num_draft=num_draft)

    def _advance(self, sequence: Sequence, step: Step) -> None:
        """As many tokens of a running sequence as the budget allows, for which others may have to go."""
        count = min(sequence.num_left, step.budget)
        if sequence.state is not State.RUNNING or count == 0:
            return
        sequence.holding.slide()
        if self.prefixes is not None:
            self.prefixes.act_for(sequence)
        while not sequence.holding.can_grow(count):
            for victim in self._victims():
                self._preempt(victim, step)
            if sequence.state is not State.RUNNING:
                return
        start = sequence.num_computed
        copies, is_last = sequence.holding.grow(count), start + count == sequence.num_tokens
        step.chunks.append(Chunk(sequence, start, count, copies, is_last, is_last and sequence.num_pending > 0))
        step.budget -= count

    def _admit(self, step: Step) -> None:
        """Let the first that wait in, as long as their known tokens have room beside a page for each that runs.

        Nobody overtakes: a long prompt at the head is not starved by short ones behind it.
        """
        while self.waiting and step.budget > 0:
            head = self.waiting[0]
            has_seats = sum(one.seats for one in self.running) + head.seats <= self.max_running
            if not has_seats or not self._has_room(head):
                return
            self.waiting.pop(0)
            head.state = State.RUNNING
            if self.prefixes is not None:
                spare = len(self.running) + 1
                has_spare = self.ledger.has_room(head.num_tokens, self.max_batch_tokens, spare)
                self.prefixes.take(head, has_spare=has_spare)
            insort(self.running, head, key=_arrival)
            self._advance(head, step)

    def _victims(self) -> list[Sequence]:
        """The last to have come, and those that cannot go on without it."""
        last = self.running[-1]
        if not last.is_of_group:
            return [last]
        return [one for one in self.running if one.is_of_group and one.arrival[0] == last.arrival[0]]

    def _has_room(self, head: Sequence) -> bool:
        """True if the first that waits can be let in; pins of the prompt cache give way to who would be alone."""
        needed = (self.max_batch_tokens, len(self.running))
        while not self.ledger.has_room(head.num_tokens, *needed):
            if self.prefixes is None or self.prefixes.has_room(head, *needed):
                return self.prefixes is not None
            if self.running or not self.prefixes.give_way():
                return False
        return True

    def _preempt(self, victim: Sequence, step: Step) -> None:
        """Give up its pages, and what this step had planned for it; it waits, before all that came later."""
        num_computed = victim.num_computed
        for chunk in [one for one in step.chunks if one.sequence is victim]:
            step.chunks.remove(chunk)
            step.budget += chunk.count
            # whole pages: what the last one was to be copied from is no longer held
            num_computed = chunk.start - chunk.start % self.ledger.page_size
        self.running.remove(victim)
        if self.prefixes is not None:
            self.prefixes.leave(victim, num_computed)
        victim.holding.free()
        victim.num_preemptions += 1
        self.num_preemptions += 1
        step.preempted.append(victim)
        self.add(victim)


def _is_long(chunk: Chunk) -> bool:
    return chunk.count > 1


def _arrival(sequence: Sequence) -> tuple[int, int]:
    return sequence.arrival


__all__ = ["Chunk", "Scheduler", "Step"]
