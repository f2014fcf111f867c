"""Beam search gives the texts and scores of transformers' `generate`, whatever else runs, and loses no page."""

from __future__ import annotations

import pytest
import torch

from hasten.engine import Finished, Sampling, Token, generate
from hasten.engine.core import Core
from hasten.errors import ArgumentError
from tests.engine.test_engine import NEW, TOKENIZER, Hand, engine, ids_of, model, of_transformers, prompt, run, speaker
from tests.models.tiny import DECODERS, VOCAB

ENDS = (5, 17, 23, 40)
SETTINGS = {
    "plain": {},
    "short": {"length_penalty": -1.0},
    "long": {"length_penalty": 2.0, "num_return_sequences": 2},
    "early": {"early_stopping": True, "num_return_sequences": 3, "stop_ids": ENDS},
    "ends": {"stop_ids": ENDS, "num_return_sequences": 3},
    "never": {"early_stopping": "never", "length_penalty": 1.5, "stop_ids": ENDS, "num_return_sequences": 2},
    "canonical": {"early_stopping": "never", "length_penalty": 0.0, "stop_ids": ENDS},
    "rules": {"repetition_penalty": 1.5, "num_return_sequences": 3},
}


@pytest.fixture(autouse=True, params=[False, True], ids=["at-once", "ahead"])
def ahead(request, monkeypatch):
    make = Core.__init__
    changed = lambda self, runner, scheduler: make(self, runner, scheduler, is_ahead=request.param)  # noqa: E731
    monkeypatch.setattr(Core, "__init__", changed)


