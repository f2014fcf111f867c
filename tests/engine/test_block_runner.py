"""The logits of a token have the same bits alone, in any batch and at any cut, and are those of the model."""

from __future__ import annotations

import random

import pytest
import torch

from hasten.cache.paged import PagedCache, kinds_of, layers_of
from hasten.engine import Sampling
from hasten.engine.block_runner import BlockRunner
from hasten.errors import ArgumentError
from tests.engine.test_batch_runner import run_in_pieces
from tests.engine.test_engine import BY_NAME, engine, model, prompt, run
from tests.models.tiny import DECODERS, distance

PROMPT = prompt(40)
OTHERS = [prompt(1 + 5 * place % 29, 100 + place) for place in range(32)]
MODELS = [(one, torch.float32, 1) for one in DECODERS if one.name != "gpt_oss"]
MODELS += [
    (BY_NAME["llama"], torch.bfloat16, 1),
    (BY_NAME["gpt2"], torch.bfloat16, 1),
    (BY_NAME["gemma2"], torch.float32, 2),
]


def runner(of, page_size=16, threads=1):
    """Pages that hold NaN where nothing was written."""
    layers = layers_of(of)
    cache = PagedCache(layers, [200] * len(kinds_of(layers)), page_size, of.dtype, "cpu")
    for pools in cache.pools:
        for pool in pools:
            pool.fill_(float("nan"))
    return BlockRunner(of, cache, step_threads=threads)


@pytest.mark.parametrize(("architecture", "dtype", "threads"), MODELS, ids=str)
def test_bits_are_equal_alone_and_among_32_others(architecture, dtype, threads):
    built = architecture.build(dtype)
    with torch.no_grad():
        expected = built(torch.tensor([PROMPT])).logits[0]
    made = runner(built, threads=threads)
    assert made.step_threads == threads
    (alone,) = run_in_pieces(made, [PROMPT], lambda step, row: len(PROMPT))
    assert distance(alone, expected) < (1e-5 if dtype == torch.float32 else 5e-2)
    (single,) = run_in_pieces(made, [PROMPT], lambda step, row: 1)
    assert torch.equal(single, alone)
    draw = random.Random(0)
    prompts = [*OTHERS[:17], PROMPT, *OTHERS[17:]]
    found = run_in_pieces(made, prompts, lambda step, row: draw.randint(1, 9))
    assert torch.equal(found[17], alone)
    made.close()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bits_are_equal_at_every_cut(name):
    made = runner(BY_NAME[name].build())
    (whole,) = run_in_pieces(made, [PROMPT], lambda step, row: len(PROMPT))
    for cut in range(1, len(PROMPT)):
        (found,) = run_in_pieces(made, [PROMPT], lambda step, row, cut=cut: len(PROMPT) - cut if step else cut)
        assert torch.equal(found, whole), f"cut at {cut}"


@pytest.mark.parametrize("page_size", [16, 128])
def test_bits_are_equal_over_several_tiles(page_size):
    built = BY_NAME["gemma2"].build(max_position_embeddings=512)
    made, text = runner(built, page_size), prompt(300)
    with torch.no_grad():
        expected = built(torch.tensor([text])).logits[0]
    (whole,) = run_in_pieces(made, [text], lambda step, row: 300)
    assert distance(whole, expected) < 1e-5
    draw = random.Random(1)
    found = run_in_pieces(made, [prompt(150, 1), text, prompt(63, 2)], lambda step, row: draw.randint(1, 40))
    assert torch.equal(found[1], whole)


def test_the_usual_runner_differs_so_that_this_says_something():
    found = set()
    for budget in (8, 40):
        (record,) = run(engine(max_batch_tokens=budget, max_running=4), [PROMPT], prompt_logprobs=0, max_tokens=1)
        found.add(tuple(one.logprob for one in record.prompt_logprobs[1:]))
    assert len(found) == 2


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_engine_says_the_same_with_preemption_drafts_forks_and_others(name):
    asked = {"prompt_logprobs": 2, "logprobs": 3, "max_tokens": 20, "temperature": 0.7, "seed": 5, "n": 2}
    alone = run(engine(model(name), reproducible=True), [PROMPT], **asked)
    for options in ({}, {"num_pages": 6, "max_batch_tokens": 9}, {"prompt_lookup_num_tokens": 4}):
        with engine(model(name), reproducible=True, **options) as made:
            others = [made.submit(one, Sampling(max_tokens=9)) for one in OTHERS[:6]]
            found = made.submit(PROMPT, asked).result()
            assert all(handle.result() for handle in others)
        assert [one.token_ids for one in found] == [one.token_ids for one in alone]
        assert [one.logprobs for one in found] == [one.logprobs for one in alone]
        assert found[0].prompt_logprobs == alone[0].prompt_logprobs


def test_what_cannot_be_reproducible_is_named():
    served = BY_NAME["gpt_oss"].build()
    with pytest.raises(ArgumentError, match="reproducible: expected a model without experts"):
        engine(served, reproducible=True)
    assert served.config._attn_implementation == "eager"
    with pytest.raises(ArgumentError, match=r"reproducible: expected layers of a size that 4 divides.* of 45"):
        engine(BY_NAME["llama"].build(intermediate_size=45), reproducible=True)
    with pytest.raises(ArgumentError, match="kv_dtype: expected None for a reproducible engine"):
        engine(reproducible=True, kv_dtype="int8")
    with pytest.raises(ArgumentError, match="cuda_graphs: expected False beside reproducible"):
        engine(reproducible=True, cuda_graphs=True)
