"""What a request asks of the choice of tokens, and the chooser that obeys it.

The order of operations is that of transformers' `generate`, whose processors do them. Called by `generate`;
knows logits and token ids, and no text.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import transformers
from torch import Tensor

from hasten.engine.lookup import MOST
from hasten.engine.penalties import Bias, Penalties
from hasten.errors import ArgumentError, ArgumentTypeError, CheckpointError

MAX_SEED = 2**63 - 1
MAX_CHOICES = 128
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen and where the text ends.

    max_tokens: at most that many new tokens. temperature: 0 takes the likeliest token; above, logits are divided
    by it. top_k: only the k likeliest; top_p: the fewest that hold this probability; min_p: those at least this
    fraction as likely as the likeliest. repetition_penalty: above 1 makes tokens of the prompt and the text less
    likely; None is the checkpoint's own, 1 if it has none. Order: repetition_penalty, the checkpoint's rules
    (tokens it forces or suppresses), temperature, top_k, top_p, min_p, then a draw.

    logit_bias: added to the logits of these tokens, {id: bias}. presence_penalty: taken from the logits of tokens that
    are in the new text; frequency_penalty: that, times how often. They come before all of the above.

    seed: same seed, same tokens, whatever else runs; None draws one. n: how many continuations of one prompt; that
    of index i draws by seed + i. stop: strings that end the text and are not part of it. stop_ids: tokens that do,
    beside the checkpoint's own end tokens. logprobs: also tell the log probability of each new token and of so many
    of the likeliest in its place; prompt_logprobs: the same for the prompt. They are the model's own, before
    anything here changes them.

    json_schema (a mapping or its JSON text), regex, grammar (in llguidance's Lark): at most one, which the new text
    then follows; needs the extra `structured`.

    prompt_lookup_num_tokens: so many next tokens are guessed from where the last few occurred before, and computed at
    once; what is chosen is the same. 0 guesses none, None is as many as the engine says.

    num_beams: more than 1 is beam search, as in transformers' `generate`: no draws, no n, and the texts come when all
    are done. num_return_sequences: how many of the beams, best first. length_penalty: scores are divided by length to
    its power. early_stopping: True ends as soon as there are num_beams texts, False where better ones are unlikely,
    "never" where there can be none.

    Raises ArgumentError for a value out of range, and for a limit on a draw that does not take place.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    prompt_lookup_num_tokens: int | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1)
        _check_number("temperature", self.temperature, "at least 0", lambda value: value >= 0)
        _check_int("top_k", self.top_k, 1)
        _check_number("top_p", self.top_p, "more than 0, at most 1", lambda value: 0 < value <= 1)
        _check_number("min_p", self.min_p, "0 to 1", lambda value: 0 <= value <= 1)
        _check_number("repetition_penalty", self.repetition_penalty, "more than 0", lambda value: value > 0)
        _check_int("seed", self.seed, 0, MAX_SEED)
        _check_int("n", self.n, 1, MAX_CHOICES)
        _check_int("prompt_lookup_num_tokens", self.prompt_lookup_num_tokens, 0, MOST)
        for name in ("logprobs", "prompt_logprobs"):
            _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), "-2 to 2", lambda value: -2 <= value <= 2)
        _check_bias(self.logit_bias)
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ArgumentError(given[1], f"nothing beside {given[0]}", "both", "give one of them")
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                got = f"{name} with temperature 0, which takes the likeliest token"
                raise ArgumentError(name, "a temperature above 0", got, f"give a temperature, or leave {name} out")
        for name, kind in (("stop", str), ("stop_ids", int)):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise ArgumentTypeError(name, "a tuple", repr(values), "write (value,) for one")
            object.__setattr__(self, name, tuple(values))
            for value in values:
                is_good = value != "" if isinstance(value, str) else isinstance(value, int) and value >= 0
                if not isinstance(value, kind) or isinstance(value, bool) or not is_good:
                    expected = "strings that are not empty" if kind is str else "token ids >= 0"
                    raise ArgumentError(name, expected, repr(value), "correct or remove it")
        _check_beams(self)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Sampling:
        """A sampling from names and values; raises ArgumentError for a name that it does not have."""
        known = [one.name for one in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"did you mean {near[0]}?" if near else "remove it"
                raise ArgumentError(str(name), f"a field of Sampling: {', '.join(known)}", "no such field", hint)
        return cls(**options)


class Chooser:
    """Chooses the tokens of one request, with a random generator of its own.

    rules: the checkpoint's generation configuration. num_prompt: tokens the model is given, of the decoder.
    last_position: tokens there will be at most, prompt included. first: processors that come before all others.
    """

    def __init__(
        self,
        sampling: Sampling,
        rules: Any,
        num_prompt: int,
        last_position: int,
        device: torch.device,
        first: Sequence[Any] = (),
    ) -> None:
        self.sampling = sampling
        own = processors(sampling, rules, num_prompt, last_position, device)
        self.processors = transformers.LogitsProcessorList([*first, *own])
        self.generator = torch.Generator(device)
        self.seed = self.generator.seed() & MAX_SEED if sampling.seed is None else sampling.seed
        self.generator.manual_seed(self.seed)

    @torch.inference_mode()
    def choose(self, logits: Tensor, ids: Sequence[int]) -> int:
        """The next token after `ids`, the decoder's tokens so far, from logits (vocab,)."""
        if self.processors:
            history = torch.tensor([list(ids)], device=logits.device)
            logits = self.processors(history, logits[None].float())[0]
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        return int(draw(torch.softmax(logits.float(), -1)[None], [self.generator]))