def by_transformers(name, ids, num_beams, stop_ids=(), num_new=NEW, **options):
    """[(new tokens, score)]."""
    served, given = model(name), torch.tensor([ids])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = served.config._attn_implementation
    served.set_attn_implementation("eager")
    out = served.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=num_new,
        do_sample=False,
        num_beams=num_beams,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    served.set_attn_implementation(before)
    torch.set_num_threads(threads)
    found = []
    for row, score in zip(out.sequences[:, len(ids) :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((place + 1 for place, token in enumerate(row) if token in stop_ids), len(row))
        found.append((tuple(row[:end]), score))
    return found


def check(records, expected):
    assert [one.token_ids for one in records] == [tokens for tokens, _ in expected]
    assert [one.score for one in records] == pytest.approx([score for _, score in expected], abs=1e-4)
    assert [one.index for one in records] == list(range(len(expected)))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("num_beams", [2, 3])
def test_texts_and_scores_are_those_of_transformers(name, setting, num_beams):
    options = {**SETTINGS[setting]}
    options["num_return_sequences"] = min(num_beams, options.get("num_return_sequences", 1))
    with engine(model(name), max_batch_tokens=16) as made:
        for length in (1, 17):
            records = run(made, [prompt(length)], num_beams=num_beams, stays_open=True, **options)
            check(records, by_transformers(name, prompt(length), num_beams, **options))


@pytest.mark.parametrize("name", [one.name for one in DECODERS])
def test_every_model_and_among_others(name):
    lengths, options = (5, 16, 33), {"stop_ids": ENDS, "num_return_sequences": 3}
    searched = [by_transformers(name, prompt(length), 3, **options) for length in lengths]
    likeliest = [of_transformers(name, length) for length in lengths]
    with engine(model(name), max_batch_tokens=24, num_pages=60, max_running=16) as made:
        asked = Sampling(max_tokens=NEW, num_beams=3, **options)
        beams = [made.submit(prompt(length), asked) for length in lengths]
        others = [made.submit(prompt(length), Sampling(max_tokens=NEW)) for length in lengths]
        for handle, expected in zip(beams, searched, strict=True):
            check(handle.result(), expected)
        assert [handle.result()[0].token_ids for handle in others] == likeliest
        made.check_integrity()
        assert made.stats().num_free_pages == made.stats().num_pages


@pytest.mark.parametrize("limit", [1, 2])
def test_few_tokens(limit):
    with engine() as made:
        records = run(made, [prompt(9)], num_beams=4, num_return_sequences=4, max_tokens=limit, stays_open=True)
        check(records, by_transformers("llama", prompt(9), 4, num_return_sequences=4, num_new=limit))


def test_beams_share_the_pages_of_what_they_have_in_common():
    hand = Hand()
    hand.add(prompt(33), num_beams=4)
    hand.step(4)
    ledger = hand.core.scheduler.ledger
    assert len(hand.core.scheduler.running) == 4 and ledger.pools[0].num_pages - ledger.num_free[0] <= 2 + 4
    assert hand.core.num_positions == 33 + 3 * 4
    hand.rest()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_preemption_takes_all_beams_and_changes_no_token(name):
    hand = Hand(of=model(name), max_batch_tokens=16)
    plain = hand.add(prompt(9), max_tokens=40)
    requests = {n: hand.add(prompt(n), num_beams=3, num_return_sequences=3, max_tokens=40) for n in (16, 17)}
    scheduler, beams = hand.core.scheduler, {}
    for _ in range(2):
        hand.step(9)
        pools = scheduler.ledger.pools
        taken = [pool.allocate(pool.num_free) for pool in pools]
        while not scheduler.waiting:
            hand.core.step()
        beams |= {one.arrival: one for one in scheduler.waiting}
        assert all(one.holding.num_tokens == 0 for one in scheduler.waiting)
        for pool, pages in zip(pools, taken, strict=True):
            pool.free(pages)
    assert len(beams) in (3, 6), "all beams of a request, or none"
    hand.rest()
    for length, request in requests.items():
        records = [one for one in hand.events[request.number] if isinstance(one, Finished)]
        check(records, by_transformers(name, prompt(length), 3, num_return_sequences=3, num_new=40))
    (expected,) = run(engine(model(name)), [prompt(9)], max_tokens=40)
    assert hand.events[plain.number][-1].token_ids == expected.token_ids


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("how", ["cancelled", "deadline"])
def test_a_search_can_be_broken_off_in_every_state(num_steps, how):
    hand = Hand(max_batch_tokens=16, max_running=5, num_pages=40)
    other = hand.add(prompt(5))
    request = hand.add(prompt(40), timeout_s=5.0, num_beams=4, num_return_sequences=2)
    hand.step(num_steps)
    if how == "cancelled":
        hand.core.cancel(request.number)
    else:
        hand.now = 5.0
    hand.rest()
    assert hand.ends(request) == [how] * 2 and hand.events[request.number][-1].text == ""
    assert hand.events[other.number][-1].token_ids == of_transformers("llama", 5)


def test_a_storm_leaves_nothing_behind():
    with engine(num_pages=14, max_batch_tokens=16) as made:
        asked = Sampling(max_tokens=NEW, num_beams=3, num_return_sequences=3)
        expected = {length: made.submit(prompt(length), asked).result() for length in (5, 17, 31)}
        handles = []
        for turn in range(12):
            length = (5, 17, 31)[turn % 3]
            handles.append((length, made.submit(prompt(length), asked)))
            made.submit(prompt(length), Sampling(max_tokens=NEW, n=2))
            if turn % 4 == 3:
                handles[-2][1].cancel()
        for length, handle in handles:
            records = handle.result()
            assert records[0].finish_reason == "cancelled" or ids_of(records) == ids_of(expected[length])
        made.check_integrity()
        assert made.stats().num_free_pages == (14,)


def test_events_have_the_text_of_each_and_prompt_logprobs_go_with_it():
    with engine(speaker(), TOKENIZER) as made:
        asked = Sampling(max_tokens=20, num_beams=3, num_return_sequences=2, prompt_logprobs=0)
        events = list(made.stream("def add(a, b):", asked))
        records = [one for one in events if isinstance(one, Finished)]
        assert [one.index for one in records] == [0, 1] and records[0].score >= records[1].score
        for record in records:
            own = [one for one in events if isinstance(one, Token) and one.index == record.index]
            assert "".join(one.text for one in own) == record.text
            assert [one.id for one in own] == list(record.token_ids)
            assert len(record.prompt_logprobs) == record.prompt_tokens and record.finish_reason == "length"


def test_logits_that_are_no_numbers_fail_the_search_alone():
    with engine() as made:
        run_forward = made._core.runner._forward

        def broken(batch):
            logits = run_forward(batch)
            return torch.full_like(logits, float("nan")) if (batch.ids == 66).any() else logits

        made._core.runner._forward = broken
        records = made.generate([[5, 66, 7], prompt(9)], Sampling(max_tokens=3, num_beams=2))
        assert "model: expected logits that are numbers, got NaN" in str(records[0].error)
        made.check_integrity()


BAD = {
    "draw": ({"temperature": 1.0}, "temperature: expected 0.0 beside num_beams 3, got 1.0"),
    "n": ({"n": 2}, "n: expected 1 beside num_beams 3"),
    "stop": ({"stop": ("x",)}, "stop: expected .* beside num_beams 3"),
    "logprobs": ({"logprobs": 0}, "logprobs: expected None beside num_beams 3"),
    "many": ({"num_return_sequences": 4}, "num_return_sequences: expected at most num_beams, 3, got 4"),
    "when": ({"early_stopping": "soon"}, "early_stopping: expected True, False or 'never', got 'soon'"),
    "alone": ({"num_beams": 1, "length_penalty": 2.0}, "length_penalty: expected 1.0 beside num_beams 1, got 2.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_contradict_each_other_are_named(case):
    options, message = BAD[case]
    with pytest.raises(ArgumentError, match=message):
        Sampling(**{"num_beams": 3, **options})


def test_searches_that_cannot_be_served_are_named():
    with (
        engine(num_pages=10) as made,
        pytest.raises(ArgumentError, match=r"num_pages: expected at least \(14,\) pages .* of 3 beams, got \(10,\)"),
    ):
        made.submit(prompt(33), Sampling(max_tokens=20, num_beams=3))
    with engine() as made:
        with pytest.raises(ArgumentError, match="num_beams: expected at most max_running, 8, got 9"):
            made.submit(prompt(5), Sampling(max_tokens=2, num_beams=9))
        ends = tuple(range(40))
        with pytest.raises(ArgumentError, match=f"num_beams: expected beams .* the vocabulary of {VOCAB}, got 2"):
            made.submit(prompt(5), Sampling(max_tokens=2, num_beams=2, stop_ids=ends))
    with pytest.raises(ArgumentError, match="num_beams: expected 1 for one request at a time"):
        generate(model(), None, prompt(5), Sampling(num_beams=2))
