"""The prompt cache of a transformers user: forks of kept prefixes give `generate` the tokens it has without them."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import hasten
from hasten.cache.prompt_cache import PromptCache
from hasten.errors import ArgumentError, ArgumentTypeError
from tests.models.tiny import ARCHITECTURES, tokens

BY_NAME = {one.name: one for one in ARCHITECTURES}


@cache
def model(name):
    built = BY_NAME[name].build(max_position_embeddings=700)
    built.generation_config.eos_token_id = None
    return built


def prompt(length, seed=1):
    return tokens(1, length, seed)[0].tolist()


def generate(of, ids, past=None):
    ids = torch.tensor([ids])
    options = {} if past is None else {"past_key_values": past}
    out = of.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, **options)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2"])
@pytest.mark.parametrize("length", [1, 17, 64, 300])
def test_generate_goes_on_from_a_fork(tmp_path, name, length):
    ids = [*prompt(length), *prompt(5, 3)]
    if name == "gpt2":
        ids = ids[:55]
        length = min(length, 50)
    of = model(name) if name != "gpt2" else BY_NAME[name].build()
    of.generation_config.eos_token_id = None
    cold = generate(of, ids)
    cache = PromptCache.load(tmp_path, of)
    assert cache.pin("system", ids[:length], ttl=60.0) == length
    cache.close()
    cache = PromptCache.load(tmp_path, of)
    for _ in range(2):  # what the first wrote is not in the second
        past = cache.fork(torch.tensor([ids]))
        assert past.get_seq_length() == length and generate(of, ids, past) == cold
    assert past.get_seq_length() == len(ids) + 5
    if name in ("gemma2", "mistral"):
        with pytest.raises(ArgumentError, match="past: expected a cache of all tokens, got one that has 3 of"):
            cache.add([*ids, *cold[:-1]], past)
        return
    cache.add([*ids, *cold[:-1]], past)
    cache.flush()
    again = cache.fork([*ids, *cold, 5])
    assert again.get_seq_length() == len(ids) + 5 and cache.problems == []
    assert generate(of, [*ids, *cold, 5][:58], cache.fork([*ids, *cold, 5][:58])) == generate(of, [*ids, *cold, 5][:58])


def test_an_engine_and_a_library_share_a_folder(tmp_path):
    of, ids = model("llama"), prompt(300)
    with hasten.Engine(of, num_pages=60, prompt_cache=hasten.PromptCache(tmp_path)) as engine:
        (record,) = engine.generate([ids], {"max_tokens": 6})
    cache = PromptCache.load(tmp_path, of)
    past = cache.fork(ids)
    assert past.get_seq_length() == 299 and generate(of, ids, past) == list(record.token_ids)
    cache.pin("other", prompt(280, 9))
    cache.close()
    with hasten.Engine(of, num_pages=60, prompt_cache=PromptCache(tmp_path, restore="always")) as engine:
        (record,) = engine.generate([[*prompt(280, 9), 5]], {"max_tokens": 6})
        assert record.restored_tokens == 280 and list(record.token_ids) == generate(of, [*prompt(280, 9), 5])


def test_another_model_or_tenant_has_nothing(tmp_path):
    cache = PromptCache.load(tmp_path, model("llama"))
    cache.pin("system", prompt(40))
    assert cache.fork(prompt(40), salt="b").get_seq_length() == 0
    assert cache.unpin("system") and not cache.unpin("system")
    cache.close()
    assert PromptCache.load(tmp_path, model("qwen3")).fork(prompt(40)).get_seq_length() == 0


def test_what_cannot_be_is_said(tmp_path):
    cache = PromptCache.load(tmp_path)
    with pytest.raises(ArgumentError, match="model: expected the one that the cache is for, got none"):
        cache.fork([1, 2])
    cache.close()
    cache = PromptCache.load(tmp_path, model("llama"))
    with pytest.raises(ArgumentError, match="prompt: expected token ids, since there is no tokenizer, got a text"):
        cache.fork("text")
    with pytest.raises(ArgumentError, match=r"prompt: expected one prompt: \(n,\) or \(1, n\), got \(2, 3\)"):
        cache.fork(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ArgumentTypeError, match="prompt: expected a text or token ids, got int"):
        cache.fork(5)
    with pytest.raises(ArgumentError, match="tokens: expected 0, as many as the cache holds, got 3"):
        cache.add([1, 2, 3], cache.fork([1, 2, 3]))
    with pytest.raises(ArgumentError, match="is_chat: expected False without an engine"):
        cache.pin("x", [1, 2], is_chat=True)
