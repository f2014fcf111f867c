"""A request from its prompt to its record: text, ends, limits, figures, and prompts that cannot be served."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.engine import Finished, Runner, Sampling, Token, generate
from hasten.errors import ArgumentError
from tests.engine.tiny_tokenizers import byte_level
from tests.models.tiny import GENERATORS

TOKENIZER = byte_level()
BY_NAME = {one.name: one for one in GENERATORS}
PROMPT = "def add(a, b):"


def build(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{"vocab_size": len(TOKENIZER), "max_position_embeddings": 128, "eos_token_id": None, **sizes, **options}
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    return model


def run(model=None, prompt=PROMPT, tokenizer=TOKENIZER, use_cache=True, **options):
    """(events but the last, the last)"""
    sampling = Sampling(**{"max_tokens": 24, **options})
    *events, last = generate(build() if model is None else model, tokenizer, prompt, sampling, use_cache=use_cache)
    return events, last


class Scripted:
    """A model for the runner's place that wants to say certain tokens."""

    def __init__(self, text, end=()):
        self.script = [*TOKENIZER.encode(text, add_special_tokens=False), *end]

    def runner(self):
        runner = Runner(build())
        steps = iter(self.script)

        def logits(*ignored):
            return torch.nn.functional.one_hot(torch.tensor(next(steps)), len(TOKENIZER)).float()

        runner.begin, runner.next = logits, logits
        runner.cache_bytes_per_token = lambda: 0
        return runner


def test_events_add_up_to_the_record():
    events, last = run()
    assert all(isinstance(event, Token) for event in events) and isinstance(last, Finished)
    assert last.token_ids == tuple(event.id for event in events) and len(events) == 24
    assert last.text == "".join(event.text for event in events) == TOKENIZER.decode(last.token_ids)
    assert (last.finish_reason, last.stopped_by) == ("length", None)
    assert last.prompt_tokens == len(TOKENIZER(PROMPT)["input_ids"])


def test_figures():
    model = build()
    _, last = run(model)
    assert last.ttft_s > 0 and last.decode_s > 0
    assert last.tokens_per_s == pytest.approx(23 / last.decode_s)
    assert last.cache_capacity == last.prompt_tokens + 24
    assert last.cache_bytes_per_token == 2 * 2 * 32 * 4
    assert last.cache_bytes == last.cache_bytes_per_token * last.cache_capacity
    assert last.num_positions == last.prompt_tokens + 23
    assert (last.path, last.dtype, last.device) == ("recorded step", "float32", "cpu")


def test_without_a_cache_the_tokens_are_the_same_and_the_work_is_counted():
    model = build()
    with_cache, without = run(model)[1], run(model, use_cache=False)[1]
    assert without.token_ids == with_cache.token_ids
    assert without.cache_bytes == without.cache_capacity == 0
    assert without.cache_bytes_per_token == with_cache.cache_bytes_per_token
    length = without.prompt_tokens
    assert without.num_positions == sum(range(length, length + 24)) and without.path == "no KV cache"


def test_the_seed_of_a_draw_is_told_so_that_it_can_be_given_again():
    model = build()
    _, drawn = run(model, temperature=1.5)
    assert run(model, temperature=1.5, seed=drawn.seed)[1].token_ids == drawn.token_ids
    assert run(model)[1].seed is None


def test_one_token_has_no_speed():
    _, last = run(max_tokens=1)
    assert last.tokens_per_s is None and last.decode_s == 0 and last.path == "prompt only"


@pytest.mark.parametrize("kind", ["eos", "stop_id"])
def test_an_end_token_ends_the_text_and_is_not_in_it(kind):
    model = build()
    _, full = run(model)
    end = full.token_ids[5]
    at = full.token_ids.index(end)
    options = {"stop_ids": (end,)} if kind == "stop_id" else {}
    if kind == "eos":
        model.generation_config.eos_token_id = [end, 299]
    events, last = run(model, **options)
    assert last.token_ids == full.token_ids[: at + 1] and len(events) == at + 1
    assert (last.finish_reason, last.stopped_by) == ("stop", end)
    assert last.text == TOKENIZER.decode(full.token_ids[:at])