def draw(
    probabilities: Tensor, generators: Sequence[torch.Generator], marks: Sequence[list[Tensor] | None] | None = None
) -> Tensor:
    """One token for each row of probabilities (rows, vocab), each from its own generator; int64 (rows,).

    What `torch.multinomial` does, a row at a time: the same tokens, whatever the other rows are. marks: lists to which
    the state of the generator after each draw is added.
    """
    noise = torch.empty_like(probabilities)
    marks = [None] * len(noise) if marks is None else marks
    for row, generator, mark in zip(noise, generators, marks, strict=True):
        row.exponential_(generator=generator)
        if mark is not None:
            mark.append(generator.get_state())
    return (probabilities / noise).argmax(-1)


def processors(
    sampling: Sampling, rules: Any, num_prompt: int, last_position: int, device: torch.device
) -> transformers.LogitsProcessorList:
    """The processors of logits (batch, vocab) that a request needs, in the order of transformers' `generate`.

    Arguments as for `Chooser`. Raises CheckpointError if the checkpoint asks for a rule that is not among them.
    """
    _refuse_other_rules(rules)
    penalty = sampling.repetition_penalty
    penalty = penalty if penalty is not None else getattr(rules, "repetition_penalty", None)
    ends = torch.tensor(end_ids(rules), device=device)
    found: list[Any] = []

    def add(kind: Any, value: Any, *arguments: Any, **options: Any) -> None:
        if value is not None and value is not False:
            found.append(kind(*arguments, **options))

    t = transformers
    add(Bias, sampling.logit_bias or None, sampling.logit_bias, device)
    penalties = (sampling.presence_penalty, sampling.frequency_penalty)
    add(Penalties, True if any(penalties) else None, num_prompt, *penalties)
    add(t.RepetitionPenaltyLogitsProcessor, None if penalty == 1.0 else penalty, penalty)
    size = _rule(rules, "no_repeat_ngram_size")
    add(t.NoRepeatNGramLogitsProcessor, size or None, size)
    words = _rule(rules, "bad_words_ids")
    add(t.NoBadWordsLogitsProcessor, words, words, ends)
    least = (_rule(rules, "min_length") or 0) if len(ends) else 0
    add(t.MinLengthLogitsProcessor, least or None, least, ends, device=str(device))
    least = (_rule(rules, "min_new_tokens") or 0) if len(ends) else 0
    add(t.MinNewTokensLengthLogitsProcessor, least or None, num_prompt, least, ends, device=str(device))
    first, last = _rule(rules, "forced_bos_token_id"), _rule(rules, "forced_eos_token_id")
    add(t.ForcedBOSTokenLogitsProcessor, first, first)
    add(t.ForcedEOSTokenLogitsProcessor, last, last_position, last, device=str(device))
    suppressed = _rule(rules, "suppress_tokens")
    add(t.SuppressTokensLogitsProcessor, suppressed, suppressed, device=str(device))
    suppressed, begin = _rule(rules, "begin_suppress_tokens"), num_prompt + int(num_prompt == 1 and first is not None)
    add(t.SuppressTokensAtBeginLogitsProcessor, suppressed, suppressed, begin, device=str(device))
    if sampling.temperature > 0:
        heat = sampling.temperature
        add(t.TemperatureLogitsWarper, None if heat == 1.0 else heat, float(heat))
        add(t.TopKLogitsWarper, sampling.top_k, sampling.top_k)
        add(t.TopPLogitsWarper, None if sampling.top_p == 1.0 else sampling.top_p, sampling.top_p)
        add(t.MinPLogitsWarper, sampling.min_p, sampling.min_p)
    return transformers.LogitsProcessorList(found)


