"""The engine on a GPU: the tokens of transformers for every decoder, cut, batched, forked and preempted."""

from __future__ import annotations

import pytest
import torch

from hasten.engine import Engine, Sampling
from tests.models.tiny import DECODERS, tokens

pytestmark = pytest.mark.gpu
LENGTHS, NEW = (5, 16, 33), 12


@pytest.mark.parametrize("num_pages", [40, 5])
@pytest.mark.parametrize("architecture", DECODERS, ids=str)
def test_tokens_are_those_of_transformers(architecture, num_pages):
    model = architecture.build().cuda()
    model.generation_config.eos_token_id = None
    prompts = [tokens(1, length, length)[0].tolist() for length in LENGTHS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        expected.append(tuple(out[0, len(prompt) :].tolist()))
    with Engine(model, num_pages=num_pages, max_running=8, max_batch_tokens=16) as engine:
        records = engine.generate(prompts * 3, Sampling(max_tokens=NEW))
        assert [one.token_ids for one in records] == expected * 3
        drawn = Sampling(max_tokens=NEW, temperature=1.0, seed=3)
        forked = engine.submit(prompts[2], Sampling(max_tokens=NEW, temperature=1.0, seed=3, n=3)).result()
        assert forked[0].token_ids == engine.generate([prompts[2]], drawn)[0].token_ids
        engine.check_integrity()
