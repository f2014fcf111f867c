"""`accelerate` serves every attention layer of a model, or says which one it cannot and changes nothing."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import hasten.models
from hasten.errors import ArgumentError, ArgumentTypeError
from hasten.ops.attention import attention
from tests.models.tiny import ARCHITECTURES, inputs

UNREACHED = {
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    ),
}
SERVED_OTHERWISE = {  # by `accelerate`, which changes classes; not by a name given to transformers
    "longformer": (
        "LongformerConfig",
        "LongformerForMaskedLM",
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "attention_window": 4,
            "intermediate_size": 8,
        },
    ),
    "led": (
        "LEDConfig",
        "LEDForConditionalGeneration",
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 4, "attention_window": 4, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8},
    ),
}
LAYERS = {"t5": 6, "bart": 6, "gemma2": 3, "gemma3": 3, "gpt_oss": 3}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_every_layer_is_listed_and_really_asks(architecture, monkeypatch):
    eager = architecture.build()
    expected = LAYERS.get(architecture.name, 2)
    assert len(hasten.models.attention_layers(eager)) == expected
    calls = []
    monkeypatch.setattr("hasten.models.interface.attention", lambda *a, **b: calls.append(a) or attention(*a, **b))
    fast = hasten.models.accelerate(eager)
    assert fast is eager
    fast(**inputs(architecture))
    assert len(calls) == expected


@pytest.mark.parametrize("name", UNREACHED)
def test_an_architecture_that_is_not_reached_is_refused_and_left_alone(name):
    config, model, options = UNREACHED[name]
    built = getattr(transformers, model)(getattr(transformers, config)(vocab_size=67, **options))
    before = built.config._attn_implementation
    with pytest.raises(ArgumentError, match=rf"{model}, whose \w+Attention.* Llama, Mistral") as caught:
        hasten.models.accelerate(built)
    assert "\n" not in str(caught.value)
    assert built.config._attn_implementation == before


@pytest.mark.parametrize("name", [*UNREACHED, *SERVED_OTHERWISE])
def test_asking_for_it_by_name_fails_loudly_too(name):
    config, model, options = (UNREACHED | SERVED_OTHERWISE)[name]
    made = getattr(transformers, config)(vocab_size=67, **options)
    with pytest.raises((AttributeError, TypeError, KeyError, ValueError)):
        built = getattr(transformers, model)._from_config(made, attn_implementation="hasten")
        built.eval()(torch.ones(1, 8, dtype=torch.int64))


class ForeignAttention(nn.Module):
    """Remote code that computes attention on its own."""


def test_one_foreign_layer_among_known_ones_is_refused():
    model = ARCHITECTURES[0].build()
    model.model.layers[1].cross = ForeignAttention()
    with pytest.raises(ArgumentError, match="LlamaForCausalLM, whose ForeignAttention would not be reached"):
        hasten.models.accelerate(model)
    assert model.config._attn_implementation == "eager"


def test_a_layer_that_keeps_another_implementation_is_found_out_and_the_model_is_put_back():
    model = ARCHITECTURES[0].build()
    model.model.layers[1].self_attn.config = model.config.__class__(attn_implementation="sdpa")
    with pytest.raises(ArgumentError, match=r"whose model\.layers\.1\.self_attn would not be reached"):
        hasten.models.accelerate(model)
    assert model.config._attn_implementation == "eager"


def test_a_model_inside_a_wrapper_is_found():
    model = ARCHITECTURES[0].build()
    wrapper = nn.Sequential(nn.ModuleDict({"base": model}))
    assert hasten.models.accelerate(wrapper) is wrapper
    assert model.config._attn_implementation == "hasten"


def test_a_torch_module_is_refused():
    with pytest.raises(ArgumentTypeError, match="model: expected a transformers PreTrainedModel, got Linear"):
        hasten.models.accelerate(nn.Linear(2, 2))


def test_an_unknown_implementation_is_refused_before_anything_changes():
    model = ARCHITECTURES[0].build()
    with pytest.raises(ArgumentError, match="implementation"):
        hasten.models.accelerate(model, implementation="fastest")
    assert model.config._attn_implementation == "eager"
