"""Choices are those of transformers for the same draws, a seed is the request's own, and bad values are named."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from hasten.engine import Sampling, generate
from hasten.engine.runner import Runner
from hasten.engine.sampling import MAX_SEED, Chooser, processors
from hasten.errors import ArgumentError, ArgumentTypeError, CheckpointError
from tests.models.tiny import GENERATORS, VOCAB, tokens

CPU = torch.device("cpu")
PROMPT = tokens(1, 9)[0].tolist()
BY_NAME = {one.name: one for one in GENERATORS}
CHOICES = {
    "temperature": {"temperature": 0.7},
    "one": {"temperature": 1.0},
    "top_k": {"temperature": 1.3, "top_k": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.6},
    "min_p": {"temperature": 2.0, "min_p": 0.2},
    "all": {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
}
RULES = {
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[5], [6, 7]]},
    "min_length": {"min_length": 12},
    "min_new_tokens": {"min_new_tokens": 8},
    "forced": {"forced_bos_token_id": 9, "forced_eos_token_id": 2},
    "suppress": {"suppress_tokens": [3, 4, 5, 6, 7, 8], "begin_suppress_tokens": [10, 11]},
    "repetition_penalty": {"repetition_penalty": 1.5},
}


def ours(model, **options):
    *_, finished = generate(Runner(model), None, PROMPT, Sampling(max_tokens=12, **options))
    return list(finished.token_ids)


def of_transformers(model, seed=None, **options):
    ids = torch.tensor([PROMPT])
    names = {"top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": None, **options}
    if seed is not None:
        torch.manual_seed(seed)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=seed is not None, **names
    )
    return out[0, 1 if model.config.is_encoder_decoder else len(PROMPT) :].tolist()


def restrict(model, **rules):
    for name, value in rules.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_tokens_are_those_of_transformers_with_the_same_seed(choice, seed):
    model = BY_NAME["llama"].build()
    assert ours(model, seed=seed, **CHOICES[choice]) == of_transformers(model, seed, **CHOICES[choice])


@pytest.mark.filterwarnings("ignore:.*generation flags are not valid:UserWarning")
@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_a_greedy_penalty_is_that_of_transformers(penalty):
    model = BY_NAME["llama"].build()
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": penalty}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(PROMPT) :].tolist()
    assert ours(model, repetition_penalty=penalty) == expected


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_the_rules_of_a_checkpoint_are_those_of_transformers(name, rules):
    model = restrict(BY_NAME[name].build(), **RULES[rules])
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert ours(model) == out[0, 1 if name == "bart" else len(PROMPT) :].tolist()


def test_a_penalty_of_the_request_takes_the_place_of_the_checkpoints():
    model = BY_NAME["llama"].build()
    without = ours(model)
    restrict(model, repetition_penalty=2.0)
    assert ours(model) != without == ours(model, repetition_penalty=1.0)


def test_nothing_is_processed_where_nothing_is_asked():
    assert not processors(Sampling(), GenerationConfig(eos_token_id=2), 4, 9, CPU)
    assert not processors(Sampling(temperature=1.0, top_p=1.0), None, 4, 9, CPU)


def test_a_rule_that_is_not_known_is_refused():
    rules = GenerationConfig(sequence_bias={(5,): 1.0})
    with pytest.raises(CheckpointError, match=r"asks for sequence_bias .*, which is not supported; remove"):
        processors(Sampling(), rules, 4, 9, CPU)


def test_a_seed_is_the_requests_own():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.5, seed=7)

    def draw(chooser, other=None):
        found = []
        for _ in range(20):
            found.append(chooser.choose(logits, []))
            if other is not None:
                other.choose(logits, [])
                torch.rand(3)
        return found

    alone = draw(Chooser(sampling, None, 0, 9, CPU))
    torch.manual_seed(99)
    among_others = draw(Chooser(sampling, None, 0, 9, CPU), Chooser(Sampling(temperature=1.5), None, 0, 9, CPU))
    assert alone == among_others
    state = torch.get_rng_state()
    draw(Chooser(sampling, None, 0, 9, CPU))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_that_was_drawn_can_be_given_again():
    drawn = Chooser(Sampling(temperature=1.0), None, 0, 9, CPU)
    assert 0 <= drawn.seed <= MAX_SEED
    again = Chooser(Sampling(temperature=1.0, seed=drawn.seed), None, 0, 9, CPU)
    logits = torch.zeros(VOCAB)
    assert [drawn.choose(logits, []) for _ in range(9)] == [again.choose(logits, []) for _ in range(9)]
    assert Chooser(Sampling(temperature=1.0), None, 0, 9, CPU).seed != drawn.seed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: expected an int >= 1, got 0"),
        ({"max_tokens": 1.5}, "max_tokens: expected an int >= 1, got 1.5"),
        ({"max_tokens": None}, "max_tokens: expected an int >= 1, got None"),
        ({"max_tokens": True}, "max_tokens: expected an int >= 1, got True"),
        ({"temperature": -0.1}, "temperature: expected a number, at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature: expected a number, at least 0, got nan"),
        ({"temperature": float("inf")}, "temperature: expected a number, at least 0, got inf"),
        ({"temperature": "hot"}, "temperature: expected a number, at least 0, got 'hot'"),
        ({"temperature": 1, "top_k": 0}, "top_k: expected an int >= 1, got 0"),
        ({"temperature": 1, "top_p": 0.0}, "top_p: expected a number, more than 0, at most 1, got 0.0"),
        ({"temperature": 1, "top_p": 1.1}, "top_p: expected a number, more than 0, at most 1, got 1.1"),
        ({"temperature": 1, "min_p": -1}, "min_p: expected a number, 0 to 1, got -1"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number, more than 0, got 0"),
        ({"seed": -1}, "seed: expected an int from 0 to"),
        ({"seed": 2**63}, "seed: expected an int from 0 to"),
        ({"top_k": 5}, "top_k: expected a temperature above 0, got top_k with temperature 0"),
        ({"top_p": 0.5}, "top_p: expected a temperature above 0"),
        ({"min_p": 0.5}, "min_p: expected a temperature above 0"),
        ({"stop": "END"}, "stop: expected a tuple, got 'END'"),
        ({"stop": ("",)}, "stop: expected strings that are not empty, got ''"),
        ({"stop": (3,)}, "stop: expected strings that are not empty, got 3"),
        ({"stop_ids": 3}, "stop_ids: expected a tuple, got 3"),
        ({"stop_ids": (-1,)}, "stop_ids: expected token ids >= 0, got -1"),
        ({"stop_ids": ("2",)}, "stop_ids: expected token ids >= 0, got '2'"),
    ],
    ids=str,
)
def test_bad_values_are_named(options, message):
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        Sampling(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_positional_and_unknown_fields_are_refused():
    with pytest.raises(TypeError):
        Sampling(3)
    with pytest.raises(TypeError):
        Sampling(best_of=3)
