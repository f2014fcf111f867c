"""`POST /v1/completions`: what its fields ask for, and how its answers and their chunks look.

Called by app.py. Knows JSON objects and the engine's events, nothing of HTTP.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.engine import Finished, Logprobs, Sampling, Token
from hasten.serve import fields
from hasten.serve.calls import Prompt
from hasten.serve.refusals import Refusal, bad_field
from hasten.serve.usage import Usage

MAX_PROMPTS = 128
MAX_TOKENS = 16  # of OpenAI's completions where none is given
LOWEST = -9999.0  # JSON has no infinity
_OWN = ("model", "prompt", "max_tokens", "stop", "logprobs", "echo", "logit_bias", "stream", "stream_options")
FIELDS = frozenset((*_OWN, *fields.SAMPLED))


class Completion:
    """One request: `prompts`, `sampling` and `is_stream` for who runs it, and its answer from what comes.

    Choice i of prompt p has index p * n + i. With max_tokens 0 the prompt is computed and nothing is shown, so that it
    is in the prompt cache, and its log probabilities can be had with echo.
    """

    def __init__(self, body: Mapping[str, Any], tokenizer: Any) -> None:
        fields.refuse_others(body, FIELDS)
        self._tokenizer, self.model = tokenizer, body.get("model")
        self.prompts = _prompts(body.get("prompt"))
        self.is_stream, self._wants_usage = fields.flag(body, "stream"), fields.wants_usage(body)
        self._is_echo, logprobs = fields.flag(body, "echo"), body.get("logprobs")
        if self._is_echo and self.is_stream and logprobs is not None:
            raise bad_field(
                "echo", "false in a stream with logprobs", "true", "those of the prompt come without stream"
            )
        limit = body.get("max_tokens", MAX_TOKENS)
        self._is_empty = limit == 0 and not isinstance(limit, bool)
        self.sampling: Sampling = fields.sampling(
            body,
            max_tokens=1 if self._is_empty else limit,
            logprobs=logprobs,
            prompt_logprobs=logprobs if self._is_echo else None,
        )
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self._head["model"] = self.model
        self._choices = [_Choice() for _ in range(len(self.prompts) * self.sampling.n)]
        self._usage = Usage()

    def answer(self, events: Sequence[tuple[int, Token | Finished]]) -> dict[str, Any]:
        """The whole answer, from all events."""
        done = sorted(
            (
                (number * self.sampling.n + one.index, number, one)
                for number, one in events
                if isinstance(one, Finished)
            ),
            key=lambda item: item[0],
        )
        choices = []
        for index, number, record in done:
            self._count(number, record)
            text, ids, logprobs = self._begin(number, record.prompt_logprobs)
            if not self._is_empty:
                text, ids = text + record.text, [*ids, *record.token_ids]
                logprobs = [*logprobs, *record.logprobs]
            table = self._table(self._choices[index], ids, logprobs)
            reason = "length" if self._is_empty else record.finish_reason
            choices.append({"index": index, "text": text, "logprobs": table, "finish_reason": reason})
        return {**self._head, "choices": choices, "usage": self._usage.json()}

    def chunks(self, number: int, event: Token | Finished) -> list[dict[str, Any]]:
        """What a stream says about an event of a prompt: none to three chunks."""
        index = number * self.sampling.n + event.index
        choice, found = self._choices[index], []
        if self._is_echo and not choice.has_begun:
            found.append(self._chunk(index, self._begin(number, ())[0], None, None))
        choice.has_begun = True
        if isinstance(event, Finished):
            self._count(number, event)
            found.append(self._chunk(index, "", None, "length" if self._is_empty else event.finish_reason))
        elif not self._is_empty:
            own = [] if event.logprobs is None else [event.logprobs]
            if event.text or own:
                found.append(self._chunk(index, event.text, self._table(choice, [event.id], own), None))
        return found

    def last_chunks(self) -> list[dict[str, Any]]:
        """What a stream ends with: its usage, if that was asked for."""
        if not self._wants_usage:
            return []
        return [{**self._head, "choices": [], "usage": self._usage.json()}]

    def _chunk(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [choice], **({"usage": None} if self._wants_usage else {})}

    def _count(self, number: int, record: Finished) -> None:
        self._usage.add(number, record, 0 if self._is_empty else len(record.token_ids))

    def _begin(self, number: int, logprobs: Sequence[Logprobs | None]) -> tuple[str, list[int], list[Logprobs | None]]:
        """(text, tokens, log probabilities) that stand before the new ones: those of the prompt with echo."""
        if not self._is_echo:
            return "", [], []
        prompt = self.prompts[number]
        ids = list(self._tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt)
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(ids)
        return text, ids, list(logprobs)

    def _table(self, choice: _Choice, ids: Sequence[int], logprobs: Sequence[Logprobs | None]) -> dict[str, Any] | None:
        """OpenAI's table of tokens; a token that is no text alone is called token_id:<id>."""
        if self.sampling.logprobs is None:
            return None
        names = [self._name(token) for token in ids]
        offsets = []
        for name in names:
            offsets.append(choice.offset)
            choice.offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [None if one is None else max(one.logprob, LOWEST) for one in logprobs],
            "top_logprobs": [
                None if one is None else {self._name(token): max(value, LOWEST) for token, value in one.top}
                for one in logprobs
            ],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        text = str(self._tokenizer.decode([token]))
        return f"token_id:{token}" if not text or "\ufffd" in text else text


@dataclass
class _Choice:
    """offset: of its next token in the text. has_begun: whether a stream has told of it."""

    offset: int = 0
    has_begun: bool = False


def _prompts(written: Any) -> list[Prompt]:
    """The prompts of a body: a text, texts, token ids, or lists of them."""
    expected = "a string, a list of strings, token ids, or a list of lists of token ids"
    if written is None:
        raise Refusal(400, f"prompt: expected {expected}, got none; give one", param="prompt", code="missing_field")
    if isinstance(written, str) or _are_ids(written):
        return [written]
    is_list = isinstance(written, list) and bool(written)
    if not is_list or not (all(isinstance(one, str) for one in written) or all(map(_are_ids, written))):
        raise bad_field("prompt", expected, json.dumps(written), "correct it")
    if len(written) > MAX_PROMPTS:
        raise bad_field("prompt", f"at most {MAX_PROMPTS} prompts", len(written), "send them in several requests")
    return list(written)


def _are_ids(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(one, int) and not isinstance(one, bool) for one in value)


__all__ = ["Completion"]
