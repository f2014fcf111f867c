"""`hasten.Engine`: many requests at a time from one model, each as if it were alone.

Any thread submits and cancels; one thread of its own runs the batches (core.py) and puts events where each request
reads them. Knows no text protocol.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from hasten.cache.paged import PagedCache, layers_of
from hasten.cache.prompt_cache import PromptCache
from hasten.engine import prompt as prompts
from hasten.engine import sizes
from hasten.engine.answer import Answer
from hasten.engine.beam_search import BeamSearch, kept
from hasten.engine.beams import Beams
from hasten.engine.cache_host import join, prepare
from hasten.engine.core import FAULTS, Core
from hasten.engine.events import Failed, Finished, Token
from hasten.engine.grammar import Grammars
from hasten.engine.lookup import Lookup
from hasten.engine.make_runner import make_runner
from hasten.engine.request import Choice, Event, Request
from hasten.engine.sampling import MAX_SEED, Chooser, Sampling, end_ids
from hasten.engine.scheduler import Scheduler
from hasten.engine.stats import Stats
from hasten.errors import ArgumentError, ArgumentTypeError, HastenError
from hasten.models.merged import merge

Prompt = str | Sequence[int]
Call = Callable[[], None]


class Handle:
    """A request on its way: its events as they come, and a way to break it off."""

    def __init__(self, engine: Engine, number: int, num_choices: int) -> None:
        self._engine, self.number, self._num_left = engine, number, num_choices
        self.queue: SimpleQueue[Event] = SimpleQueue()

    def events(self) -> Iterator[Token | Finished]:
        """Every token as it comes, and a record for each continuation; raises the error of a request that failed."""
        while self._num_left:
            event = self.queue.get()
            if isinstance(event, Failed):
                self._num_left = 0
                raise event.error
            self._num_left -= isinstance(event, Finished)
            yield event

    def result(self) -> list[Finished]:
        """The records of all continuations, by their index, once they have ended."""
        return sorted((one for one in self.events() if isinstance(one, Finished)), key=lambda one: one.index)

    def cancel(self) -> None:
        """Break the request off; its records come with finish_reason "cancelled". Later calls change nothing."""
        self._engine.cancel(self.number)


class Engine:
    """A transformers model that serves many requests at once, over K and V in pages.

    model: decoder-only, in evaluation mode; its attention implementation is the engine's until `close`.
    num_pages or memory_bytes: of the cache (see sizes.py for what else it takes). page_size: tokens of a page.
    kv_dtype: "int8" or "fp8" keeps K and V in 8 bits, with a scale for each token and head: half the memory of bf16,
    and other tokens where the best are close.
    max_batch_tokens: of one forward; prompts are cut to it. max_running: sequences computed at once; more wait.
    prompt_lookup_num_tokens: for requests that do not say it themselves (`Sampling`).
    cuda_graphs: decode steps are captured when a size of batch is first met, and replayed; the default on CUDA. Hooks
    of such a model do not run again, and its parameters may change in place, but not be exchanged. A model that cannot
    be captured runs without, and `stats` says why.
    merge_projections: layers that read the same input (q, k, v; gate, up) are one product until `close`, and their
    weights lie in one piece of memory, with the same names and values; the default on CUDA.
    compile: decode steps go through torch.compile before they are captured, a minute or so for each size of batches.
    prompt_cache: a PromptCache, True for one with its usual settings, None for none; what sequences leave in pages is
    then taken over by those that begin alike.
    reproducible: logits have the same bits whatever else is in the batch and however prompts are cut, at a cost
    (docs/design/engine.md). Steps are then not captured.

    The tokens of a request are those it would get alone: batches, cut prompts, forks and preemption change rounding
    only. Raises ArgumentError for a model that keeps something else than K and V, for settings that contradict each
    other, and for a cache that does not fit in memory.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        num_pages: int | None = None,
        memory_bytes: int | None = None,
        page_size: int = 16,
        kv_dtype: str | None = None,
        max_batch_tokens: int | None = None,
        max_running: int | None = None,
        prompt_lookup_num_tokens: int = 0,
        cuda_graphs: bool | None = None,
        merge_projections: bool | None = None,
        compile: bool = False,
        prompt_cache: PromptCache | bool | None = None,
        reproducible: bool = False,
    ) -> None:
        self._num_lookup = Sampling(prompt_lookup_num_tokens=prompt_lookup_num_tokens).prompt_lookup_num_tokens or 0
        if model.training:
            raise ArgumentError("model", "a model in evaluation mode", "one in training mode", "call model.eval()")
        device = next(model.parameters()).device
        is_cpu = device.type == "cpu"
        max_running = max_running if max_running is not None else 64 if is_cpu else 256
        max_batch_tokens = max_batch_tokens if max_batch_tokens is not None else 256 if is_cpu else 2048
        self.model, self.tokenizer, self._context = model, tokenizer, sizes.longest(model.config)
        self._merged = merge(model) if merge_projections or (merge_projections is None and not is_cpu) else None
        layers, stored = layers_of(model), sizes.stored_as(kv_dtype, model.dtype)
        counts = sizes.num_pages(
            layers,
            page_size,
            stored,
            device,
            wanted=num_pages,
            memory_bytes=memory_bytes,
            context=self._context,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
        )
        cache = PagedCache(layers, counts, page_size, model.dtype, device, stored)
        scheduler = Scheduler(cache.ledger(), max_batch_tokens=max_batch_tokens, max_running=max_running)
        runner = make_runner(
            model,
            cache,
            reproducible=reproducible,
            cuda_graphs=cuda_graphs,
            compile=compile,
            most_rows=max_running,
            context=self._context,
        )
        self.prompt_cache = join(prompt_cache, self, scheduler, cache, layers, reproducible)
        self._core = Core(runner, scheduler)
        self._grammars = Grammars(tokenizer, model.get_input_embeddings().weight.shape[0])
        self._numbers = itertools.count()
        self._wake = threading.Condition()
        self._inbox: deque[Request | int | Call] = deque()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling | Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        is_chat: bool = False,
        salt: str | None = "",
        on_event: Callable[[Event], None] | None = None,
    ) -> Handle:
        """Let a request join the batches; returns at once. timeout_s: then it ends with finish_reason "deadline".

        salt: of a tenant, whose prompt cache is apart from those of others; None is public, and found by all.
        on_event: is given every event, `Failed` too, in the engine's thread, and must return at once; the handle then
        has none, and only cancels.
        prompt: a text (a user's turn if is_chat) or token ids. Raises ArgumentError for what cannot be served.
        """
        sampling = _sampling(sampling)
        if timeout_s is not None and not timeout_s > 0:
            raise ArgumentError("timeout_s", "more than 0 seconds", timeout_s, "leave it out for no limit")
        request = self._request(prompts.encode(self.tokenizer, prompt, is_chat=is_chat), sampling, timeout_s)
        prepare(request, salt, self.prompt_cache)
        handle = Handle(self, request.number, request.num_records)
        request.emit = handle.queue.put if on_event is None else on_event
        self._send(request)
        return handle

    def stream(
        self, prompt: Prompt, sampling: Sampling | Mapping[str, Any] | None = None, **options: Any
    ) -> Iterator[Token | Finished]:
        """Events of one request as they come; arguments as for `submit`, whose errors come at once.

        A caller that stops reading (closes the generator) cancels the request.
        """
        return _events(self.submit(prompt, sampling, **options))

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | Mapping[str, Any] | None = None, **options: Any
    ) -> list[Finished | Failed]:
        """Continue many prompts; returns their records in order, `sampling.n` for each, once all have ended.

        A prompt that cannot be served has a `Failed` in its place, and the others go on. Options as for `submit`.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise ArgumentTypeError("prompts", "a list of prompts", type(prompts).__name__, "write [prompt] for one")
        sampling = _sampling(sampling)
        handles: list[Handle | HastenError] = []
        for prompt in prompts:
            try:
                handles.append(self.submit(prompt, sampling, **options))
            except HastenError as error:
                handles.append(error)
        return [record for handle in handles for record in _records(handle)]

    def cancel(self, number: int) -> None:
        """Break off the request of that number; one that has ended is left."""
        self._send(number)

    def stats(self) -> Stats:
        """What it is doing now."""
        return Stats.of(self._core)

    def between_steps(self, call: Call) -> None:
        """Let the engine's thread do something between two steps; returns at once."""
        self._send(call)

    def check_integrity(self) -> None:
        """Raise AssertionError if a page is lost or held twice; waits until the engine has nothing to do."""
        with self._wake:
            while not self._is_closed and (self._inbox or not self._core.is_idle):
                self._wake.wait()
            self._core.check_integrity()

    def close(self) -> None:
        """Cancel what is on its way, end the thread, give the model its attention back."""
        with self._wake:
            if self._is_closed:
                return
            self._is_closed = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._core.runner.close()
        if self._merged is not None:
            self._merged.undo()
        if self.prompt_cache is not None:
            self.prompt_cache.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _request(self, ids: list[int], sampling: Sampling, timeout_s: float | None) -> Request:
        """A request that can be served; raises ArgumentError for one that cannot."""
        if sampling.stop and self.tokenizer is None:
            raise ArgumentError("stop", "no strings, since there is no tokenizer", sampling.stop, "use stop_ids")
        limit = min(sampling.max_tokens, self._room(ids))
        self._check(ids, sampling, limit)
        rules = getattr(self.model, "generation_config", None)
        ends, now = {*end_ids(rules), *sampling.stop_ids}, self._core.clock()
        request = Request(
            number=next(self._numbers),
            prompt=ids,
            sampling=sampling,
            limit=limit,
            emit=lambda event: None,
            submitted_s=now,
            deadline_s=None if timeout_s is None else now + timeout_s,
            prompt_logprobs=[] if sampling.prompt_logprobs is None else [None],
        )
        wanted = sampling.prompt_lookup_num_tokens
        num_lookup = self._num_lookup if wanted is None else wanted
        if sampling.num_beams > 1:
            options = (sampling.num_beams, sampling.length_penalty, sampling.early_stopping)
            request.beams, num_lookup = Beams(BeamSearch(*options, ends, limit)), 0
        for index in range(max(sampling.n, sampling.num_beams)):
            own = sampling if sampling.seed is None else _with_seed(sampling, index)
            grammar = self._grammars.make(sampling, len(ids), sorted(ends))
            first = [] if grammar is None else [grammar]
            chooser = Chooser(own, rules, len(ids), len(ids) + limit, self._core.runner.device, first)
            answer = Answer(self.tokenizer, ids, ends, sampling.stop, limit)
            choice = Choice(request=request, index=index, answer=answer, chooser=chooser, num_lookup=num_lookup)
            choice.lookup = Lookup() if num_lookup else None
            request.choices.append(choice)
        return request

    def _room(self, ids: Sequence[int]) -> int:
        """How many new tokens the model's context leaves; raises ArgumentError if none."""
        room = prompts.check(self.model, ids)
        if self._context is None or room is None:
            return MAX_SEED
        if len(ids) >= self._context:
            expected = f"at most {self._context - 1} tokens, where LongRoPE changes"
            raise ArgumentError("prompt", expected, f"{len(ids)} tokens", "use hasten.engine.generate for longer ones")
        return self._context - len(ids)

    def _check(self, ids: Sequence[int], sampling: Sampling, limit: int) -> None:
        scheduler, cache = self._core.scheduler, self._core.runner.cache
        num_tokens = len(ids) + limit - 1  # the last one goes through no layer
        beams = sampling.num_beams
        if not scheduler.fits(num_tokens, beams):
            each = scheduler.ledger.pages_of(num_tokens, scheduler.max_batch_tokens)
            wanted = tuple(beams * count + beams - 1 for count in each)
            expected = f"at least {wanted} pages for {len(ids)} tokens and {limit} new ones"
            expected += f" of {beams} beams" if beams > 1 else ""
            raise ArgumentError("num_pages", expected, cache.num_pages, "give the engine more, or lower max_tokens")
        for name in ("n", "num_beams"):
            if getattr(sampling, name) > scheduler.max_running:
                expected = f"at most max_running, {scheduler.max_running}"
                raise ArgumentError(name, expected, getattr(sampling, name), "ask for fewer")
        vocab = self.model.get_input_embeddings().weight.shape[0]
        num_ends = len({*end_ids(getattr(self.model, "generation_config", None)), *sampling.stop_ids})
        if beams > 1 and kept(beams, num_ends) > vocab:
            expected = f"beams whose continuations, {kept(beams, num_ends)}, are at most the vocabulary of {vocab}"
            raise ArgumentError("num_beams", expected, beams, "ask for fewer")
        strange = [token for token in sampling.logit_bias if token >= vocab]
        if strange:
            raise ArgumentError("logit_bias", f"token ids from 0 to {vocab - 1}", strange[0], "correct or remove it")

    def _send(self, message: Request | int | Call) -> None:
        with self._wake:
            if self._is_closed:
                if isinstance(message, int):
                    return
                raise ArgumentError("engine", "one that is open", "a closed one", "make another")
            self._inbox.append(message)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hasten-engine", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def _run(self) -> None:
        """The loop of the engine's thread."""
        while True:
            with self._wake:
                while not self._is_closed and not self._inbox and self._core.is_idle:
                    self._wake.notify_all()
                    self._wake.wait()
                while self._inbox:
                    message = self._inbox.popleft()
                    self._receive(message)
                if self._is_closed:
                    for number in list(self._core.requests):
                        self._core.cancel(number)
                    return
            self._step()

    def _receive(self, message: Request | int | Call) -> None:
        """Take a message in; what goes wrong with it ends its request, and not the engine for all others."""
        try:
            if isinstance(message, int):
                self._core.cancel(message)
            elif isinstance(message, Request):
                self._core.add(message)
            else:
                message()
        except FAULTS as error:
            told = HastenError(f"engine: {type(error).__name__} between two steps: {error}")
            number = message if isinstance(message, int) else getattr(message, "number", None)
            if number in self._core.requests:
                self._core.fail(number, told)
            elif isinstance(message, Request):
                message.emit(Failed(error=told))
            else:
                logging.getLogger(__name__).error("%s", told)

    def _step(self) -> None:
        try:
            self._core.step()
        except FAULTS as error:  # not of one request: those have been let go alone
            for number in list(self._core.requests):
                self._core.fail(number, HastenError(f"engine: {type(error).__name__} in a step: {error}"))


def _sampling(given: Sampling | Mapping[str, Any] | None) -> Sampling:
    if given is None or isinstance(given, Sampling):
        return given or Sampling()
    if not isinstance(given, Mapping):
        raise ArgumentTypeError("sampling", "a Sampling or a mapping", type(given).__name__, "see hasten.Sampling")
    return Sampling.of(given)


def _with_seed(sampling: Sampling, index: int) -> Sampling:
    return replace(sampling, seed=((sampling.seed or 0) + index) & MAX_SEED)


def _events(handle: Handle) -> Iterator[Token | Finished]:
    try:
        yield from handle.events()
    finally:
        handle.cancel()


def _records(handle: Handle | HastenError) -> Sequence[Finished | Failed]:
    if isinstance(handle, HastenError):
        return [Failed(error=handle)]
    try:
        return handle.result()
    except HastenError as error:
        return [Failed(error=error)]


__all__ = ["Engine", "Handle", "Stats"]
