"""Prefixes that outlive an engine: the same tokens from host memory and from disk, and never those of another model."""

from __future__ import annotations

import gc
from functools import cache

import pytest
import torch

from hasten.cache.prompt_cache import PromptCache
from hasten.engine import Sampling
from hasten.engine.engine import Engine
from hasten.errors import ArgumentError
from tests.engine.tiny_tokenizers import byte_level
from tests.models.tiny import ARCHITECTURES, tokens

BY_NAME = {one.name: one for one in ARCHITECTURES}
NEW = 8
LONG = {"max_position_embeddings": 700}


def build(name="llama", **options):
    built = BY_NAME[name].build(**{**LONG, **options})
    built.generation_config.eos_token_id = None
    return built


@cache
def model(name="llama"):
    return build(name)


def prompt(length, seed=1):
    return tokens(1, length, seed)[0].tolist()


def engine(of="llama", **options):
    options = {"num_pages": 120, "max_running": 4, **options}
    return Engine(model(of) if isinstance(of, str) else of, **options)


def run(made, prompts, salt="", **options):
    records = made.generate(prompts, Sampling(**{"max_tokens": NEW, **options}), salt=salt)
    made.check_integrity()
    return records


@cache
def alone(name, ids):
    with engine(name) as made:
        return run(made, [list(ids)])[0].token_ids


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "qwen3"])
@pytest.mark.parametrize("length", [40, 249, 300, 530])
def test_a_restart_gives_the_same_tokens(tmp_path, name, length):
    ids = prompt(length)
    with engine(name, prompt_cache=PromptCache(tmp_path)) as made:
        (cold,) = run(made, [ids])
        assert cold.token_ids == alone(name, tuple(ids)) and cold.restored_tokens == 0
    grown = [*ids, *cold.token_ids, 5, 6]
    with engine(name, prompt_cache=PromptCache(tmp_path, restore="always")) as made:
        (warm,) = run(made, [grown])
        assert warm.restored_tokens == warm.cached_tokens == length + NEW - 1
        assert warm.token_ids == alone(name, tuple(grown)) and made.prompt_cache.problems == []
        (again,) = run(made, [grown])  # from the pages
        assert again.restored_tokens == 0 and again.cached_tokens >= length and again.token_ids == warm.token_ids


@pytest.mark.parametrize("cut", [20, 31, 255, 256, 257, 290])
def test_what_parts_within_a_piece_is_restored_up_to_there(tmp_path, cut):
    with engine(prompt_cache=PromptCache(tmp_path)) as made:
        run(made, [prompt(300)])
    other = [*prompt(300)[:cut], 3, *prompt(9, 7)]
    with engine(prompt_cache=PromptCache(tmp_path, restore="always")) as made:
        (record,) = run(made, [other])
        assert cut <= record.restored_tokens <= cut + 1 and record.token_ids == alone("llama", tuple(other))


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_pages_of_8_bits_come_back(tmp_path, kv_dtype):
    with engine(kv_dtype=kv_dtype, prompt_cache=PromptCache(tmp_path)) as made:
        (cold,) = run(made, [prompt(40)])
    with engine(kv_dtype=kv_dtype, prompt_cache=PromptCache(tmp_path, restore="always")) as made:
        (warm,) = run(made, [prompt(40)])
        assert warm.restored_tokens == 39 and warm.token_ids == cold.token_ids
    with engine(prompt_cache=PromptCache(tmp_path, restore="always")) as made:
        assert run(made, [prompt(40)])[0].restored_tokens == 0  # of another dtype


def test_reproducible_engines_give_the_same_bits_from_disk_and_take_nothing_of_others(tmp_path):
    with engine(prompt_cache=PromptCache(tmp_path)) as made:
        run(made, [prompt(300)])
    with engine(prompt_cache=PromptCache(tmp_path, restore="always"), reproducible=True) as made:
        (cold,) = run(made, [prompt(300)], logprobs=3)
    with engine(prompt_cache=PromptCache(tmp_path, restore="always"), reproducible=True) as made:
        (warm,) = run(made, [prompt(300)], logprobs=3)
    assert (cold.restored_tokens, warm.restored_tokens) == (0, 299)
    assert warm.token_ids == cold.token_ids and warm.logprobs == cold.logprobs


def test_host_memory_gives_back_what_the_pages_had_to_let_go():
    ids = [prompt(300, seed) for seed in range(5)]
    with engine(num_pages=24, prompt_cache=PromptCache(host_bytes=2**26, restore="always")) as made:
        for _ in range(2):
            records = [run(made, [one])[0] for one in ids]
        assert [one.token_ids for one in records] == [alone("llama", tuple(one)) for one in ids]
        assert [one.restored_tokens for one in records] == [299] * 5
    with engine(num_pages=24, prompt_cache=PromptCache(host_bytes=1000, restore="always")) as made:
        records = [run(made, [one])[0] for one in [*ids, *ids]]
        assert sum(one.restored_tokens for one in records) == 0


