"""With the prompt cache and without it the tokens are the same; each test also sees that the hit really happened."""

from __future__ import annotations

import random
import threading
from functools import cache

import pytest
import torch

from hasten.cache.prompt_cache import PromptCache
from hasten.engine import Failed, Sampling
from hasten.engine.engine import Engine
from hasten.errors import ArgumentError, ArgumentTypeError, HastenError
from tests.models.tiny import ARCHITECTURES, DECODERS, tokens

BY_NAME = {one.name: one for one in ARCHITECTURES}
NEW = 10
SIZE = 16


@cache
def model(name="llama"):
    built = BY_NAME[name].build()
    built.generation_config.eos_token_id = None
    return built


def prompt(length, seed=1):
    return tokens(1, length, seed)[0].tolist()


def engine(name="llama", **options):
    options = {"num_pages": 60, "max_running": 8, "prompt_cache": True, **options}
    return Engine(model(name) if isinstance(name, str) else name, **options)


def run(made, prompts, salt="", **options):
    records = made.generate(prompts, Sampling(**{"max_tokens": NEW, **options}), salt=salt)
    made.check_integrity()
    stats = made.stats()
    both = zip(stats.num_free_pages, stats.num_idle_pages, strict=True)
    assert tuple(free + idle for free, idle in both) == stats.num_pages or has_pins(made)
    return records


def has_pins(made):
    tree = made.prompt_cache.tree
    return any(tree.pins(salt) for salt in tree.salts())


@cache
def alone(name, ids, **options):
    with Engine(model(name), num_pages=60, max_running=8) as made:
        (record,) = made.generate([list(ids)], Sampling(**{"max_tokens": NEW, **options}))
    return record.token_ids


@pytest.mark.parametrize("name", [one.name for one in DECODERS])
def test_cold_and_warm_alone_and_batched_are_equal(name):
    first = prompt(40)
    others = [first[:cut] + prompt(4, 50 + cut) for cut in (3, 15, 16, 17, 32, 33, 39)]
    with engine(name, max_batch_tokens=24) as made:
        (cold,) = run(made, [first])
        assert (cold.token_ids, cold.cached_tokens, cold.explanation.reason) == (alone(name, tuple(first)), 0, "empty")
        (warm,) = run(made, [first])
        # the prompt's last token is computed; so is its last page where a window was left at whole pages alone
        assert warm.cached_tokens in (39, 32) and warm.num_positions == 40 - warm.cached_tokens + NEW - 1
        assert warm.token_ids == cold.token_ids
        grown = [*first, *cold.token_ids, 5, 6]
        (longer,) = run(made, [grown])
        assert longer.cached_tokens == 40 + NEW - 1  # the last new token went through no layer
        assert longer.token_ids == alone(name, tuple(grown))
        for _ in range(3):
            records = run(made, others)
            assert [one.token_ids for one in records] == [alone(name, tuple(one)) for one in others]
        assert [one.cached_tokens > 0 for one in records] == [True] * len(others)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2"])
@pytest.mark.parametrize("length", [*range(1, 20), 31, 32, 33, 47])
def test_a_prefix_of_every_length(name, length):
    ids = prompt(length) + prompt(6, 9)
    with engine(name) as made:
        run(made, [prompt(length)], max_tokens=1)
        (record,) = run(made, [ids])
        assert record.cached_tokens == length and record.token_ids == alone(name, tuple(ids))


@pytest.mark.parametrize("budget", range(1, 34))
def test_a_prompt_cut_at_every_token(budget):
    ids = prompt(20) + prompt(13, 9)
    with engine("gemma2", max_batch_tokens=budget, max_running=1) as made:
        run(made, [prompt(20)], max_tokens=2)
        (record,) = run(made, [ids])
        assert record.cached_tokens >= 16 and record.token_ids == alone("gemma2", tuple(ids))
        (again,) = run(made, [ids])
        assert again.cached_tokens >= 32 - SIZE and again.token_ids == record.token_ids


def test_windows_are_left_where_prompts_are_seen_to_part():
    system = prompt(33)
    with engine("gemma2", max_batch_tokens=16) as made:
        found = [run(made, [system + prompt(18, 60 + one)])[0] for one in range(4)]
        for one, record in enumerate(found):
            assert record.token_ids == alone("gemma2", tuple(system + prompt(18, 60 + one)))
        # computed; known and computed, for want of the window; found from then on
        assert [one.cached_tokens for one in found] == [0, 0, 33, 33]
        assert [one.explanation.reason for one in found[:3]] == ["empty", "window", "differs"]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_forks_begin_with_what_is_there_and_stay_apart(name):
    drawn = {"temperature": 1.2, "top_p": 0.9, "seed": 5}
    apart = [alone(name, tuple(prompt(21)), **{**drawn, "seed": 5 + one}) for one in range(3)]
    with engine(name, max_batch_tokens=16) as made:
        assert [one.token_ids for one in run(made, [prompt(21)], n=3, **drawn)] == apart
        records = run(made, [prompt(21)], n=3, **drawn)
        assert [one.token_ids for one in records] == apart and all(one.cached_tokens >= 16 for one in records)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("choice", [{}, {"temperature": 1.0, "seed": 7, "presence_penalty": 1.0}])
