"""Heads are read where the forward pass reads them, and written back to the same bytes."""

from __future__ import annotations

import pytest
import torch

from hasten.convert import heads
from hasten.errors import ArgumentError
from tests.convert import families


@pytest.mark.parametrize("name", families.FAMILIES)
def test_reading_and_writing_gives_the_same_tensors(name):
    model = families.build(name, torch.bfloat16)
    state = model.state_dict()
    for site in heads.sites(model):
        written = heads.write(site, heads.read(site, state), state, site.layout)
        assert {key for key in state if key.startswith(f"{site.path}.") and "norm" not in key and "bias" not in key} - {
            f"{site.path}.relative_attention_bias.weight"
        } <= set(written)
        assert all(torch.equal(tensor, state[key]) for key, tensor in written.items())


@pytest.mark.parametrize(
    ("name", "count", "rotary", "may_permute"),
    [
        ("llama", 2, 8, [True, True]),
        ("phi3-half-rotary", 2, 4, [True, True]),
        ("gpt2", 2, 0, [True, True]),
        ("falcon-alibi", 2, 0, [False, False]),
        ("falcon-serial", 2, 8, [True, True]),
        ("t5", 4, 0, [False, True, False, True]),
        ("bart", 4, 0, [True, True, True, True]),
    ],
)
def test_sites_know_their_sizes_and_freedom(name, count, rotary, may_permute):
    found = heads.sites(families.build(name))
    assert len(found) == count
    assert all((s.num_heads, s.num_kv_heads, s.head_dim, s.rotary_dim) == (4, 4, 8, rotary) for s in found)
    assert [site.may_permute for site in found] == may_permute


def test_the_groups_of_a_grouped_model_are_seen():
    (first, *_) = heads.sites(families.build("phi3", num_key_value_heads=2))
    assert (first.num_kv_heads, first.group_size) == (2, 2)
    (first, *_) = heads.sites(families.build("falcon-new", num_kv_heads=1))
    assert (first.num_kv_heads, first.group_size) == (1, 4)


def test_models_without_cached_attention_are_refused():
    with pytest.raises(ArgumentError, match="T5EncoderModel, which has none"):
        from transformers import T5EncoderModel

        heads.sites(T5EncoderModel(families.build("t5").config))
    with pytest.raises(ArgumentError, match="multi_query=False"):
        from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

        options = {"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 67, "multi_query": False}
        heads.sites(GPTBigCodeForCausalLM(GPTBigCodeConfig(**options)))
    with pytest.raises(ArgumentError, match="add_cross_attention=True"):
        heads.sites(families.build("gpt2", add_cross_attention=True))