def changed_weight():
    other = build()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    return {"model": other}


OTHERS = {
    "a weight": changed_weight,
    "rotary settings": lambda: {"model": build(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})},
    "a dtype": lambda: {"model": build().to(torch.bfloat16)},
    "a tokenizer": lambda: {"model": build(), "tokenizer": byte_level()},
    "a layout": lambda: {"model": build(), "page_size": 32},
    "a tenant": lambda: {"model": build(), "salt": "other"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_a_miss(tmp_path, name):
    with engine(prompt_cache=PromptCache(tmp_path)) as made:
        run(made, [prompt(40)])
    options = OTHERS[name]()
    of, salt = options.pop("model"), options.pop("salt", "")
    for _ in range(2):
        with engine(of, prompt_cache=PromptCache(tmp_path, restore="always"), **options) as made:
            (record,) = run(made, [prompt(40)], salt=salt)
    assert record.restored_tokens == 39  # its own, of the first of the two
    with engine(build(), prompt_cache=PromptCache(tmp_path, restore="always")) as made:
        assert run(made, [prompt(40)])[0].restored_tokens == 39  # the same weights, loaded again
        assert made.prompt_cache.store is not None and len(made.prompt_cache.store.entries()) == 2


def test_weights_written_under_a_running_engine_turn_the_folder_off(tmp_path):
    changing = build()
    with engine(changing, prompt_cache=PromptCache(tmp_path)) as made:
        run(made, [prompt(40)])
        with torch.no_grad():
            changing.model.embed_tokens.weight.mul_(2.0)
        assert run(made, [prompt(60, 3)])[0].cached_tokens == 0
    with engine(build(), prompt_cache=PromptCache(tmp_path, restore="always")) as made:
        assert run(made, [prompt(60, 3)])[0].restored_tokens == 0


def test_damage_is_a_miss_and_is_said(tmp_path):
    with engine(prompt_cache=PromptCache(tmp_path)) as made:
        run(made, [prompt(300)])
    for path in tmp_path.glob("pieces/*/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(bytes(data))
    with engine(prompt_cache=PromptCache(tmp_path, restore="always")) as made:
        (record,) = run(made, [prompt(300)])
        assert record.restored_tokens == 0 and record.token_ids == alone("llama", tuple(prompt(300)))
        assert "lost, and computed again" in made.prompt_cache.problems[0]


def test_two_engines_on_one_folder(tmp_path):
    first, second = (engine(prompt_cache=PromptCache(tmp_path, restore="always")) for _ in range(2))
    with first, second:
        run(first, [prompt(40)])
        first.prompt_cache.tiers.flush()
        (record,) = run(second, [prompt(40)])
        assert record.restored_tokens == 39 and record.token_ids == alone("llama", tuple(prompt(40)))


def test_restored_or_computed_by_what_is_faster(tmp_path):
    with engine(prompt_cache=PromptCache(tmp_path)) as made:
        run(made, [prompt(600)])
    with engine(prompt_cache=PromptCache(tmp_path)) as made:
        made.prompt_cache.tiers.bytes_per_s = 1.0  # a very slow disk
        (record,) = run(made, [prompt(600)])
        assert record.restored_tokens == 0 and made.prompt_cache.kept.num_recomputed == 599
        assert made.prompt_cache.kept.seconds_per_cost > 0
        assert made.prompt_cache.counts("\0measured").num_nodes == 0
    with engine(prompt_cache=PromptCache(tmp_path)) as made:
        made.prompt_cache.kept.seconds_per_cost = 1.0  # a very slow model
        (record,) = run(made, [prompt(600)])
        assert record.restored_tokens == 599 and made.prompt_cache.tiers.bytes_per_s > 0
    with engine(prompt_cache=PromptCache(tmp_path, restore="never")) as made:
        assert run(made, [prompt(600)])[0].restored_tokens == 0


def test_pins_keep_files_and_can_be_taken_back(tmp_path):
    with engine(prompt_cache=PromptCache(tmp_path)) as made:
        cache = made.prompt_cache
        assert cache.pin("system", prompt(300), ttl=100.0) == 300
        run(made, [prompt(50, 4)])
        cache.tiers.flush()
        assert [pin.num_tokens for pin in cache.store.pins()] == [300] and cache.store.prune(max_bytes=0) == 1
        assert len(cache.store.entries()) == 2 and cache.unpin("system") and cache.store.pins() == []


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(ArgumentError, match="ttl: expected a path beside it, got none"):
        PromptCache(ttl=5.0)
    with pytest.raises(ArgumentError, match="max_bytes: expected more than 0, got 0"):
        PromptCache(tmp_path, max_bytes=0)
    with pytest.raises(ArgumentError, match="restore: expected one of measured, always, never, got 'often'"):
        PromptCache(tmp_path, restore="often")
    gc.collect()