def test_preemption_takes_over_what_it_left(name, choice):
    prompts = [prompt(length, 30 + length) for length in (5, 16, 33, 1, 17, 31)]
    ample = [alone(name, tuple(one), max_tokens=24, **choice) for one in prompts]
    with engine(name, num_pages=6, max_batch_tokens=16) as made:
        for _ in range(2):
            records = run(made, prompts, max_tokens=24, **choice)
            assert [one.token_ids for one in records] == ample
        preempted = [one for one in records if one.num_preemptions]
        assert preempted
        # a token goes through the model once if all it left is taken over; some of it was evicted
        cold = sum(one.num_preemptions * (one.prompt_tokens + 12) for one in preempted)
        assert sum(one.num_positions - one.prompt_tokens - 23 + one.cached_tokens for one in preempted) < cold


def test_requests_of_one_batch_share_what_the_first_has_computed():
    with engine(max_batch_tokens=64) as made:
        run(made, [prompt(40)], max_tokens=1)
        records = run(made, [prompt(40) + prompt(5, 80 + one) for one in range(6)])
        assert [one.cached_tokens for one in records] == [40] * 6
        assert made.prompt_cache.counts().num_found == 240


def test_sharing_lets_in_more_than_would_fit_apart():
    with engine(num_pages=9, max_batch_tokens=64) as made:
        run(made, [prompt(48)], max_tokens=1)
        handles = [made.submit([*prompt(48), 7, one], Sampling(max_tokens=12)) for one in range(4)]
        most, going = 0, True
        while going:
            most = max(most, made.stats().num_running)
            going = made.stats().num_running + made.stats().num_waiting > 0 or any(
                handle.queue.empty() for handle in handles
            )
        expected = [alone("llama", (*prompt(48), 7, one), max_tokens=12) for one in range(4)]
        assert [handle.result()[0].token_ids for handle in handles] == expected
        made.check_integrity()
        assert made.stats().num_preemptions == 0


def test_no_tenant_finds_what_another_left_but_what_is_public():
    with engine() as made:
        run(made, [prompt(33)], salt="a")
        (other,) = run(made, [prompt(33)], salt="b")
        assert other.cached_tokens == 0 and other.explanation.reason == "empty"
        assert made.prompt_cache.counts("b").num_found == 0
        assert run(made, [prompt(33)], salt="a")[0].cached_tokens == 32
        assert made.prompt_cache.pin("system", prompt(40, 2), is_public=True) == 40
        for salt in "ab":
            (record,) = run(made, [[*prompt(40, 2), 5, 6]], salt=salt)
            assert record.cached_tokens == 40 and record.explanation.is_public
            assert record.token_ids == alone("llama", (*prompt(40, 2), 5, 6))
        with pytest.raises(ArgumentTypeError, match="salt: expected a string, or None for public, got int"):
            made.submit([5], salt=3)


def test_pins_stay_under_pressure_and_give_way_to_who_could_not_be_served():
    with engine("gemma2", num_pages=4, max_batch_tokens=16, max_running=2) as made:
        cache = made.prompt_cache
        assert cache.pin("system", prompt(20)) == 20
        run(made, [prompt(12, 70 + one) for one in range(5)], max_tokens=8)
        (record,) = run(made, [[*prompt(20), 5]], max_tokens=4)
        assert record.cached_tokens >= 16 and cache.tree.pins()
        (record,) = run(made, [prompt(50, 3)])
        assert record.token_ids == alone("gemma2", tuple(prompt(50, 3))) and not cache.tree.pins()
        assert not cache.unpin("system") and cache.pin("system", prompt(20)) == 20 and cache.unpin("system")
        cache.clear()
        assert made.stats().num_free_pages == made.stats().num_pages


