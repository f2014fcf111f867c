"""Structured output: which tokens a JSON schema, a regular expression or a grammar allows next.

The grammar engine is llguidance (extra `structured`); this is its place among the logits processors of a request.
Called by the engine; knows no model.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.engine.sampling import Sampling
from hasten.errors import ArgumentError, MissingExtraError

#: fields of Sampling of which at most one is given
FIELDS = ("json_schema", "regex", "grammar")

# as json.dumps writes: where any white space may come, a model can write nothing else for ever
_AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def field_of(sampling: Sampling) -> str | None:
    """Which of the fields a sampling has, or None."""
    return next((name for name in FIELDS if getattr(sampling, name) is not None), None)


class Grammars:
    """Grammars over one tokenizer, which is read once (a second for a large vocabulary), when first needed."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._read: Any = None

    def make(self, sampling: Sampling, num_prompt: int, ends: Sequence[int]) -> Grammar | None:
        """The processor for a request, None if it has no grammar. ends: tokens that may end a finished text.

        Raises ArgumentError that names the field for a grammar that is none, or without a tokenizer or an end token;
        MissingExtraError without llguidance.
        """
        name = field_of(sampling)
        if name is None:
            return None
        try:
            library = importlib.import_module("llguidance")
        except ImportError as error:
            raise MissingExtraError("structured", name) from error
        if not hasattr(self._tokenizer, "backend_tokenizer"):
            raise ArgumentError(name, "a fast tokenizer beside it", type(self._tokenizer).__name__, "pass one")
        if not ends:
            hint = "set eos_token_id in the generation configuration, or give stop_ids"
            raise ArgumentError(name, "a token with which the text can end", "none", hint)
        if self._read is None:
            from_hf = importlib.import_module("llguidance.hf").from_tokenizer
            self._read = from_hf(self._tokenizer, n_vocab=self._vocab_size, eos_token=list(ends))
        matcher = library.LLMatcher(self._read, _compile(library.LLMatcher, name, getattr(sampling, name)), log_level=0)
        if matcher.is_error():
            problem = " ".join(matcher.get_error().split())[:200]
            raise ArgumentError(name, "what llguidance can follow", problem, "correct it")
        return Grammar(matcher, num_prompt)


class Grammar:
    """Hides the tokens that the text so far does not allow; a logits processor of one request."""

    def __init__(self, matcher: Any, num_prompt: int) -> None:
        self._matcher, self._num_prompt = matcher, num_prompt
        self._read: list[int] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (1, vocab) after the tokens ids (1, length); raises ArgumentError where no token is left."""
        self._follow(ids[0, self._num_prompt :].tolist())
        if self._matcher.is_error():
            got = " ".join(self._matcher.get_error().split())[:200]
            raise ArgumentError("grammar", "a text that it allows", got, "simplify it")
        # bit i % 8 of byte i // 8 says whether token i may come
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[: scores.shape[1]].bool()
        allowed = torch.nn.functional.pad(allowed, (0, scores.shape[1] - len(allowed)))
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def num_allowed(self, ids: Sequence[int], draft: Sequence[int]) -> int:
        """How many tokens of a draft may come after the tokens `ids`, of the prompt and new ones."""
        self._follow(list(ids[self._num_prompt :]))
        return 0 if self._matcher.is_error() else int(self._matcher.validate_tokens(list(draft)))

    def _follow(self, text: list[int]) -> None:
        """Let the matcher have read these new tokens: it takes back those of a draft that did not come."""
        pairs = enumerate(zip(self._read, text, strict=False))
        same = next((place for place, (old, new) in pairs if old != new), min(len(self._read), len(text)))
        if same < len(self._read):
            self._matcher.rollback(len(self._read) - same)
        if same < len(text):
            self._matcher.consume_tokens(text[same:])
        self._read = text


def _compile(matcher: Any, name: str, value: Any) -> str:
    try:
        if name == "json_schema":
            text = value if isinstance(value, str) else json.dumps(value)
            return str(matcher.grammar_from_json_schema(text, defaults=_AS_DUMPED))
        return str(matcher.grammar_from_regex(value) if name == "regex" else matcher.grammar_from_lark(value))
    except (TypeError, ValueError) as error:
        raise ArgumentError(name, "what llguidance can follow", str(error)[:200], "correct it") from error


__all__ = ["FIELDS", "Grammar", "Grammars", "field_of"]
