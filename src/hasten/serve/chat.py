"""`POST /v1/chat/completions`: messages by the model's own template, and how answers and their chunks look.

Called by app.py. Knows JSON objects and the engine's events, nothing of HTTP.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from hasten.engine import Finished, Logprobs, Sampling, Token
from hasten.serve import fields
from hasten.serve.calls import Prompt
from hasten.serve.refusals import Refusal, bad_field
from hasten.serve.usage import Usage

MAX_TOKENS = 1024  # where none is given
LOWEST = -9999.0  # JSON has no infinity
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_OWN = ("model", "messages", "max_tokens", "max_completion_tokens", "stop", "logprobs", "top_logprobs", "logit_bias")
FIELDS = frozenset((*_OWN, "response_format", "stream", "stream_options", *fields.SAMPLED))


class Chat:
    """One request: `prompts`, `sampling` and `is_stream` for who runs it, and its answer from what comes."""

    def __init__(self, body: Mapping[str, Any], tokenizer: Any) -> None:
        fields.refuse_others(body, FIELDS)
        self._tokenizer, self.model = tokenizer, body.get("model")
        self.is_stream, self._wants_usage = fields.flag(body, "stream"), fields.wants_usage(body)
        self.sampling: Sampling = fields.sampling(
            body, max_tokens=_limit(body), logprobs=_num_logprobs(body), json_schema=_schema(body)
        )
        self.prompts: list[Prompt] = [_prompt(body, tokenizer)]
        self._identity = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}
        self._usage, self._begun = Usage(), set[int]()

    def answer(self, events: Sequence[tuple[int, Token | Finished]]) -> dict[str, Any]:
        """The whole answer, from all events."""
        choices = []
        for record in sorted((one for _, one in events if isinstance(one, Finished)), key=lambda one: one.index):
            self._usage.add(0, record, len(record.token_ids))
            message = {"role": "assistant", "content": record.text, "refusal": None}
            choice = {"index": record.index, "message": message, "finish_reason": record.finish_reason}
            choices.append({**choice, "logprobs": self._table(record.token_ids, record.logprobs)})
        return {**self._identity, "object": "chat.completion", "choices": choices, "usage": self._usage.json()}

    def chunks(self, number: int, event: Token | Finished) -> list[dict[str, Any]]:
        """What a stream says about an event: none to two chunks; the first of a choice has its role."""
        found = []
        if event.index not in self._begun:
            self._begun.add(event.index)
            found.append(self._chunk(event.index, {"role": "assistant", "content": ""}, None, None))
        if isinstance(event, Finished):
            self._usage.add(number, event, len(event.token_ids))
            found.append(self._chunk(event.index, {}, None, event.finish_reason))
        elif event.text or event.logprobs is not None:
            own = [] if event.logprobs is None else [event.logprobs]
            found.append(self._chunk(event.index, {"content": event.text}, self._table([event.id], own), None))
        return found

    def last_chunks(self) -> list[dict[str, Any]]:
        """What a stream ends with: its usage, if that was asked for."""
        if not self._wants_usage:
            return []
        head = {**self._identity, "object": "chat.completion.chunk"}
        return [{**head, "choices": [], "usage": self._usage.json()}]

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        head = {**self._identity, "object": "chat.completion.chunk", "choices": [choice]}
        return {**head, "usage": None} if self._wants_usage else head

    def _table(self, ids: Sequence[int], logprobs: Sequence[Logprobs]) -> dict[str, Any] | None:
        if self.sampling.logprobs is None:
            return None
        content = []
        for token, one in zip(ids, logprobs, strict=True):
            top = [self._token(*pair) for pair in one.top]
            content.append({**self._token(token, one.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        """A token by its text; one that is no text alone is called token_id:<id> and has no bytes."""
        text = str(self._tokenizer.decode([token]))
        is_text = bool(text) and "\ufffd" not in text
        name, written = (text, list(text.encode())) if is_text else (f"token_id:{token}", None)
        return {"token": name, "logprob": max(logprob, LOWEST), "bytes": written}


def _limit(body: Mapping[str, Any]) -> Any:
    given = [name for name in ("max_tokens", "max_completion_tokens") if name in body]
    if len(given) > 1:
        raise bad_field("max_tokens", "nothing beside max_completion_tokens", "both", "give one of them")
    value = body[given[0]] if given else MAX_TOKENS
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise bad_field(given[0], "an int >= 1", json.dumps(value), "correct it")
    return value


def _num_logprobs(body: Mapping[str, Any]) -> int | None:
    num_top, is_on = body.get("top_logprobs"), fields.flag(body, "logprobs")
    if num_top is not None and not is_on:
        raise bad_field("top_logprobs", "logprobs true beside it", json.dumps(num_top), "set it, or leave this out")
    if num_top is not None and (not isinstance(num_top, int) or isinstance(num_top, bool) or not 0 <= num_top <= 20):
        raise bad_field("top_logprobs", "an int from 0 to 20", json.dumps(num_top), "correct it")
    return (num_top or 0) if is_on else None


def _schema(body: Mapping[str, Any]) -> Any:
    """The JSON schema that the text follows, None if any text will do."""
    written, name = body.get("response_format"), "response_format"
    if written is None:
        return None
    kind = written.get("type") if isinstance(written, dict) else None
    if kind in ("text", "json_object"):
        fields.refuse_others(written, ("type",), f"{name}.")
        return {"type": "object"} if kind == "json_object" else None
    holder = written.get("json_schema") if kind == "json_schema" else None
    if not isinstance(holder, dict) or not isinstance(holder.get("schema"), dict):
        expected = 'an object of type "text", "json_object" or "json_schema", the last with json_schema.schema'
        raise bad_field(name, expected, json.dumps(written), "correct it")
    fields.refuse_others(written, ("type", "json_schema"), f"{name}.")
    own = {key: value for key, value in holder.items() if value is not None}
    fields.refuse_others(own, ("name", "schema", "strict"), f"{name}.json_schema.")
    fields.flag(own, "strict")  # the schema is followed either way
    return holder["schema"]


def _prompt(body: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """Token ids of the messages, by the model's template, up to where the assistant speaks."""
    written = body.get("messages")
    if not isinstance(written, list) or not written:
        got = "none" if written is None else json.dumps(written)
        raise bad_field("messages", "a list of at least one message", got, "correct it")
    messages = [_message(one, f"messages[{place}]") for place, one in enumerate(written)]
    if not getattr(tokenizer, "chat_template", None):
        hint = "use /v1/completions, or a checkpoint that was trained to chat"
        message = f"messages: expected a model with a chat template, got one without; {hint}"
        raise Refusal(400, message, param="messages", code="no_chat_template")
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise bad_field("messages", "what the model's chat template takes", error, "correct them") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _message(written: Any, place: str) -> dict[str, str]:
    if not isinstance(written, dict):
        raise bad_field(place, "an object with role and content", json.dumps(written), "correct it")
    own = {name: value for name, value in written.items() if value is not None}
    fields.refuse_others(own, ("role", "content"), f"{place}.")
    role, content = own.get("role"), own.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise bad_field(f"{place}.role", f"one of {', '.join(ROLES)}", json.dumps(role), "correct it")
    if isinstance(content, list):
        content = "".join(_part(one, f"{place}.content[{number}]") for number, one in enumerate(content))
    if not isinstance(content, str):
        raise bad_field(f"{place}.content", "a string or a list of text parts", json.dumps(content), "correct it")
    return {"role": ROLES[role], "content": content}


def _part(written: Any, place: str) -> str:
    if not isinstance(written, dict) or written.get("type") != "text" or not isinstance(written.get("text"), str):
        raise bad_field(place, '{"type": "text", "text": ...}', json.dumps(written), "only text is understood")
    fields.refuse_others(written, ("type", "text"), f"{place}.")
    return str(written["text"])


__all__ = ["Chat"]
