"""Many requests at a time get the tokens each would get alone, whatever is cut, shared, preempted or broken off."""

from __future__ import annotations

import random
import threading
import time
from functools import cache

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.engine import Failed, Finished, Sampling, Token, generate
from hasten.engine.engine import Engine
from hasten.errors import ArgumentError, ArgumentTypeError, HastenError
from tests.engine.tiny_tokenizers import byte_level
from tests.models.tiny import ARCHITECTURES, DECODERS, VOCAB, tokens

TOKENIZER = byte_level()
BY_NAME = {one.name: one for one in ARCHITECTURES}
LENGTHS = (5, 16, 33, 1, 17, 31)
NEW = 12


@cache
def model(name="llama"):
    built = BY_NAME[name].build()
    built.generation_config.eos_token_id = None
    return built


@cache
def speaker():
    """A model for texts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=128, eos_token_id=None, **sizes)
    built = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    return built


def prompt(length, seed=None):
    return tokens(1, length, length if seed is None else seed)[0].tolist()


@cache
def of_transformers(name, length, seed=None):
    ids = torch.tensor([prompt(length, seed)])
    before = model(name).config._attn_implementation
    model(name).set_attn_implementation("eager")
    out = model(name).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    model(name).set_attn_implementation(before)
    return tuple(out[0, length:].tolist())


def engine(of=None, tokenizer=None, **options):
    return Engine(model() if of is None else of, tokenizer, **{"num_pages": 40, "max_running": 8, **options})


def run(made, prompts, *, stays_open=False, **options):
    """Records, once all is over and no page is lost."""
    records = made.generate(prompts, Sampling(**{"max_tokens": NEW, **options}))
    made.check_integrity()
    assert made.stats().num_free_pages == made.stats().num_pages
    if not stays_open:
        made.close()
    return records


def ids_of(records):
    return [one.token_ids for one in records]


@pytest.mark.parametrize("name", [one.name for one in DECODERS])
def test_tokens_equal_transformers_alone_and_among_32_others(name):
    with engine(model(name), max_batch_tokens=24) as made:
        assert ids_of(run(made, [prompt(33)], stays_open=True)) == [of_transformers(name, 33)]
        places = random.Random(0).sample(range(32 + len(LENGTHS)), 32 + len(LENGTHS))
        handles = {}
        for place in places:
            if place < len(LENGTHS):
                handles[place] = made.submit(prompt(LENGTHS[place]), Sampling(max_tokens=NEW))
            else:
                handles[place] = made.submit(prompt(3 + 7 * place % 20, 100 + place), Sampling(max_tokens=3))
        for place, length in enumerate(LENGTHS):
            assert handles[place].result()[0].token_ids == of_transformers(name, length)
        made.check_integrity()


@pytest.mark.parametrize("budget", range(1, 34))
def test_a_prompt_cut_at_every_token(budget):
    made = engine(model("gemma2"), max_batch_tokens=budget, max_running=1)
    assert ids_of(run(made, [prompt(33)])) == [of_transformers("gemma2", 33)]
    assert made.stats().num_steps == -(-33 // budget) + NEW - 1


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 47, 48, 49])
def test_prompts_that_end_at_a_page(length):
    assert ids_of(run(engine(), [prompt(length)])) == [of_transformers("llama", length)]


CHOICES = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7, "top_k": 20},
    "penalized": {"temperature": 1.0, "seed": 7, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "repeated": {"repetition_penalty": 1.7, "logit_bias": {5: 2.0}},
}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("choice", CHOICES)
def test_preemption_changes_no_token(name, choice):
    prompts = [prompt(length) for length in LENGTHS]
    ample = run(engine(model(name)), prompts, **CHOICES[choice], max_tokens=24)
    made = engine(model(name), num_pages=5, max_batch_tokens=16)
    short = run(made, prompts, **CHOICES[choice], max_tokens=24)
    assert made.stats().num_preemptions > 0 and sum(one.num_preemptions for one in short) > 0
    assert ids_of(short) == ids_of(ample)
    assert sum(one.num_preemptions for one in ample) == 0


@pytest.mark.parametrize("choice", CHOICES)
def test_many_requests_choose_as_one_at_a_time_does(choice):
    prompts = [prompt(length) for length in LENGTHS]
    single = [list(generate(model(), None, one, Sampling(max_tokens=NEW, **CHOICES[choice])))[-1] for one in prompts]
    assert ids_of(run(engine(), prompts, **CHOICES[choice])) == ids_of(single)


def test_a_seed_gives_the_same_tokens_alone_and_among_unseeded_ones_in_any_order():
    seeded = Sampling(max_tokens=NEW, temperature=1.2, seed=3)
    with engine() as made:
        (alone,) = made.generate([prompt(9)], seeded)
        for place in range(4):
            handles = [
                made.submit(prompt(9), seeded if other == place else Sampling(max_tokens=5 + other, temperature=1.0))
                for other in range(4)
            ]
            assert handles[place].result()[0].token_ids == alone.token_ids
        twice = made.generate([prompt(9), prompt(9)], Sampling(max_tokens=NEW, temperature=1.2))
        assert twice[0].token_ids != twice[1].token_ids and twice[0].seed != twice[1].seed
        (again,) = made.generate([prompt(9)], Sampling(max_tokens=NEW, temperature=1.2, seed=twice[0].seed))
        assert again.token_ids == twice[0].token_ids


@pytest.mark.parametrize("length", [9, 16, 33])
def test_forks_equal_separate_requests(length):
    drawn = {"temperature": 1.2, "top_p": 0.9}
    made = engine(model("gemma2"), max_batch_tokens=16)
    together = run(made, [prompt(length)], n=3, seed=5, stays_open=True, **drawn)
    assert made.stats().num_positions == length + 3 * (NEW - 1)  # the prompt once
    apart = [run(made, [prompt(length)], seed=5 + index, stays_open=True, **drawn)[0] for index in range(3)]
    assert ids_of(together) == ids_of(apart) and [one.index for one in together] == [0, 1, 2]
    made.close()
    short = engine(model("gemma2"), max_batch_tokens=16, num_pages=4)
    assert ids_of(run(short, [prompt(length)] * 2, n=3, seed=5, **drawn)) == 2 * ids_of(apart)
    assert length < 33 or short.stats().num_preemptions > 0


def test_forks_of_the_likeliest_tokens_are_alike():
    assert ids_of(run(engine(), [prompt(9)], n=3)) == [of_transformers("llama", 9)] * 3


class Hand:
    """An engine that steps when told, on a clock that stands."""

    def __init__(self, **options):
        self.engine, self.now, self.events = engine(**options), 0.0, {}
        self.core = self.engine._core
        self.core.clock = lambda: self.now

    def add(self, ids, timeout_s=None, **sampling):
        request = self.engine._request(ids, Sampling(**{"max_tokens": NEW, **sampling}), timeout_s)
        self.events[request.number] = []
        request.emit = self.events[request.number].append
        self.core.add(request)
        return request

    def step(self, times=1):
        for _ in range(times):
            self.core.step()
            self.core.check_integrity()

    def rest(self):
        while not self.core.is_idle:
            self.step()
        assert self.core.scheduler.is_idle and self.core.scheduler.ledger.num_free == self.core.runner.cache.num_pages
        self.engine.close()

    def ends(self, request):
        return [event.finish_reason for event in self.events[request.number] if isinstance(event, Finished)]


# steps before the end: waiting behind another, in the middle of a prompt, at its first tokens, well into the text
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("how", ["cancelled", "deadline"])
def test_a_request_can_be_broken_off_in_every_state(num_steps, num_choices, how):
    hand = Hand(max_batch_tokens=16, max_running=4)
    other = hand.add(prompt(5))
    request = hand.add(prompt(40), timeout_s=5.0, n=num_choices, temperature=1.0, seed=1)
    behind = hand.add(prompt(17))
    hand.step(num_steps)
    if how == "cancelled":
        hand.core.cancel(request.number)
        hand.core.cancel(request.number)
    else:
        hand.now = 5.0
    hand.rest()
    assert hand.ends(request) == [how] * num_choices
    for one, length in ((other, 5), (behind, 17)):
        assert hand.events[one.number][-1].token_ids == of_transformers("llama", length)
    record = hand.events[request.number][-1]
    shown = [
        event.id for event in hand.events[request.number] if isinstance(event, Token) and event.index == record.index
    ]
    assert list(record.token_ids) == shown


def test_what_waits_can_be_broken_off_and_what_is_over_stays():
    hand = Hand(max_running=1)
    first, waiting = hand.add(prompt(5)), hand.add(prompt(9))
    hand.step(2)
    hand.core.cancel(waiting.number)
    hand.rest()
    hand.core.cancel(first.number)
    assert hand.ends(waiting) == ["cancelled"] and hand.ends(first) == ["length"]
    assert hand.events[waiting.number][-1].token_ids == () and hand.events[waiting.number][-1].cache_bytes == 0


def test_a_preempted_request_can_be_broken_off():
    hand = Hand(num_pages=4, max_batch_tokens=16)
    requests = [hand.add(prompt(length), max_tokens=24) for length in (17, 16, 9)]
    while not hand.core.scheduler.num_preemptions:
        hand.step()
    (victim, *_) = hand.core.scheduler.waiting
    hand.core.cancel(victim.owner.request.number)
    hand.rest()
    assert sorted(reason for one in requests for reason in hand.ends(one)) == ["cancelled", "length", "length"]


def test_a_deadline_in_real_time():
    with engine(speaker(), TOKENIZER) as made:
        made.generate(["warm"], Sampling(max_tokens=2))
        (record,) = made.generate(["def"], Sampling(max_tokens=120), timeout_s=0.02)
        assert record.finish_reason in ("deadline", "length") and len(record.token_ids) <= 120


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_pages_of_8_bits_give_the_same_tokens_however_they_are_cut(name, kv_dtype):
    prompts = [prompt(length) for length in LENGTHS]
    ample = run(engine(model(name), kv_dtype=kv_dtype), prompts, n=2, temperature=1.0, seed=3)
    made = engine(model(name), kv_dtype=kv_dtype, num_pages=5, max_batch_tokens=16)
    assert ids_of(run(made, prompts, n=2, temperature=1.0, seed=3)) == ids_of(ample)
    assert made.stats().num_preemptions > 0 and ample[0].cache_bytes_per_token < 0.4 * 2 * 3 * 64 * 4
    full = run(engine(model(name)), prompts, prompt_logprobs=0, max_tokens=1)
    near = run(engine(model(name), kv_dtype=kv_dtype), prompts, prompt_logprobs=0, max_tokens=1)
    for one, other in zip(full, near, strict=True):
        for exact, close in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert close.logprob == pytest.approx(exact.logprob, abs=0.1 if kv_dtype == "int8" else 0.6)


def test_one_request_that_is_no_number_touches_no_other():
    broken = BY_NAME["llama"].build()
    broken.generation_config.eos_token_id = None
    expected = ids_of(run(engine(broken), [prompt(length) for length in LENGTHS]))
    with torch.no_grad():
        broken.model.embed_tokens.weight[66] = float("nan")
    good = [[token if token != 66 else 65 for token in prompt(length)] for length in LENGTHS]
    with engine(broken, num_pages=12) as made:
        expected = ids_of(run(made, good, stays_open=True, logit_bias={66: -100.0}))
        bad = [66, *prompt(20)]
        records = run(made, [good[0], bad, *good[1:], bad], stays_open=True, logit_bias={66: -100.0})
        failed = [one for one in records if isinstance(one, Failed)]
        assert len(failed) == 2 and "model: expected logits that are numbers, got NaN" in str(failed[0].error)
        assert [one.token_ids for one in records if isinstance(one, Finished)] == expected
        assert ids_of(run(made, good, stays_open=True, logit_bias={66: -100.0})) == expected  # in the same pages


def test_what_goes_wrong_between_steps_ends_its_request_alone(caplog):
    with engine() as made:
        add, cancel, seen = made._core.add, made._core.cancel, threading.Event()

        def fragile_add(request):
            if len(request.prompt) == 7:
                raise LookupError("seven")
            add(request)

        def fragile_cancel(number):
            if number in made._core.requests:
                raise RuntimeError("no way out")
            cancel(number)

        made._core.add, made._core.cancel = fragile_add, fragile_cancel
        with pytest.raises(HastenError, match="LookupError between two steps: seven"):
            made.submit(prompt(7), Sampling(max_tokens=4)).result()
        handle = made.submit(prompt(5), Sampling(max_tokens=200))
        next(handle.events())
        handle.cancel()
        with pytest.raises(HastenError, match="RuntimeError between two steps: no way out"):
            handle.result()
        made.between_steps(lambda: {}["nothing"])
        made.between_steps(seen.set)
        assert seen.wait(10) and "KeyError between two steps" in caplog.text
        made._core.cancel = cancel
        assert ids_of(run(made, [prompt(5)], stays_open=True)) == [of_transformers("llama", 5)]
        made.check_integrity()


def test_one_request_that_breaks_the_model_touches_no_other():
    with engine() as made:
        forward = made._core.runner._forward

        def fragile(batch):
            if (batch.ids == 66).any():
                raise IndexError("66 is\nnot a token")
            return forward(batch)

        made._core.runner._forward = fragile
        prompts = [[token if token != 66 else 65 for token in prompt(length)] for length in LENGTHS]
        seeded = {"temperature": 1.0, "seed": 2, "logit_bias": {66: -100.0}}
        expected = ids_of(run(made, prompts, stays_open=True, **seeded))
        records = run(made, [*prompts[:3], [5, 66], *prompts[3:]], stays_open=True, **seeded)
        assert str(records[3].error) == "model: IndexError in its forward: 66 is"
        assert ids_of([*records[:3], *records[4:]]) == expected


def test_events_are_those_of_one_request_at_a_time():
    text = {"max_tokens": 60, "temperature": 1.5, "seed": 4}  # odd bytes and all
    *expected, record = generate(speaker(), TOKENIZER, "def add(a, b):", Sampling(**text))
    with engine(speaker(), TOKENIZER) as made:
        beside = made.submit("the quick brown fox", Sampling(max_tokens=60))
        *events, last = made.stream("def add(a, b):", Sampling(**text))
        assert events == expected and "\N{REPLACEMENT CHARACTER}" in record.text
        assert (last.text, last.token_ids, last.finish_reason) == (record.text, record.token_ids, "length")
        assert last.prompt_tokens == record.prompt_tokens and last.num_positions == record.num_positions
        assert last.cache_bytes_per_token == record.cache_bytes_per_token and last.cache_capacity % 16 == 0
        assert last.cache_bytes == last.cache_capacity * last.cache_bytes_per_token
        assert last.ttft_s > 0 and last.tokens_per_s > 0 and last.seed == 4
        beside.cancel()


def test_a_stop_string_ends_one_request_and_is_never_shown():
    with engine(speaker(), TOKENIZER) as made:
        (full,) = made.generate(["def add"], Sampling(max_tokens=40))
        stop = full.text[7:11]
        handles = [
            made.submit("def add", Sampling(max_tokens=40, stop=(stop,))),
            made.submit("def add", {"max_tokens": 40}),
        ]
        *events, last = handles[0].events()
        assert (last.finish_reason, last.stopped_by) == ("stop", stop)
        assert last.text == full.text[: full.text.index(stop)] == "".join(event.text for event in events)
        assert handles[1].result()[0].text == full.text
        made.check_integrity()
        again = made.generate(["def add"], Sampling(max_tokens=40))
        assert again[0].text == full.text  # whatever the stopped one left behind


def test_end_tokens_and_stop_ids_end_a_request():
    end = of_transformers("llama", 9)[4]
    (record,) = run(engine(), [prompt(9)], stop_ids=(end,))
    at = of_transformers("llama", 9).index(end)
    assert record.token_ids == of_transformers("llama", 9)[: at + 1]
    assert (record.finish_reason, record.stopped_by) == ("stop", end)


@pytest.mark.parametrize("num_pages", [40, 5])
def test_logprobs_are_those_of_the_model(num_pages):
    made = engine(model("qwen3"), num_pages=num_pages, max_batch_tokens=10)
    asked = {"logprobs": 3, "prompt_logprobs": 2, "temperature": 1.0, "seed": 1, "top_k": 5, "max_tokens": 24}
    records = run(made, [prompt(length) for length in LENGTHS], **asked)
    assert num_pages == 40 or made.stats().num_preemptions > 0
    for length, record in zip(LENGTHS, records, strict=True):
        ids = prompt(length) + list(record.token_ids)
        with torch.no_grad():
            expected = model("qwen3")(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert record.prompt_logprobs[0] is None and len(record.prompt_logprobs) == length
        assert len(record.logprobs) == len(record.token_ids)
        found = [*record.prompt_logprobs[1:], *record.logprobs]
        for position, one in enumerate(found):
            top = expected[position].topk(3 if position >= length - 1 else 2)
            assert one.logprob == pytest.approx(expected[position, ids[position + 1]].item(), abs=1e-4)
            assert [token for token, _ in one.top] == top.indices.tolist()
            assert [value for _, value in one.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_logprobs_differ_by_request_and_come_with_events():
    with engine() as made:
        plain, rich = made.submit(prompt(5)), made.submit(prompt(9), Sampling(max_tokens=3, logprobs=0))
        assert all(one.logprobs is None for one in plain.events() if isinstance(one, Token))
        *events, last = rich.events()
        assert tuple(event.logprobs for event in events) == last.logprobs and last.logprobs[0].top == ()


def test_a_reader_that_leaves_cancels_its_request():
    with engine(speaker(), TOKENIZER) as made:
        events = made.stream("def add", Sampling(max_tokens=120))
        next(events)
        events.close()
        made.check_integrity()
        assert made.stats().num_positions < 110


def test_a_storm_of_requests_and_cancels_from_many_threads_leaves_nothing_behind():
    problems = []
    with engine(num_pages=6, max_batch_tokens=16) as made:  # three forks of 31 tokens do not fit, whatever else runs

        def customer(seed):
            draw = random.Random(seed)
            try:
                for _ in range(12):
                    length = draw.choice(LENGTHS)
                    handle = made.submit(prompt(length), Sampling(max_tokens=NEW, n=draw.choice([1, 1, 3])))
                    if draw.random() < 0.3:
                        time.sleep(draw.random() * 0.01)
                        handle.cancel()
                    for record in handle.result():
                        expected = of_transformers("llama", length)
                        assert record.finish_reason in ("length", "cancelled")
                        assert record.token_ids == expected[: len(record.token_ids)]
                        assert record.finish_reason == "cancelled" or record.token_ids == expected
            except (AssertionError, HastenError) as error:
                problems.append(error)

        for length in LENGTHS:
            of_transformers("llama", length)
        threads = [threading.Thread(target=customer, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made.check_integrity()
        assert not problems and made.stats().num_free_pages == (6,) and made.stats().num_preemptions > 0


def test_a_prompt_that_cannot_be_served_is_named_and_the_others_go_on():
    made = engine()
    records = run(made, [prompt(5), [5] * 64, [], [VOCAB], prompt(9)])
    assert ids_of([records[0], records[4]]) == [of_transformers("llama", 5), of_transformers("llama", 9)]
    messages = [str(one.error) for one in records[1:4]]
    assert "prompt: expected at most 63 tokens, for a context of 64, got 64 tokens" in messages[0]
    assert "prompt: expected at least one token" in messages[1]
    assert f"prompt: expected token ids from 0 to {VOCAB - 1}, got {VOCAB}" in messages[2]


def test_the_context_ends_the_text():
    (record,) = run(engine(), [[5] * 60])
    assert len(record.token_ids) == 4 and record.finish_reason == "length"


BAD = {
    "pool": (
        {"num_pages": 1},
        {"max_tokens": 40},
        "num_pages: expected at least .3,. pages for 5 tokens and 40 new ones",
    ),
    "unknown": ({}, {"temprature": 1}, "temprature: expected a field of Sampling.*; did you mean temperature?"),
    "choices": ({}, {"n": 9}, "n: expected at most max_running, 8, got 9"),
    "bias": ({}, {"logit_bias": {VOCAB: 1.0}}, f"logit_bias: expected token ids from 0 to {VOCAB - 1}"),
    "stop": ({}, {"stop": ("x",)}, "stop: expected no strings, since there is no tokenizer"),
    "contradiction": ({}, {"top_k": 3}, "top_k: expected a temperature above 0"),
    "sampling": ({}, 3, "sampling: expected a Sampling or a mapping, got int"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_request_that_cannot_be_served_is_named_at_once(case):
    options, sampling, message = BAD[case]
    with engine(**options) as made, pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        made.submit(prompt(5), sampling)


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_a_timeout_that_is_over_is_refused(timeout):
    with engine() as made, pytest.raises(ArgumentError, match="timeout_s: expected more than 0 seconds"):
        made.submit(prompt(5), timeout_s=timeout)


SETTINGS = {
    "both": ({"memory_bytes": 2**20}, "memory_bytes: expected nothing beside num_pages"),
    "budget": ({"max_batch_tokens": 4}, "max_batch_tokens: expected at least max_running, 8"),
    "dtype": ({"kv_dtype": "int4"}, "kv_dtype: expected one of int8, fp8, got 'int4'"),
    "page": ({"page_size": 7}, "page_size: expected one of"),
    "none": ({"num_pages": 0}, "num_pages: expected at least 1, got 0"),
    "little": ({"num_pages": None, "memory_bytes": 100}, "memory_bytes: expected room for at least a page"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_are_named(case):
    options, message = SETTINGS[case]
    with pytest.raises(ArgumentError, match=message):
        engine(**options)


def test_models_that_cannot_be_served_are_named():
    with pytest.raises(ArgumentError, match="model: expected a decoder-only model"):
        engine(BY_NAME["t5"].build())
    with pytest.raises(ArgumentError, match="model: expected a model in evaluation mode"):
        engine(BY_NAME["llama"].build().train())


def test_a_closed_engine_ends_what_is_on_its_way_and_takes_no_more():
    served = BY_NAME["llama"].build()
    made = engine(served, max_running=1)
    handles = [made.submit(prompt(5), Sampling(max_tokens=50)) for _ in range(3)]
    made.close()
    made.close()
    assert {handle.result()[0].finish_reason for handle in handles} <= {"cancelled", "length", "stop"}
    with pytest.raises(ArgumentError, match="engine: expected one that is open"):
        made.submit(prompt(5))
    assert served.config._attn_implementation == "eager"
    made._core.check_integrity()


def test_prompts_are_a_list():
    with engine() as made, pytest.raises(ArgumentTypeError, match="prompts: expected a list of prompts, got str"):
        made.generate("text")
