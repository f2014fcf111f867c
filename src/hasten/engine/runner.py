"""Runs a model for one request: the prompt at once, then a token at a time, with a KV cache or without.

Called by `generate`; returns logits and knows nothing of text or sampling. The first step after the prompt is
recorded (step.py) and the second one is checked against the model's own forward; a model that cannot be
recorded, or whose recording differs, goes on with its own forward, and `path` says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hasten.cache import EncoderDecoderKVCache, KVCache, allocate
from hasten.engine import step
from hasten.engine.recorder import NotRecordable
from hasten.engine.step import RecordedStep

FEW_TOKENS = 64
# how far the recorded step's logits may be from the forward's, relative to the largest
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_TOLERANCE_OF_HALVES = 5e-2


class Runner:
    """One transformers model and the cache of the request it works on; requests follow each other.

    model: with a language-modelling head, decoder-only or encoder-decoder, in evaluation mode. use_cache=False
    computes all tokens again at every step. can_record=False keeps to the model's own forward. may_lay_out
    lets the weights be moved in memory, their values, shapes and names unchanged (layout.py). step_threads: CPU
    threads of PyTorch for forwards of at most 64 tokens; None leaves its number as it is.

    A recorded step reads the weights where they are; what the model computes from weights alone (1 + weight in
    Gemma's norms) is taken once, so after a change of weights use a new Runner.
    """

    def __init__(
        self,
        model: Any,
        *,
        use_cache: bool = True,
        can_record: bool = True,
        may_lay_out: bool = False,
        step_threads: int | None = None,
    ) -> None:
        self.model, self.step_threads = model, step_threads
        self.use_cache, self.can_record, self.may_lay_out = use_cache, can_record, may_lay_out
        self.cache: KVCache | EncoderDecoderKVCache | None = None
        self.num_positions = 0  # tokens that went through the model for this request, the prompt's with them
        self.path = "prompt only"  # how the last step was computed
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self._ids: list[int] = []
        self._encoded: Any = None
        self._step: RecordedStep | None = None
        self._geometry: tuple[int, int] | None = None  # what the step was recorded for
        self._is_checked = False
        self._why_not = ""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def warm_up(self) -> None:
        """Record the decode step before the first request, so that no request pays for it.

        Runs three tokens. Does nothing where a recorded step serves one request only (encoder-decoder models), is
        not wanted, or saves less than it costs (weights of more than 2 GiB, which are read three times).
        """
        is_small = sum(parameter.nbytes for parameter in self.model.parameters()) <= 2 * 2**30
        if self.use_cache and self.can_record and is_small and not self._is_encoder_decoder:
            self.begin([0], [], 3)
            self.next(0)
            self.next(0)

    @torch.inference_mode()
    def begin(self, prompt: Sequence[int], first: Sequence[int], max_tokens: int) -> Tensor:
        """Logits (vocab,) of the first new token, for a request of at most `max_tokens` of them.

        prompt: what a decoder continues, or what an encoder reads; `first` then are the decoder's own first
        tokens (empty for a decoder-only model).
        """
        self._encoded, self.num_positions, self.cache, self.path = None, 0, None, "prompt only"
        self._ids = list(first if self._is_encoder_decoder else prompt)
        if self.use_cache:
            self.cache = allocate(self.model.config, len(self._ids) + max_tokens, len(prompt))
        with self._threads(len(prompt)):
            if self._is_encoder_decoder:
                self._encoded = self.model.get_encoder()(input_ids=self._tensor(prompt))
                self.num_positions += len(prompt)
            return self._forward(self._ids)

    @torch.inference_mode()
    def next(self, token: int) -> Tensor:
        """Logits (vocab,) of the token after `token`, which follows all before it."""
        self._ids.append(token)
        if self.cache is None:
            self.path = "no KV cache"
            return self._forward(self._ids)
        with self._threads(1):
            return self._step_with(token, self.cache)

    @contextmanager
    def _threads(self, num_tokens: int) -> Iterator[None]:
        """With as many threads of PyTorch as a forward of so many tokens should have."""
        before = torch.get_num_threads()
        if self.step_threads is not None and num_tokens <= FEW_TOKENS:
            torch.set_num_threads(self.step_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _step_with(self, token: int, cache: KVCache | EncoderDecoderKVCache) -> Tensor:
        """One step over the cache, in the way that is known to work or is now to be tried."""
        if self.can_record and self._geometry != self._geometry_of(cache):
            return self._record(token, cache)
        if self._step is None:
            self.path = "the model's own forward" + (f": {self._why_not}" if self._why_not else "")
            return self._forward([token])
        self.path = "recorded step"
        if not self._is_checked:
            return self._check(token, cache, self._step)
        self.num_positions += 1
        return self._step(token, cache).view(-1)

    @torch.inference_mode()
    def cache_bytes_per_token(self) -> int:
        """What one token takes in the decoder's KV cache; without a cache, found by giving one token to a small one."""
        cache = self.cache
        if cache is None:
            cache = allocate(self.model.config, 1, max(1, len(self._ids)))
            if isinstance(cache, EncoderDecoderKVCache):
                cache = EncoderDecoderKVCache(1, self._encoded.last_hidden_state.shape[1])
            self._call(self._tensor(self._ids[-1:]), cache)
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderKVCache) else cache
        return int(own.nbytes) // int(own.capacity)

    def _record(self, token: int, cache: KVCache | EncoderDecoderKVCache) -> Tensor:
        """The logits after `token` from the model's forward, which is recorded as it runs."""
        length, self._geometry = cache.length, self._geometry_of(cache)
        self._step, self._is_checked, self._why_not, self.path = None, False, "", "recorded step"
        try:
            most = self._geometry[0]
            logits, self._step = step.record(self._call, self.model, token, cache, most, self.may_lay_out)
        except (NotRecordable, RuntimeError, TypeError, ValueError, AttributeError) as error:
            # a model may trip over a position that is a tensor in its own way; its own forward tells what is true
            self._why_not = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            self.path = f"the model's own forward: {self._why_not}"
            cache.truncate(length)
            return self._forward([token])
        self.num_positions += 1
        return logits.view(-1)

    def _check(self, token: int, cache: KVCache | EncoderDecoderKVCache, recorded: RecordedStep) -> Tensor:
        """The logits after `token` from the model's forward; the recorded step is kept if it gives the same."""
        length = cache.length
        logits = recorded(token, cache).view(-1)
        cache.truncate(length)
        expected = self._forward([token])
        error = _distance(logits, expected)
        if not error <= _TOLERANCE.get(logits.dtype, _TOLERANCE_OF_HALVES):
            self._step, self._why_not = None, f"the recorded step's logits differ by {error:.1g}"
        self._is_checked = True
        return expected

    def _forward(self, ids: Sequence[int]) -> Tensor:
        """Logits (vocab,) of the last of `ids`, which follow what is cached, by the model's own forward."""
        self.num_positions += len(ids)
        return self._call(self._tensor(ids), self.cache)[0, -1]

    def _call(self, ids: Tensor, cache: Any, attention_mask: Any = None) -> Tensor:
        """Logits (1, seqlen or 1, vocab) of ids (1, seqlen)."""
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None}
        if self._takes_logits_to_keep:
            options["logits_to_keep"] = 1
        if self._is_encoder_decoder:
            options |= {"encoder_outputs": self._encoded, "decoder_attention_mask": attention_mask}
            logits: Tensor = self.model(decoder_input_ids=ids, **options).logits
        else:
            logits = self.model(input_ids=ids, attention_mask=attention_mask, **options).logits
        return logits

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.device)

    def _geometry_of(self, cache: KVCache | EncoderDecoderKVCache) -> tuple[int, int]:
        """(most tokens a cache can hold, tokens of the encoder): what shapes in a recorded step may depend on."""
        if isinstance(cache, EncoderDecoderKVCache):
            return cache.capacity, cache.cross_attention_cache.length
        return max(context_length(self.model.config) or 0, cache.capacity), 0


def context_length(config: Any) -> int | None:
    """How many tokens a model of this configuration can place, or None if it sets no limit."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def step_threads(model: Any) -> int | None:
    """CPU threads for small steps of a model: 1 if its weights take at most 64 MiB, else None (PyTorch's number).

    Such a step gains little from a second core that is free (docs/design/generation.md), and waits at every
    product for one that is not.
    """
    if next(model.parameters()).device.type != "cpu":
        return None
    return 1 if sum(parameter.nbytes for parameter in model.parameters()) <= 64 * 2**20 else None


def _distance(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
