"""Generation for one prompt: an event for every token, as it comes, and a record at the end.

Joins the runner (logits), the chooser (tokens) and the text stream (characters, stop strings). Batches of
requests belong to a scheduler, which this is not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.engine import prompt as prompts
from hasten.engine.runner import Runner
from hasten.engine.sampling import Chooser, Sampling, end_ids
from hasten.engine.stops import StopStrings
from hasten.engine.text import TextStream
from hasten.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Token:
    """One new token, and the text that may be shown since: whole characters, no part of a stop string."""

    id: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The record of a request, after its last token.

    finish_reason: "stop" (an end token, a stop id or a stop string, named by `stopped_by`) or "length".
    token_ids: all new tokens, the end token or stop id with them, as transformers counts. text: without them.
    ttft_s: seconds until the first token was chosen. tokens_per_s: of the tokens after it; None if there are
    none. Both count the work, not the time the caller took between events. cache_bytes: what was allocated, for
    `cache_capacity` tokens; 0 without a cache. cache_bytes_per_token: what a token takes in a cache.
    num_positions: tokens that went through the model. path: how the last step was computed. seed: of the
    draws, None if there were none.
    """

    finish_reason: str
    stopped_by: str | int | None
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    ttft_s: float
    decode_s: float
    tokens_per_s: float | None
    cache_bytes: int
    cache_capacity: int
    cache_bytes_per_token: int
    num_positions: int
    path: str
    seed: int | None
    dtype: str
    device: str


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    *,
    use_cache: bool = True,
    is_chat: bool = False,
) -> Iterator[Token | Finished]:
    """Continue a prompt: yields a `Token` for each new one and a `Finished` at the end.

    model: a transformers model with a language-modelling head in evaluation mode, or a `Runner` of one, which
    keeps what it has recorded for the next prompt. prompt: a text, or token ids (then tokenizer may be None and
    events have no text). is_chat: the text is a user's turn. Fewer tokens than `sampling.max_tokens` are made if
    the context ends first. The tokens are those of transformers' `generate` for the same choices.

    Raises ArgumentError at once, before the first event, for a prompt or sampling that cannot be served.
    """
    sampling = Sampling() if sampling is None else sampling
    runner = model if isinstance(model, Runner) else Runner(model, use_cache=use_cache)
    if sampling.stop and tokenizer is None:
        raise ArgumentError("stop", "no strings, since there is no tokenizer", sampling.stop, "use stop_ids")
    ids = prompts.encode(tokenizer, prompt, is_chat=is_chat)
    room = prompts.check(runner.model, ids)
    limit = sampling.max_tokens if room is None else min(sampling.max_tokens, room)
    return _Request(runner, tokenizer, ids, sampling, limit).events()


class _Request:
    """One prompt on its way."""

    def __init__(self, runner: Runner, tokenizer: Any, prompt: list[int], sampling: Sampling, limit: int) -> None:
        self.runner, self.prompt, self.sampling, self.limit = runner, prompt, sampling, limit
        self.first = prompts.first_tokens(runner.model)
        self.history = [*(self.first or prompt)]  # the decoder's tokens
        rules = getattr(runner.model, "generation_config", None)
        num_given = len(self.history)
        self.chooser = Chooser(sampling, rules, num_given, num_given + limit, runner.device)
        self.ends = {*end_ids(rules), *sampling.stop_ids}
        self.stops = StopStrings(sampling.stop)
        self.stream = None if tokenizer is None else TextStream(tokenizer, () if self.first else prompt)
        self.tokens: list[int] = []
        self.text = ""
        self.stopped_by: str | int | None = None
        self.seconds: list[float] = []  # of work, for each token

    def events(self) -> Iterator[Token | Finished]:
        """Every token, then the record."""
        start = time.perf_counter()
        logits = self.runner.begin(self.prompt, self.first, self.limit)
        _check_numbers(logits)
        while True:
            token = self.chooser.choose(logits, self.history)
            self.history.append(token)
            self.tokens.append(token)
            is_last = self._is_end(token) or len(self.tokens) == self.limit
            piece = self._piece(token, is_last)
            self.text += piece
            is_last = is_last or self.stopped_by is not None
            self.seconds.append(time.perf_counter() - start)
            yield Token(id=token, text=piece)
            if is_last:
                break
            start = time.perf_counter()
            logits = self.runner.next(token)
        yield self._record()

    def _is_end(self, token: int) -> bool:
        if token in self.ends:
            self.stopped_by = token
        return token in self.ends

    def _piece(self, token: int, is_last: bool) -> str:
        """The text that this token lets be shown; with the last token, all that was held back."""
        if self.stream is None:
            return ""
        piece = "" if self.stopped_by is not None else self.stops.push(self.stream.push(token))
        if is_last and self.stops.found is None:
            piece += self.stops.push(self.stream.flush())
            piece += self.stops.flush()
        if self.stops.found is not None:
            self.stopped_by = self.stops.found
        return piece

    def _record(self) -> Finished:
        runner, cache, decode_s = self.runner, self.runner.cache, sum(self.seconds[1:])
        return Finished(
            finish_reason="length" if self.stopped_by is None else "stop",
            stopped_by=self.stopped_by,
            text=self.text,
            token_ids=tuple(self.tokens),
            prompt_tokens=len(self.prompt),
            ttft_s=self.seconds[0],
            decode_s=decode_s,
            tokens_per_s=(len(self.tokens) - 1) / decode_s if decode_s > 0 else None,
            cache_bytes=0 if cache is None else cache.nbytes,
            cache_capacity=0 if cache is None else cache.capacity,
            cache_bytes_per_token=runner.cache_bytes_per_token(),
            num_positions=runner.num_positions,
            path=runner.path,
            seed=self.chooser.seed if self.sampling.temperature > 0 else None,
            dtype=str(runner.dtype).removeprefix("torch."),
            device=str(runner.device),
        )


def _check_numbers(logits: Tensor) -> None:
    if torch.isnan(logits).any():
        hint = "try dtype float32; if it stays, the weights are broken"
        raise ArgumentError("model", "logits that are numbers", "NaN", hint)
