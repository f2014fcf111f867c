"""A runner gives the tokens of transformers' greedy decoding, however it computes them, and says how it did."""

from __future__ import annotations

import pytest
import torch

from hasten.engine.runner import Runner, context_length, step_threads
from hasten.errors import ArgumentError
from hasten.models import accelerate
from tests.models.tiny import GENERATORS, tokens

PROMPT, NEW = 9, 30
LLAMA = GENERATORS[0]
WAYS = {
    "recorded": {},
    "laid_out": {"may_lay_out": True},
    "plain": {"can_record": False},
    "no_cache": {"use_cache": False},
}


def greedy(runner, prompt, new=NEW):
    """Token ids, at most `new` of them."""
    first = [runner.model.config.decoder_start_token_id] if runner.model.config.is_encoder_decoder else []
    logits, ids = runner.begin(prompt, first, new), []
    while True:
        ids.append(int(logits.argmax()))
        if len(ids) == new:
            return ids
        logits = runner.next(ids[-1])


def build(architecture, **options):
    model = architecture.build(**options)
    model.generation_config.eos_token_id = None  # all of NEW tokens are compared
    return model


def of_transformers(model, prompt, new=NEW):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, -new:].tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", GENERATORS, ids=str)
def test_tokens_are_those_of_transformers(architecture, way):
    eager, prompt = build(architecture), tokens(1, PROMPT)[0].tolist()
    expected = of_transformers(eager, prompt)
    runner = Runner(accelerate(eager), **WAYS[way])
    assert greedy(runner, prompt) == expected
    assert runner.path.startswith({"plain": "the model's own", "no_cache": "no KV cache"}.get(way, "recorded step"))


@pytest.mark.parametrize("architecture", GENERATORS, ids=str)
def test_requests_follow_each_other(architecture):
    model = build(architecture)
    runner = Runner(model)
    for length in (PROMPT, 4, 12, PROMPT):
        prompt = tokens(1, length, seed=length)[0].tolist()
        assert greedy(runner, prompt, 12) == greedy(Runner(model, can_record=False), prompt, 12)


def test_a_decoder_is_recorded_once_for_all_lengths():
    runner = Runner(build(LLAMA))
    greedy(runner, [5, 6, 7], 4)
    recorded = runner._step
    greedy(runner, [5] * 20, 9)
    assert runner._step is recorded


@pytest.mark.parametrize(("way", "expected"), [("recorded", 38), ("plain", 38), ("no_cache", sum(range(9, 39)))])
def test_positions_are_counted(way, expected):
    runner = Runner(build(LLAMA), **WAYS[way])
    greedy(runner, tokens(1, PROMPT)[0].tolist())
    assert runner.num_positions == expected


def test_warming_up_records_and_changes_no_token():
    cold, warm = Runner(build(LLAMA)), Runner(build(LLAMA))
    warm.warm_up()
    recorded = warm._step
    assert recorded is not None and warm._is_checked
    assert greedy(warm, [5, 6, 7]) == greedy(cold, [5, 6, 7])
    assert warm._step is recorded and warm.num_positions == cold.num_positions


@pytest.mark.parametrize("architecture", [one for one in GENERATORS if one.kind == "seq2seq"], ids=str)
def test_warming_up_leaves_an_encoder_decoder_alone(architecture):
    runner = Runner(build(architecture))
    runner.warm_up()
    assert runner._step is None and runner.cache is None


SCALED = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("kind", SCALED)
def test_positions_beyond_the_original_length(kind):
    """Rotations that change with the length cannot be recorded; the tokens are right either way."""
    model = build(LLAMA, rope_parameters=SCALED[kind], max_position_embeddings=16 if kind == "dynamic" else 64)
    expected = of_transformers(model, [5, 6, 7])
    runner = Runner(model)
    assert greedy(runner, [5, 6, 7]) == expected
    assert runner.path.startswith("recorded step" if kind == "llama3" else "the model's own forward: ")


def test_parts_with_different_attention_are_left_as_they_are():
    model = build(next(one for one in GENERATORS if one.name == "bart"))
    model.model.encoder.config = model.model.encoder.config.__class__.from_dict(model.config.to_dict())
    model.model.encoder.config._attn_implementation = "sdpa"
    runner = Runner(model)
    greedy(runner, [5, 6, 7], 6)
    assert runner.path == "the model's own forward: its parts attend by eager, sdpa"


def test_a_forward_that_depends_on_values_goes_on_unrecorded():
    model = build(LLAMA)
    expected = of_transformers(model, [5, 6, 7], 12)
    norm = type(model.model.norm)

    class Choosy(norm):
        def forward(self, x):
            return super().forward(x if x.sum() > -1e9 else -x)

    model.model.norm.__class__ = Choosy
    runner = Runner(model)
    assert greedy(runner, [5, 6, 7], 12) == expected
    assert runner.path == "the model's own forward: __bool__ depends on values, not on shapes alone"


def test_a_forward_that_counts_its_calls_is_found_out():
    """Nothing in it looks unrecordable, but the second call is not the first one again."""
    model = build(LLAMA)
    norm = type(model.model.norm)

    class Counting(norm):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return super().forward(x) * Counting.calls

    model.model.norm.__class__ = Counting
    runner = Runner(model)
    greedy(runner, [5, 6, 7], 8)
    assert "logits differ by" in runner.path


@pytest.mark.parametrize("way", ["recorded", "plain"])
def test_more_tokens_than_asked_for_are_refused(way):
    runner = Runner(build(LLAMA), **WAYS[way])
    runner.begin([5, 6, 7], [], 2)
    runner.next(8), runner.next(9)
    with pytest.raises(ArgumentError, match="capacity: expected at least 6 tokens, got 5"):
        runner.next(10)


@pytest.mark.parametrize("architecture", [LLAMA, GENERATORS[-1], GENERATORS[-2]], ids=str)
def test_a_token_takes_the_same_bytes_with_and_without_a_cache(architecture):
    model = build(architecture)
    with_cache, without = Runner(model), Runner(model, use_cache=False)
    for runner in (with_cache, without):
        greedy(runner, [5, 6, 7], 4)
    assert with_cache.cache_bytes_per_token() == without.cache_bytes_per_token() > 0
    assert without.cache is None


def test_threads_are_as_before_after_a_step():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, seen = build(LLAMA), []
        model.register_forward_pre_hook(lambda *ignored: seen.append(torch.get_num_threads()))
        runner = Runner(model, step_threads=1, can_record=False)
        greedy(runner, [5, 6, 7], 4)
        assert torch.get_num_threads() == 2 and seen == [1] * 4
        runner.begin([5] * 65, [], 2)
        assert seen[4:] == [2]
    finally:
        torch.set_num_threads(before)


def test_a_small_model_decodes_on_one_thread():
    model = build(LLAMA)
    assert step_threads(model) == 1
    model.big = torch.nn.Parameter(torch.empty(2**24 + 1))
    assert step_threads(model) is None


def test_the_context_is_read_from_the_configuration():
    assert {one.name: context_length(build(one).config) for one in GENERATORS} == {
        one.name: None if one.name == "t5" else 64 for one in GENERATORS
    }