def test_an_end_token_of_several_ids_equals_transformers():
    model = build()
    _, full = run(model)
    model.generation_config.eos_token_id = [full.token_ids[7], full.token_ids[4]]
    ids = torch.tensor([TOKENIZER(PROMPT)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert list(run(model)[1].token_ids) == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("script", "stop", "text", "stopped_by"),
    [
        ("one two END three", ("END",), "one two ", "END"),
        ("one two EN", ("END",), "one two EN", None),
        ("one two ENtwo", ("END", "Nt"), "one two E", "Nt"),
        ("fox jumps", ("ox",), "f", "ox"),
        ("😀 中 😀", ("中",), "😀 ", "中"),
    ],
)
def test_stop_strings(script, stop, text, stopped_by):
    scripted = Scripted(script)
    events, last = run(scripted.runner(), stop=stop, max_tokens=len(scripted.script))
    assert (last.text, last.stopped_by) == (text, stopped_by)
    assert last.finish_reason == ("length" if stopped_by is None else "stop")
    shown = ""
    for event in events:
        shown += event.text
        assert text.startswith(shown)


def test_a_stop_string_that_ends_the_last_token_counts():
    scripted = Scripted("the END")
    _, last = run(scripted.runner(), stop=("END",), max_tokens=len(scripted.script))
    assert (last.finish_reason, last.text) == ("stop", "the ")


def test_characters_come_whole():
    text = "a😀é中🏳️‍🌈!"
    scripted = Scripted(text)
    events, last = run(scripted.runner(), max_tokens=len(scripted.script))
    assert last.text == text and not any("\N{REPLACEMENT CHARACTER}" in event.text for event in events)


def test_an_unfinished_character_is_shown_at_the_end_only():
    scripted = Scripted("a😀")
    events, last = run(scripted.runner(), max_tokens=len(scripted.script) - 1)
    assert last.text == "a\N{REPLACEMENT CHARACTER}" and events[-1].text == "\N{REPLACEMENT CHARACTER}"


def test_held_text_comes_with_the_end_token():
    scripted = Scripted("ab EN", end=[TOKENIZER.eos_token_id])
    events, last = run(scripted.runner(), stop=("END",), stop_ids=(TOKENIZER.eos_token_id,))
    assert last.text == "ab EN" and events[-1].text == "EN" and last.stopped_by == TOKENIZER.eos_token_id


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_reads_the_prompt(name):
    model = BY_NAME[name].build()
    prompt = [5, 9, 11, 30]
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 4, dtype=int), max_new_tokens=20)
    _, last = run(model, prompt=prompt, tokenizer=None, max_tokens=20)
    assert list(last.token_ids) == out[0, 1:].tolist() and last.prompt_tokens == 4


def test_ids_need_no_tokenizer():
    ids = TOKENIZER(PROMPT)["input_ids"]
    model = build()
    events, last = run(model, prompt=ids, tokenizer=None)
    assert last.token_ids == run(model)[1].token_ids and last.text == "" and not any(event.text for event in events)


def test_the_context_ends_the_text():
    model = build(max_position_embeddings=32)
    ids = [5] * 28
    _, last = run(model, prompt=ids, tokenizer=None)
    assert len(last.token_ids) == 4 and last.finish_reason == "length"


def test_a_runner_serves_request_after_request():
    runner = Runner(build())
    assert run(runner)[1].token_ids == run(runner)[1].token_ids == run(build())[1].token_ids


def test_a_chat_uses_the_template():
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.content }}\n{% endfor %}"
    model = build()
    *_, last = generate(model, tokenizer, "hi", Sampling(max_tokens=3), is_chat=True)
    *_, direct = generate(model, None, tokenizer("<bos>hi\n")["input_ids"], Sampling(max_tokens=3))
    assert last.token_ids == direct.token_ids


BAD = {
    "empty_text": ({"prompt": ""}, "prompt: expected at least one token, got ''"),
    "empty_ids": ({"prompt": []}, "prompt: expected at least one token, got []"),
    "text_without_tokenizer": ({"tokenizer": None}, "prompt: expected token ids, since there is no tokenizer"),
    "stop_without_tokenizer": ({"tokenizer": None, "prompt": [5], "stop": ("x",)}, "stop: expected no strings"),
    "unknown_id": ({"prompt": [5, 300]}, "prompt: expected token ids from 0 to 299, got 300"),
    "negative_id": ({"prompt": [-1]}, "prompt: expected token ids from 0 to 299, got -1"),
    "too_long": ({"prompt": [5] * 128}, "prompt: expected at most 127 tokens, for a context of 128, got 128 tokens"),
    "far_too_long": ({"prompt": "word " * 400}, "prompt: expected at most 127 tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_prompt_that_cannot_be_served_is_named_before_anything_runs(case):
    options, message = BAD[case]
    options = dict(options)
    given = {name: options.pop(name) for name in ("prompt", "tokenizer") if name in options}
    with pytest.raises(ArgumentError) as caught:
        generate(build(), given.get("tokenizer", TOKENIZER), given.get("prompt", PROMPT), Sampling(**options))
    assert str(caught.value).startswith(message)


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(ArgumentError, match="chat: expected a checkpoint with a chat template, got one without"):
        generate(build(), TOKENIZER, "hi", is_chat=True)


def test_logits_that_are_no_numbers_are_told():
    model = build()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ArgumentError, match="model: expected logits that are numbers, got NaN; try dtype float32"):
        run(model)


def test_grad_mode_is_the_callers_between_events():
    events = generate(build(), TOKENIZER, PROMPT, Sampling(max_tokens=4))
    for _ in events:
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