def end_ids(rules: Any) -> list[int]:
    """The tokens with which a checkpoint ends a text, from its generation configuration."""
    ends = getattr(rules, "eos_token_id", None)
    return [] if ends is None else [int(ends)] if isinstance(ends, int) else [int(end) for end in ends]


# rules of a generation configuration that change what greedy decoding gives, and the value that means "not used"
_OTHER_RULES = {
    "sequence_bias": None,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
    "watermarking_config": None,
}


def _refuse_other_rules(rules: Any) -> None:
    for name, unused in _OTHER_RULES.items():
        value = _rule(rules, name)
        if value is not None and value != unused:
            problem = f"its generation_config.json asks for {name} {value!r}, which is not supported"
            raise CheckpointError(getattr(rules, "_name_or_path", None) or "model", problem, f"remove {name} from it")


def _rule(rules: Any, name: str) -> Any:
    return getattr(rules, name, None)


def _check_int(name: str, value: int | None, least: int, most: int | None = None) -> None:
    if value is None and name != "max_tokens":
        return
    expected = f"an int >= {least}" if most is None else f"an int from {least} to {most}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentTypeError(name, expected, repr(value), "write a whole number")
    if value < least or (most is not None and value > most):
        raise ArgumentError(name, expected, value, "choose a value in that range")


def _check_number(name: str, value: float | None, expected: str, is_in_range: Any) -> None:
    if value is None and name not in ("temperature", "presence_penalty", "frequency_penalty", "length_penalty"):
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ArgumentTypeError(name, f"a number, {expected}", repr(value), "write a number")
    if not math.isfinite(value) or not is_in_range(value):
        raise ArgumentError(name, f"a number, {expected}", value, "choose a value in that range")


# what goes with beam search only, and what does not go with it, with the value that means "not used"
_OF_BEAMS = {"num_return_sequences": 1, "length_penalty": 1.0, "early_stopping": False}
_NOT_OF_BEAMS = {"temperature": 0.0, "n": 1, "stop": (), "logprobs": None, "json_schema": None, "regex": None}
_NOT_OF_BEAMS |= {"grammar": None, "prompt_lookup_num_tokens": None}


def _check_beams(sampling: Sampling) -> None:
    _check_int("num_beams", sampling.num_beams, 1, MAX_CHOICES)
    _check_int("num_return_sequences", sampling.num_return_sequences, 1, MAX_CHOICES)
    _check_number("length_penalty", sampling.length_penalty, "a finite one", lambda value: True)
    if not isinstance(sampling.early_stopping, bool) and sampling.early_stopping != "never":
        raise ArgumentError("early_stopping", "True, False or 'never'", repr(sampling.early_stopping), "choose one")
    is_beam_search = sampling.num_beams > 1
    for name, unused in (_NOT_OF_BEAMS if is_beam_search else _OF_BEAMS).items():
        value = getattr(sampling, name)
        if value != unused and (name, value) != ("prompt_lookup_num_tokens", 0):
            beside = f"num_beams {sampling.num_beams}"
            raise ArgumentError(name, f"{unused!r} beside {beside}", repr(value), f"leave it out or change {beside}")
    if sampling.num_return_sequences > sampling.num_beams:
        expected = f"at most num_beams, {sampling.num_beams}"
        raise ArgumentError("num_return_sequences", expected, sampling.num_return_sequences, "ask for fewer")


def _check_bias(bias: Mapping[int, float]) -> None:
    if not isinstance(bias, Mapping):
        raise ArgumentTypeError("logit_bias", "a mapping {token id: bias}", repr(bias), "write {id: number}")
    for token, value in bias.items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ArgumentError("logit_bias", "token ids >= 0", repr(token), "correct or remove it")
        _check_number("logit_bias", value, "-100 to 100", lambda value: -100 <= value <= 100)
