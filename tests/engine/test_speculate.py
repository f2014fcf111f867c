"""Prompt lookup gives the tokens that there are without it, in fewer steps, and leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from hasten.engine import Failed, Finished, Sampling, Token, generate
from hasten.engine.core import Core
from hasten.errors import ArgumentError
from tests.engine.test_engine import CHOICES, LENGTHS, TOKENIZER, Hand, engine, ids_of, model, prompt, run, speaker

SETTINGS = {
    **CHOICES,
    "sharp": {"temperature": 0.05, "seed": 3},  # draws of which many are what was guessed
    "forks": {"temperature": 0.3, "seed": 3, "n": 3},
    "told": {"logprobs": 2, "prompt_logprobs": 1},
}


@pytest.fixture(autouse=True, params=[False, True], ids=["at-once", "ahead"])
def ahead(request, monkeypatch):
    make = Core.__init__
    changed = lambda self, runner, scheduler: make(self, runner, scheduler, is_ahead=request.param)  # noqa: E731
    monkeypatch.setattr(Core, "__init__", changed)


def repetitive(length, seed):
    """A text that says the same again, with other words between."""
    draw = random.Random(seed)
    phrase = [draw.randrange(3, 60) for _ in range(5)]
    words = itertools.chain.from_iterable([*phrase, draw.randrange(3, 60)] for _ in itertools.count())
    return list(itertools.islice(words, length))


class Knowing:
    """Drafts of somebody who has seen the texts that are to come, and is often wrong somewhere."""

    def __init__(self, texts, seed=0):
        self.texts, self.random = texts, random.Random(seed)

    def draft(self, tokens, count):
        known = [text for text in self.texts if text[: len(tokens)] == tokens]
        found = (self.random.choice(known)[len(tokens) :] if known else [])[:count]
        if found and self.random.random() < 0.6:
            place = self.random.randrange(len(found))
            found[place] = 3 + (found[place] + 1) % 60
        return found


@pytest.fixture
def knows(monkeypatch):
    """Lets engines know the texts that these records continue these prompts to."""

    def tell(prompts, records):
        each = len(records) // len(prompts)
        texts = [[*prompts[place // each], *record.token_ids] for place, record in enumerate(records)]
        monkeypatch.setattr("hasten.engine.engine.Lookup", lambda: Knowing(texts))

    return tell


PROMPTS = [*(prompt(length) for length in LENGTHS), *(repetitive(20 + seed, seed) for seed in range(4))]


def without_logprobs(records):
    return [(one.token_ids, one.finish_reason, one.stopped_by, one.index) for one in records]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("choice", SETTINGS)
def test_tokens_are_those_without_it(name, choice, knows):
    plain = run(engine(model(name)), PROMPTS, **SETTINGS[choice], max_tokens=24)
    knows(PROMPTS, plain)
    made = engine(model(name), prompt_lookup_num_tokens=5)
    found = run(made, PROMPTS, **SETTINGS[choice], max_tokens=24)
    assert without_logprobs(found) == without_logprobs(plain)
    stats = made.stats()
    assert stats.num_drafted > stats.num_accepted > 0
    assert stats.num_drafted == sum(one.num_drafted for one in found)
    assert stats.num_accepted == sum(one.num_accepted for one in found)
    for one, other in zip(found, plain, strict=True):
        assert [own.logprob for own in one.logprobs] == pytest.approx([own.logprob for own in other.logprobs], abs=1e-4)
        assert len(one.prompt_logprobs) == len(other.prompt_logprobs)
        assert one.num_positions == other.num_positions + one.num_drafted - one.num_accepted and other.num_drafted == 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("choice", SETTINGS)
def test_preemption_changes_no_token(name, choice, knows):
    plain = run(engine(model(name)), PROMPTS, **SETTINGS[choice], max_tokens=24)
    knows(PROMPTS, plain)
    made = engine(model(name), num_pages=5, max_batch_tokens=16, prompt_lookup_num_tokens=7)
    assert without_logprobs(run(made, PROMPTS, **SETTINGS[choice], max_tokens=24)) == without_logprobs(plain)
    assert made.stats().num_preemptions > 0 and made.stats().num_accepted > 0


@pytest.mark.parametrize("num_tokens", [1, 3, 15])
def test_what_repeats_takes_few_steps(num_tokens):
    made = engine(model("gemma2"), prompt_lookup_num_tokens=num_tokens)
    (record,) = run(made, [prompt(9)], max_tokens=50)
    assert ids_of([record]) == ids_of(run(engine(model("gemma2")), [prompt(9)], max_tokens=50))
    assert record.num_accepted > 10 and made.stats().num_steps == 50 - record.num_accepted


@pytest.mark.parametrize("limit", range(1, 25, 3))
def test_a_text_may_end_in_the_middle_of_what_is_confirmed(limit, knows):
    (whole,) = run(engine(), [prompt(9)], max_tokens=25)
    knows([prompt(9)], [whole])
    with engine(prompt_lookup_num_tokens=8) as made:
        (record,) = run(made, [prompt(9)], max_tokens=limit, stays_open=True)
        assert record.token_ids == whole.token_ids[:limit] and record.finish_reason == "length"
        end = whole.token_ids[limit]
        (record,) = run(made, [prompt(9)], max_tokens=25, stop_ids=(end,))
        assert record.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1] and record.stopped_by == end


def test_stop_strings_events_and_texts_are_those_without_it(knows):
    text = "def add(a, b): def add(a, b): def"
    (whole,) = run(engine(speaker(), TOKENIZER), [text], max_tokens=60)
    knows([TOKENIZER.encode(text)], [whole])
    for start in range(0, len(whole.text) - 3, 17):
        stop = whole.text[start : start + 3]
        *expected, last = generate(speaker(), TOKENIZER, text, Sampling(max_tokens=60, stop=(stop,)))
        with engine(speaker(), TOKENIZER, prompt_lookup_num_tokens=6) as made:
            *events, record = made.stream(text, Sampling(max_tokens=60, stop=(stop,)))
            assert events == expected and (record.text, record.stopped_by) == (last.text, last.stopped_by)
            assert record.num_accepted > 0 or len(events) < 4


def test_requests_say_it_for_themselves():
    with engine(model("gemma2")) as made:
        plain = made.submit(prompt(9), Sampling(max_tokens=30))
        looked = made.submit(prompt(9), Sampling(max_tokens=30, prompt_lookup_num_tokens=4))
        drawn = made.submit(prompt(9), Sampling(max_tokens=30, temperature=1.0, seed=1))
        (one,), (other,), _ = plain.result(), looked.result(), drawn.result()
        assert one.token_ids == other.token_ids and one.num_drafted == 0 < other.num_accepted
        made.check_integrity()
    with engine(model("gemma2"), prompt_lookup_num_tokens=4) as made:
        (record,) = run(made, [prompt(9)], prompt_lookup_num_tokens=0, max_tokens=30)
        assert record.num_drafted == 0 and record.token_ids == one.token_ids


def test_grammars_are_followed():
    pytest.importorskip("llguidance")
    built = speaker()
    end = TOKENIZER.eos_token_id if TOKENIZER.eos_token_id is not None else 0
    asked = {"regex": "(abab(cdcd)?){1,12}x", "max_tokens": 60, "stop_ids": (end,)}
    for drawn in ({}, {"temperature": 1.0, "seed": 5}):
        plain = run(engine(built, TOKENIZER), ["abab cdcd"] * 2, **asked, **drawn)
        made = engine(built, TOKENIZER, prompt_lookup_num_tokens=6)
        found = run(made, ["abab cdcd"] * 2, **asked, **drawn)
        assert not any(isinstance(one, Failed) for one in plain), json.dumps([str(one) for one in plain])
        assert without_logprobs(found) == without_logprobs(plain) and made.stats().num_accepted > 0


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_a_request_can_be_broken_off_at_any_step(num_steps, num_choices):
    hand = Hand(max_batch_tokens=16, max_running=4, prompt_lookup_num_tokens=5)
    other = hand.add(prompt(9), max_tokens=24)
    request = hand.add(repetitive(30, 1), n=num_choices, max_tokens=24)
    hand.step(num_steps)
    hand.core.cancel(request.number)
    hand.rest()
    assert set(hand.ends(request)) <= {"cancelled", "length"} and len(hand.ends(request)) == num_choices
    (expected,) = run(engine(), [prompt(9)], max_tokens=24)
    assert hand.events[other.number][-1].token_ids == expected.token_ids
    for index in range(num_choices):
        shown = [one.id for one in hand.events[request.number] if isinstance(one, Token) and one.index == index]
        (record,) = [one for one in hand.events[request.number] if isinstance(one, Finished) and one.index == index]
        assert list(record.token_ids) == shown


@pytest.mark.parametrize("wrong", [-1, 16])
def test_a_count_out_of_range_is_named(wrong):
    with pytest.raises(ArgumentError, match="prompt_lookup_num_tokens: expected an int from 0 to 15"):
        engine(prompt_lookup_num_tokens=wrong)
    with pytest.raises(ArgumentError, match="prompt_lookup_num_tokens: expected None for one request at a time"):
        generate(model(), None, prompt(5), Sampling(prompt_lookup_num_tokens=2))
