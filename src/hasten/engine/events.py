"""What comes out of a generation: a `Token` for each new one, and `Finished` or `Failed` at the end."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.cache.reasons import Explanation
from hasten.errors import HastenError


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """The log probability of a token, and the likeliest tokens in its place with theirs, the likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Token:
    """One new token, and the text that may be shown since: whole characters, no part of a stop string.

    index: of the continuation, where a request has several. logprobs: if asked for.
    """

    id: int
    text: str
    index: int = 0
    logprobs: Logprobs | None = None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The record of a request, after its last token.

    finish_reason: "stop" (an end token, a stop id or a stop string, named by `stopped_by`) or "length"; from an engine
    also "cancelled" and "deadline".
    token_ids: all new tokens, the end token or stop id with them, as transformers counts. text: without them.
    ttft_s: seconds until the first token was chosen. tokens_per_s: of the tokens after it; None if there are
    none. Both count the work, not the time the caller took between events. cache_bytes: what was allocated, for
    `cache_capacity` tokens; 0 without a cache. cache_bytes_per_token: what a token takes in a cache.
    num_positions: tokens that went through the model. path: how the last step was computed. seed: of the
    draws, None if there were none. index, logprobs: as in `Token`, of all tokens. prompt_logprobs: None for the first
    token of the prompt, which nothing comes before. num_preemptions: how often it had to be computed again.
    num_drafted, num_accepted: tokens that were computed as a guess, and those of them that came true. score: of beam
    search, the sum of log probabilities over length ** length_penalty.
    cached_tokens: of the prompt, that were not computed because a prompt cache had them; explanation: why no more.
    restored_tokens: of these, that came from host memory or disk.
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
    index: int = 0
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[Logprobs | None, ...] = ()
    num_preemptions: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    score: float | None = None
    cached_tokens: int = 0
    restored_tokens: int = 0
    explanation: Explanation | None = None


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A request that could not be served, and why; no other request is touched."""

    error: HastenError


__all__ = ["Failed", "Finished", "Logprobs", "Token"]