def test_prompt_log_probabilities_are_computed_and_not_taken_over():
    with engine() as made:
        run(made, [prompt(40)])
        (record,) = run(made, [prompt(40)], prompt_logprobs=0, logprobs=0)
        assert record.cached_tokens == 0 and len(record.prompt_logprobs) == 40
        (warm,) = run(made, [prompt(40)], logprobs=0)
        assert warm.cached_tokens == 39
        for one, other in zip(record.logprobs, warm.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_reproducible_engines_give_the_same_bits_cold_and_warm(name):
    with engine(name, reproducible=True) as made:
        (cold,) = run(made, [prompt(40)], logprobs=3)
        (warm,) = run(made, [prompt(40)], logprobs=3)
        assert warm.cached_tokens >= 32 and cold.cached_tokens == 0
        assert warm.token_ids == cold.token_ids and warm.logprobs == cold.logprobs  # not approximately


def test_what_was_cut_short_can_be_taken_over_and_what_failed_cannot():
    with engine(max_batch_tokens=16) as made:
        handle = made.submit(prompt(40), Sampling(max_tokens=20))
        for _, _ in zip(range(5), handle.events(), strict=False):
            pass
        handle.cancel()
        made.check_integrity()
        assert run(made, [prompt(40)])[0].cached_tokens == 39
        forward = made._core.runner._forward

        def fragile(batch):
            if (batch.ids == 66).any():
                raise IndexError("66 is not a token")
            return forward(batch)

        made._core.runner._forward = fragile
        bad = [token % 60 for token in prompt(35, 4)] + [66]
        (failed,) = made.generate([bad], Sampling(max_tokens=2))
        assert isinstance(failed, Failed)
        made._core.runner._forward = forward
        (record,) = run(made, [bad])
        assert record.cached_tokens <= 32 and record.token_ids == alone("llama", tuple(bad))


def test_weights_written_in_place_make_everything_a_miss():
    changing = BY_NAME["llama"].build()
    changing.generation_config.eos_token_id = None
    with engine(changing) as made:
        (before,) = run(made, [prompt(30)])
        with torch.no_grad():
            changing.model.layers[0].self_attn.v_proj.weight.mul_(3.0)
        (after,) = run(made, [prompt(30)])
        assert after.cached_tokens == 0 and after.token_ids != before.token_ids
        assert run(made, [prompt(30)])[0].cached_tokens == 29


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_pages_of_8_bits(kv_dtype):
    with engine("gemma2", kv_dtype=kv_dtype) as made:
        (cold,) = run(made, [prompt(33)])
        (warm,) = run(made, [prompt(33)])
        assert warm.cached_tokens == 32 and warm.token_ids == cold.token_ids


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_step_ahead_of_the_host_leaves_the_same(name):
    ids = [prompt(20) + prompt(3 + one, 40 + one) for one in range(6)]
    with engine(name, max_batch_tokens=16, num_pages=9) as made:
        made._core.is_ahead = True
        for _ in range(3):
            records = run(made, ids, temperature=1.0, seed=3)
        assert sum(one.cached_tokens for one in records) > 0
        expected = [alone(name, tuple(one), temperature=1.0, seed=3) for one in ids]
        assert [one.token_ids for one in records] == expected


@pytest.mark.parametrize("num_choices", [1, 3])
def test_what_is_broken_off_before_it_began_has_its_record_also_with_several_kinds_of_layers(num_choices):
    with engine("gemma2", max_running=3, prompt_cache=None) as made:
        first = made.submit(prompt(5), Sampling(max_tokens=40, n=3))
        waiting = made.submit(prompt(9), Sampling(max_tokens=4, n=num_choices))
        waiting.cancel()
        assert {one.finish_reason for one in waiting.result()} <= {"cancelled", "length"}
        assert len(first.result()) == 3


def test_a_storm_of_tenants_with_little_room():
    problems, found = [], []
    starts = {salt: prompt(33, seed) for seed, salt in enumerate("abc")}
    asked = [(salt, starts[salt][:cut] + prompt(5, 90 + cut)) for salt in "abc" for cut in (7, 16, 20, 33)]
    expected = {tuple(ids): alone("gemma2", tuple(ids)) for _, ids in asked}
    with engine("gemma2", num_pages=9, max_batch_tokens=16, prompt_cache=PromptCache(budgets={"a": 50})) as made:

        def customer(seed):
            draw = random.Random(seed)
            try:
                for _ in range(10):
                    salt, ids = draw.choice(asked)
                    handle = made.submit(ids, Sampling(max_tokens=NEW, n=draw.choice([1, 1, 2])), salt=salt)
                    if draw.random() < 0.2:
                        handle.cancel()
                    for record in handle.result():
                        assert record.token_ids == expected[tuple(ids)][: len(record.token_ids)]
                        assert record.finish_reason == "cancelled" or len(record.token_ids) == NEW
                        found.append(record.cached_tokens)
            except (AssertionError, HastenError) as error:
                problems.append(error)

        threads = [threading.Thread(target=customer, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made.check_integrity()
        assert not problems and sum(found) > 0
        assert made.prompt_cache.counts("a").num_nodes <= 4


def test_settings_that_cannot_be():
    cache = PromptCache()
    with pytest.raises(ArgumentError, match="prompt_cache: expected one that an engine has, got one that none has"):
        cache.pin("x", [5])
    with engine(prompt_cache=cache) as made:
        with pytest.raises(ArgumentError, match="prompt_cache: expected one that no other engine has, got one in use"):
            engine(prompt_cache=cache)
        with pytest.raises(ArgumentError, match="ttl: expected more than 0 seconds, got 0"):
            cache.pin("x", [5, 6], ttl=0)
        assert made.prompt_cache is cache
    with engine(prompt_cache=cache) as made:
        assert run(made, [prompt(9)])[0].cached_tokens == 0
    with pytest.raises(ArgumentError, match="budgets: expected at least 1 token, got 0"):
        PromptCache(budgets=0)
    with pytest.raises(ArgumentError, match="eviction: expected one of lru, lfu, cost, got 'fifo'"):
        PromptCache(eviction="fifo")
    problem = "prompt: expected a prefix that stays in the cache, got 16 of its 40"
    with engine(prompt_cache=PromptCache(budgets=16)) as made, pytest.raises(ArgumentError, match=problem):
        made.prompt_cache.pin("x", prompt(40))
