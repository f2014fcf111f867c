"""Speculation: gives running sequences a draft of their next tokens, and keeps what the choice has confirmed.

A step computes a sequence's last token and its draft, and chooses after each of them as if the draft were true; the
first token that is another ends it. What came after is taken back: room in the pages, and draws. Called by core.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hasten.engine.grammar import Grammar
from hasten.engine.lookup import before_first, num_confirmed
from hasten.engine.request import Choice
from hasten.engine.sequence import Sequence as Tokens


def propose(running: Iterable[Tokens]) -> None:
    """Set the drafts of all sequences for the next step; those that are not decoding have none."""
    for sequence in running:
        sequence.draft = _draft(sequence.owner, sequence)


def settle(choice: Choice, chosen: Sequence[int]) -> int:
    """How many of the tokens that were chosen, one more than its draft, are the continuation's; forgets the rest."""
    if not choice.draft:
        return 1
    assert choice.sequence is not None, "a choice without a sequence has no token to come"
    num_draft, confirmed = len(choice.draft), num_confirmed(choice.draft, chosen)
    holding = choice.sequence.holding
    holding.truncate(holding.num_tokens - (num_draft - confirmed))
    if choice.marks:
        choice.chooser.generator.set_state(choice.marks[confirmed])
    choice.num_drafted += num_draft
    choice.num_accepted += confirmed
    choice.draft = []
    return confirmed + 1


def _draft(choice: Choice, sequence: Tokens) -> list[int]:
    has_forks_to_come = any(one.sequence is None and not one.is_done for one in choice.request.choices)
    if choice.lookup is None or sequence.num_left != 1 or sequence.num_pending or has_forks_to_come:
        return []
    count = min(choice.num_lookup, sequence.most - sequence.num_tokens)
    draft = before_first(choice.lookup.draft(sequence.tokens, count), choice.answer.ends)
    for one in choice.chooser.processors:
        if isinstance(one, Grammar) and draft:
            draft = draft[: one.num_allowed(sequence.tokens, draft)]
    return draft


__all__ = ["propose", "settle"]
