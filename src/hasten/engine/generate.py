"""Generation for one prompt: an event for every token, as it comes, and a record at the end.

Joins the runner (logits), the chooser (tokens) and the text stream (characters, stop strings). Batches of
requests belong to a scheduler, which this is not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.engine import prompt as prompts
from hasten.engine.answer import Answer
from hasten.engine.events import Finished, Token
from hasten.engine.runner import Runner
from hasten.engine.sampling import Chooser, Sampling, end_ids
from hasten.errors import ArgumentError


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
    _refuse_what_only_an_engine_has(sampling)
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
        ends = {*end_ids(rules), *sampling.stop_ids}
        self.answer = Answer(tokenizer, () if self.first else prompt, ends, sampling.stop, limit)
        self.seconds: list[float] = []  # of work, for each token

    def events(self) -> Iterator[Token | Finished]:
        """Every token, then the record."""
        start = time.perf_counter()
        logits = self.runner.begin(self.prompt, self.first, self.limit)
        _check_numbers(logits)
        while True:
            token = self.chooser.choose(logits, self.history)
            self.history.append(token)
            piece, is_last = self.answer.push(token)
            self.seconds.append(time.perf_counter() - start)
            yield Token(id=token, text=piece)
            if is_last:
                break
            start = time.perf_counter()
            logits = self.runner.next(token)
        yield self._record()

    def _record(self) -> Finished:
        runner, cache, decode_s = self.runner, self.runner.cache, sum(self.seconds[1:])
        answer = self.answer
        return Finished(
            finish_reason="length" if answer.stopped_by is None else "stop",
            stopped_by=answer.stopped_by,
            text=answer.text,
            token_ids=tuple(answer.tokens),
            prompt_tokens=len(self.prompt),
            ttft_s=self.seconds[0],
            decode_s=decode_s,
            tokens_per_s=(len(answer.tokens) - 1) / decode_s if decode_s > 0 else None,
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


_NONE = ("logprobs", "prompt_logprobs", "json_schema", "regex", "grammar", "prompt_lookup_num_tokens")
_OF_ENGINES = (("n", 1), ("num_beams", 1), *((name, None) for name in _NONE))


def _refuse_what_only_an_engine_has(sampling: Sampling) -> None:
    for name, unused in _OF_ENGINES:
        value = getattr(sampling, name)
        if value != unused:
            raise ArgumentError(name, f"{unused} for one request at a time", value, "use hasten.Engine")


__all__ = ["Finished", "Token", "generate"]
