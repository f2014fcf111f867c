"""A batch of rows gives each request the tokens it would get alone, whatever the others are."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import GenerationConfig

from hasten.engine.sampler import NO_TOKEN, Wanted, choose, logprobs
from hasten.engine.sampling import Chooser, Sampling, draw

CPU = torch.device("cpu")
VOCAB = 211
RULES = GenerationConfig(suppress_tokens=[5, 6])
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
    {"logit_bias": {7: 100.0}},
    {"temperature": 1.0, "logit_bias": {7: 3.0, 9: -100.0}},
    {"presence_penalty": 1.5},
    {"temperature": 1.0, "frequency_penalty": -0.7},
    {"repetition_penalty": 1.8},
]


def choosers(rules=None):
    return [
        Chooser(Sampling(seed=3 * seed, **settings), rules, 4, 60, CPU) for seed in range(2) for settings in SETTINGS
    ]


@pytest.mark.parametrize("rules", [None, RULES], ids=["plain", "suppress"])
@pytest.mark.parametrize("order", range(2))
def test_a_batch_chooses_as_each_would_alone(rules, order):
    batched, alone = choosers(rules), choosers(rules)
    histories = [[1, 2, 3, number] for number in range(len(alone))]
    for step in range(6):
        logits = 3.0 * torch.randn(len(alone), VOCAB, generator=torch.Generator().manual_seed(step))
        places = list(range(len(alone)))
        if order:
            random.Random(order + step).shuffle(places)
        wanted = [Wanted(place, batched[place], histories[place]) for place in places]
        tokens = choose(logits, wanted).tolist()
        for place, token in zip(places, tokens, strict=True):
            assert token == alone[place].choose(logits[place], histories[place])
            histories[place].append(token)


def test_a_row_can_give_several_tokens():
    logits = torch.randn(2, VOCAB)
    several = [Chooser(Sampling(temperature=1.0, seed=seed), None, 1, 9, CPU) for seed in range(5)]
    tokens = choose(logits, [Wanted(1, one, [1]) for one in several]).tolist()
    again = [Chooser(Sampling(temperature=1.0, seed=seed), None, 1, 9, CPU) for seed in range(5)]
    assert tokens == [one.choose(logits[1], [1]) for one in again] and len(set(tokens)) > 1


def test_a_row_that_is_no_number_gives_no_token_and_touches_no_other():
    logits = torch.randn(4, VOCAB)
    logits[1, 3] = float("nan")
    made = [Chooser(Sampling(temperature=heat, seed=1), None, 1, 9, CPU) for heat in (0.0, 0.0, 1.0, 1.0)]
    tokens = choose(logits, [Wanted(row, one, [1]) for row, one in enumerate(made)]).tolist()
    assert tokens[1] == NO_TOKEN and NO_TOKEN not in (tokens[0], *tokens[2:])


def test_draws_are_those_of_multinomial():
    probabilities = torch.randn(6, VOCAB).softmax(-1)
    drawn = draw(probabilities, [torch.Generator().manual_seed(seed) for seed in range(6)])
    alone = [
        torch.multinomial(row, 1, generator=torch.Generator().manual_seed(i)) for i, row in enumerate(probabilities)
    ]
    assert drawn.tolist() == torch.cat(alone).tolist()


def test_seeds_of_one_batch_are_not_correlated():
    probabilities = torch.full((1000, 2), 0.5)
    drawn = draw(probabilities, [torch.Generator().manual_seed(seed) for seed in range(1000)])
    assert 400 < drawn.sum() < 600


def test_logprobs_are_those_of_the_model():
    logits = torch.randn(3, VOCAB)
    tokens = torch.tensor([5, NO_TOKEN, 7])
    own, values, ids = logprobs(logits, tokens, 4)
    expected = logits.log_softmax(-1)
    assert torch.allclose(own[0], expected[0, 5]) and torch.allclose(own[2], expected[2, 7])
    assert torch.allclose(values, expected.topk(4).values) and torch.equal(ids, expected.topk(4).indices)
    assert logprobs(logits, tokens, 0)[1].shape == (3, 0)
