"""Bugs that other engines shipped and no other test looks for; the whole list is in docs/design/known-bugs.md."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from hasten.cache import KVCache
from hasten.engine import Sampling
from tests.engine.test_engine import BY_NAME, engine, ids_of, model, prompt, run


@pytest.mark.parametrize("num_more", [0, 1, 5])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "gpt_neox"])
def test_a_row_padded_on_the_left_says_what_it_says_alone(name, num_more):
    _, served = BY_NAME[name].pair()
    rows = [prompt(4), prompt(11), prompt(9)]
    width = 11 + num_more
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    asked = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = served.generate(ids, attention_mask=mask, past_key_values=KVCache(width + 9), **asked)
    for row, tokens in zip(rows, found[:, width:].tolist(), strict=True):
        one = torch.tensor([row])
        alone = served.generate(one, attention_mask=torch.ones_like(one), **asked)
        assert tokens == alone[0, len(row) :].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_cold_warm_and_batched_have_the_same_bits_where_that_is_promised(name):
    asked = Sampling(max_tokens=12, logprobs=3)
    with engine(model(name), reproducible=True, prompt_cache=True, num_pages=80) as made:
        (cold,) = made.generate([prompt(40)], asked)
        (warm,) = made.generate([prompt(40)], asked)
        *others, beside = made.generate([prompt(5), prompt(40, 3), prompt(17), prompt(40)], asked)
        assert cold.cached_tokens == 0 < min(warm.cached_tokens, beside.cached_tokens) and len(others) == 3
        assert cold.token_ids == warm.token_ids == beside.token_ids
        assert cold.logprobs == warm.logprobs == beside.logprobs


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi"])
def test_positions_are_good_up_to_the_end_of_the_context_however_the_prompt_is_cut(name):
    text, served = prompt(57), model(name)
    (record,) = run(engine(served, max_batch_tokens=9), [text], max_tokens=50)
    assert len(record.token_ids) == 64 - 57
    with torch.no_grad():
        logits = served(torch.tensor([[*text, *record.token_ids[:-1]]])).logits[0]
    assert logits[56:].argmax(-1).tolist() == list(record.token_ids)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_beams_over_pages_of_8_bits_take_their_scales_along(name, kv_dtype):
    asked = {"num_beams": 3, "num_return_sequences": 3, "max_tokens": 20}
    small, large = (
        run(engine(model(name), kv_dtype=kv_dtype, page_size=size, num_pages=60), [prompt(9), prompt(33)], **asked)
        for size in (16, 64)
    )
    assert ids_of(small) == ids_of(large)  # pages of 64 are copied in the middle, those of 16 mostly at their ends
    assert [one.score for one in small] == pytest.approx([one.score for one in large], abs=1e-4)


def test_names_that_look_alike_are_different_tenants():
    with engine(prompt_cache=True) as made:
        for salt in ("", "None", "a", "a/b", "a b"):
            (record,) = made.generate([prompt(33)], Sampling(max_tokens=1), salt=salt)
            assert record.cached_tokens == 0
            (record,) = made.generate([prompt(33)], Sampling(max_tokens=1), salt=salt)
            assert record.cached_tokens > 0


def test_every_attention_of_ours_comes_with_its_masks():
    engine().close()
    names = [name for name in AttentionInterface() if name.startswith("hasten")]
    assert {"hasten", "hasten-pages"} <= set(names) and all(name in AttentionMaskInterface() for name in names)
