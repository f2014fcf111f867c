"""The engine without its thread: requests go in, each step computes one batch and hands out events.

Scheduler decides, cache accounts, runner computes, sampler picks; this joins them. A request that fails is let go
alone. One thread calls it (engine.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hasten.engine import sampler, speculate
from hasten.engine.batch import Piece, put
from hasten.engine.batch_runner import BatchRunner
from hasten.engine.events import Failed, Finished, Logprobs, Token
from hasten.engine.launched import Asked, Launched, Pick
from hasten.engine.request import Choice, Request
from hasten.engine.sampler import NO_TOKEN, Wanted
from hasten.engine.scheduler import Chunk, Scheduler
from hasten.engine.sequence import Sequence as Tokens
from hasten.engine.sequence import State
from hasten.errors import ArgumentError, HastenError

# what a model or a processor may raise; anything else is the interpreter's own and ends the engine
FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    HastenError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Core:
    """Requests on their way through one runner.

    is_ahead: the tokens of a step are read only once the next one is on its way, so that the device does not wait for
    the host; who ends with a token that the host has yet to see is computed once too often. None: on all devices but
    a CPU. clock: seconds, for deadlines and figures.
    """

    def __init__(
        self,
        runner: BatchRunner,
        scheduler: Scheduler,
        is_ahead: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.runner, self.scheduler, self.clock = runner, scheduler, clock
        self.is_ahead = runner.device.type != "cpu" if is_ahead is None else is_ahead
        self._launched: list[Launched] = []  # chosen, and not yet read: of one step at most
        self.requests: dict[int, Request] = {}
        self.num_steps = 0
        self.num_positions = 0  # tokens that went through the model
        self.num_drafted = self.num_accepted = 0  # tokens computed as a guess, and those of them that came true

    @property
    def is_idle(self) -> bool:
        """True if there is nothing to do."""
        return not self.requests

    def add(self, request: Request) -> None:
        """Let a checked request wait for its turn."""
        self.requests[request.number] = request
        first = request.choices[0]
        first.sequence = Tokens(
            tokens=list(request.prompt),
            holding=self.scheduler.ledger.open(),
            arrival=(request.number, 0),
            seats=len(request.choices),
            is_of_group=request.beams is not None,
            deadline_s=request.deadline_s,
            owner=first,
            most=len(request.prompt) + request.limit - 1,
        )
        self.scheduler.add(first.sequence)

    def cancel(self, number: int) -> None:
        """Break a request off, whatever its state; one that is done, or unknown, is left."""
        if number in self.requests:
            self._end(self.requests[number], "cancelled")

    def fail(self, number: int, error: HastenError) -> None:
        """Let a request go with an error."""
        request = self.requests.pop(number)
        for choice in request.choices:
            choice.is_done = True
            if choice.sequence is not None:
                self.scheduler.finish(choice.sequence, is_broken=True)
        request.emit(Failed(error=error))

    def step(self) -> None:
        """Compute one batch and hand out what comes of it."""
        for late in self.scheduler.expired(self.clock()):
            if not late.owner.is_done:
                self._end(late.owner.request, "deadline")
        before = self._launched
        if any(self._needs_tokens(launched) for launched in before):
            before = self._collect(before)
        self._launched = []
        speculate.propose(self.scheduler.running)
        chunks = self.scheduler.schedule().chunks
        if chunks:
            self._launch(chunks, before)
        if self.scheduler.prefixes is not None:
            self.scheduler.prefixes.release()
        self._collect(before)
        if not self.is_ahead:
            self._launched = self._collect(self._launched)

    def _launch(self, chunks: list[Chunk], before: list[Launched]) -> None:
        """Compute one batch and choose its tokens, of which nothing is read here."""
        self.num_steps += 1
        chosen = before[0].tokens if before else None
        work = [(chunk, self._rows(chunk)) for chunk in chunks]
        done, logits = self._apart(partial(self._compute, chosen), work)
        first = 0
        wanted: list[Pick] = []
        for chunk, own in done:
            first += len(own)
            self._read_prompt_logprobs(chunk, own, logits, first - len(own))
            if self.scheduler.prefixes is not None and chunk.sequence.state is State.RUNNING:
                self.scheduler.prefixes.computed(chunk.sequence, chunk.start + chunk.count)
            if chunk.is_last and chunk.sequence.owner.request.beams is not None:
                self._put_beam(chunk.sequence.owner, logits[first - 1])
            elif chunk.is_last and chunk.sequence.state is State.RUNNING:
                for choice in self._choices(chunk.sequence):
                    choice.draft, choice.marks = chunk.sequence.draft[: chunk.num_draft], []
                    ends = range(chunk.num_draft + 1)
                    wanted += [Pick(choice, first - len(ends) + place, place) for place in ends]
        if wanted:
            self._choose(wanted, logits)

    def _put_beam(self, choice: Choice, logits: Tensor) -> None:
        """Take the logits (vocab,) of a beam, and let all of its request go on if they can."""
        request = choice.request
        if choice.is_done:
            return
        try:
            request.beams.put(choice, logits)
            found = request.beams.advance(request, self.scheduler) if request.beams.is_ready else None
        except FAULTS as error:
            self.fail(request.number, _as_ours(error))
            return
        if found is None:
            return
        for own, hypothesis in zip(request.choices, found, strict=False):
            own.score, own.first_token_s, own.last_token_s = hypothesis.score, self.clock(), self.clock()
            for token in hypothesis.tokens:
                request.emit(Token(id=token, text=own.answer.push(token)[0], index=own.index))
            self._finish(own, "length" if own.answer.stopped_by is None else "stop")
        self._end(request, "stop")

    def _needs_tokens(self, launched: Launched) -> bool:
        """True if the next choice of somebody depends on the tokens so far, which are therefore read first."""
        choices = [pick.choice for pick in launched.wanted if not pick.choice.is_done]
        return any(one.lookup is not None or not sampler.is_free(one.chooser) for one in choices)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is free or held by a sequence that is on its way."""
        held = {choice.sequence for one in self.requests.values() for choice in one.choices if not choice.is_done}
        assert held - {None} == set(self.scheduler.sequences), "sequences without a request, or requests without one"
        others = () if self.scheduler.prefixes is None else self.scheduler.prefixes.held_pages()
        self.scheduler.ledger.check_integrity([one.holding for one in self.scheduler.sequences], others)

    def _rows(self, chunk: Chunk) -> list[int]:
        """Whose logits of a chunk are wanted: the last token's, and the prompt's where nobody has read them."""
        request: Request = chunk.sequence.owner.request
        rows: list[int] = []
        if request.sampling.prompt_logprobs is not None:
            known = len(request.prompt_logprobs) - 1
            end = min(chunk.start + chunk.count, len(request.prompt) - 1)
            rows = [position - chunk.start for position in range(max(chunk.start, known), end)]
        return [*rows, *range(chunk.count - 1 - chunk.num_draft, chunk.count)] if chunk.is_last else rows

    def _compute(self, chosen: Tensor | None, work: Sequence[tuple[Chunk, list[int]]]) -> Tensor:
        pieces = [
            Piece(
                ids=_ids(chunk),
                start=chunk.start,
                holding=chunk.sequence.holding,
                rows=rows,
                copies=chunk.copies,
                pending=chunk.sequence.owner.place if chunk.is_pending else None,
            )
            for chunk, rows in work
        ]
        logits = self.runner.run(pieces, chosen)
        for chunk, _ in work:
            chunk.sequence.owner.num_positions += chunk.count
            self.num_positions += chunk.count
        return logits

    def _apart(
        self, compute: Callable[[Sequence[tuple[Chunk, list[int]]]], Tensor], work: list[tuple[Chunk, list[int]]]
    ) -> tuple[list[tuple[Chunk, list[int]]], Tensor]:
        """(what could be computed, its rows); if it cannot be together, each alone, and who then fails is let go."""
        try:
            return work, compute(work)
        except FAULTS as error:
            if len(work) == 1:
                self.fail(work[0][0].sequence.owner.request.number, _as_ours(error))
                return [], torch.empty(0)
        done, rows = [], []
        for one in work:
            if one[0].sequence.state is State.RUNNING:  # else a sibling has failed
                good, part = self._apart(compute, [one])
                done += good
                rows += [part.clone()] if good else []  # the next one may be computed into the same memory
        return done, torch.cat(rows) if rows else torch.empty(0)

    def _choices(self, sequence: Tokens) -> list[Choice]:
        """Who takes a token from the last row of a sequence: its owner, and those that are forked from it now."""
        first: Choice = sequence.owner
        forks = [one for one in first.request.choices if one.sequence is None and not one.is_done]
        for choice in forks:
            choice.sequence = self.scheduler.fork(sequence, (first.request.number, choice.index))
            choice.sequence.owner = choice
        return [first, *forks]

    def _choose(self, wanted: list[Pick], logits: Tensor) -> None:
        """Choose a token for each, which is then pending until it is read."""
        tokens: list[Tensor] = []
        found: list[Pick] = []
        for group in self._choosable(wanted, logits):
            tokens.append(group[1])
            found += group[0]
        if not found:
            return
        for place, pick in enumerate(found):
            assert pick.choice.sequence is not None, "a choice without a sequence has no token to come"
            pick.choice.place = place
            pick.choice.sequence.num_pending += pick.num_draft == 0  # beside one of the step before, until that is read
        chosen = torch.cat(tokens) if len(tokens) > 1 else tokens[0]
        self._launched = [Launched(found, chosen, self._logprobs(found, logits, chosen))]

    def _choosable(self, wanted: list[Pick], logits: Tensor) -> list[tuple[list[Pick], Tensor]]:
        """[(those for whom a token could be chosen, the tokens)]; if not together, each request alone."""
        try:
            asked = [
                Wanted(pick.row, pick.choice.chooser, pick.history, pick.choice.marks if pick.choice.draft else None)
                for pick in wanted
            ]
            return [(wanted, sampler.choose(logits, asked))]
        except FAULTS as error:
            numbers = list({pick.choice.request.number: None for pick in wanted})
            if len(numbers) == 1:
                self.fail(numbers[0], _as_ours(error))
                return []
        apart = [[pick for pick in wanted if pick.choice.request.number == number] for number in numbers]
        return [group for part in apart for group in self._choosable(part, logits)]

    def _collect(self, before: list[Launched]) -> list[Launched]:
        """Read the tokens that a step has chosen, all at once, and give them to their owners; returns nothing left."""
        for launched in before:
            tokens, logprobs = launched.tokens.tolist(), launched.read_logprobs()
            now = self.clock()
            for choice, places in launched.places():
                if choice.is_done:
                    continue
                assert choice.sequence is not None, "a choice without a sequence has no token to come"
                choice.sequence.num_pending -= 1
                num_kept = speculate.settle(choice, [tokens[place] for place in places])
                self.num_drafted += len(places) - 1
                self.num_accepted += num_kept - 1
                for place in places[:num_kept]:
                    if not choice.is_done:
                        self._give(choice, tokens[place], logprobs[place], now)
        return []

    def _give(self, choice: Choice, token: int, own: Logprobs | None, now: float) -> None:
        if token == NO_TOKEN:
            hint = "try dtype float32; if it stays, the weights are broken"
            self.fail(choice.request.number, ArgumentError("model", "logits that are numbers", "NaN", hint))
            return
        if choice.first_token_s is None:
            choice.first_token_s = now
        choice.last_token_s = now
        assert choice.sequence is not None, "a choice without a sequence has no token to come"
        choice.sequence.tokens.append(token)
        piece, is_last = choice.answer.push(token)
        if own is not None:
            choice.logprobs.append(own)
        choice.request.emit(Token(id=token, text=piece, index=choice.index, logprobs=own))
        if is_last:
            self._finish(choice, "length" if choice.answer.stopped_by is None else "stop")

    def _logprobs(self, wanted: list[Pick], logits: Tensor, tokens: Tensor) -> Asked | None:
        counts = [pick.choice.request.sampling.logprobs for pick in wanted]
        places = [place for place, count in enumerate(counts) if count is not None]
        if not places:
            return None
        rows = put([wanted[place].row for place in places], torch.int64, logits.device)
        most = max(counts[place] or 0 for place in places)
        own = tokens[put(places, torch.int64, logits.device)]
        return Asked(places, [counts[place] or 0 for place in places], sampler.logprobs(logits[rows], own, most))

    def _read_prompt_logprobs(self, chunk: Chunk, rows: list[int], logits: Tensor, first: int) -> None:
        """Log probabilities of prompt tokens, from the rows before each; the last row of a prompt is for a new one."""
        request: Request = chunk.sequence.owner.request
        count = request.sampling.prompt_logprobs
        rows = [row for row in rows if chunk.start + row < len(request.prompt) - 1]
        if count is None or not rows:
            return
        targets = put([request.prompt[chunk.start + row + 1] for row in rows], torch.int64, logits.device)
        asked = Asked([], [], sampler.logprobs(logits[first : first + len(rows)], targets, count))
        request.prompt_logprobs += asked.read()

    def _end(self, request: Request, reason: str) -> None:
        for choice in request.choices:
            if not choice.is_done:
                self._finish(choice, reason)

    def _finish(self, choice: Choice, reason: str) -> None:
        """Let a continuation go, and hand out its record."""
        choice.is_done = True
        sequence, request = choice.sequence, choice.request
        if sequence is not None:
            choice.num_pages, choice.num_preemptions = sequence.holding.num_pages, sequence.num_preemptions
            self.scheduler.finish(sequence)
        if request.is_done:
            del self.requests[request.number]
        if choice.index < request.num_records:
            request.emit(self._record(choice, reason))

    def _record(self, choice: Choice, reason: str) -> Finished:
        request, answer, cache = choice.request, choice.answer, self.runner.cache
        first, last = choice.first_token_s, choice.last_token_s
        decode_s = 0.0 if first is None or last is None else last - first
        return Finished(
            finish_reason=reason,
            stopped_by=answer.stopped_by,
            text=answer.text,
            token_ids=tuple(answer.tokens),
            prompt_tokens=len(request.prompt),
            ttft_s=(self.clock() if first is None else first) - request.submitted_s,
            decode_s=decode_s,
            tokens_per_s=(len(answer.tokens) - 1) / decode_s if decode_s > 0 else None,
            cache_bytes=sum(count * one for count, one in zip(choice.num_pages, cache.page_nbytes, strict=False)),
            cache_capacity=max(choice.num_pages) * cache.page_size,
            cache_bytes_per_token=sum(cache.page_nbytes) // cache.page_size,
            num_positions=choice.num_positions,
            path="batches over pages",
            seed=choice.chooser.seed if request.sampling.temperature > 0 else None,
            dtype=str(cache.dtype).removeprefix("torch."),
            device=str(self.runner.device),
            index=choice.index,
            logprobs=tuple(choice.logprobs),
            prompt_logprobs=tuple(request.prompt_logprobs),
            num_preemptions=choice.num_preemptions,
            num_drafted=choice.num_drafted,
            num_accepted=choice.num_accepted,
            score=choice.score,
            cached_tokens=request.cached_tokens,
            restored_tokens=min(request.restored_tokens, request.cached_tokens),
            explanation=request.explanation,
        )


def _ids(chunk: Chunk) -> list[int]:
    """The tokens of a chunk; a 0 stands for one that is not read, until the runner puts it there."""
    end = chunk.start + chunk.count - chunk.num_draft
    known = chunk.sequence.tokens[chunk.start : end]
    return [*known, *[0] * chunk.is_pending, *chunk.sequence.draft[: chunk.num_draft]]


def _as_ours(error: BaseException) -> HastenError:
    if isinstance(error, HastenError):
        return error
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return HastenError(f"model: {type(error).__name__} in its forward: {text[:300]}")


__all__ = ["Core"]
