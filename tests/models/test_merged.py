"""Merged projections give the logits of the model as it was; names, values and what is not plain stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from hasten.models.merged import MergedLinear, merge
from tests.models.tiny import DECODERS, distance, tokens

BY_NAME = {one.name: one for one in DECODERS}
#: how many groups of a layer of each architecture: q, k, v and gate, up; GPT-2 has no nn.Linear there, GPT-NeoX has qkv
GROUPS = {"llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 2, "gemma2": 2, "gemma3": 2, "gpt_oss": 1, "gpt2": 0,
          "gpt_neox": 0, "phi": 1, "phi3": 0}  # fmt: skip


@pytest.mark.parametrize("architecture", DECODERS, ids=str)
def test_logits_and_parameters_are_those_of_the_model(architecture):
    plain = architecture.build()
    made = copy.deepcopy(plain)
    merged = merge(made)
    assert len(merged.names) == GROUPS[architecture.name] * made.config.num_hidden_layers
    for name, value in plain.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name
    assert list(made.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for ids in (tokens(1, 1), tokens(2, 9)):
            assert distance(made(ids).logits, plain(ids).logits) < 1e-6
    merged.undo()
    assert not any(isinstance(layer, MergedLinear) for layer in made.modules())
    with torch.no_grad():
        assert torch.equal(made(tokens(2, 9)).logits, plain(tokens(2, 9)).logits)
    assert merge(made).names == merged.names  # once more, for the next engine


def test_one_product_is_computed_for_all(monkeypatch):
    made = BY_NAME["qwen2"].build()  # has biases
    merge(made)
    attention, calls = made.model.layers[0].self_attn, []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *terms: (calls.append(terms[1].shape), linear(*terms))[1])
    with torch.no_grad():
        made(tokens(1, 5))
    assert calls.count((64, 32)) == 2 and calls.count((96, 32)) == 2 and attention.q_proj.weight.shape not in calls[:1]
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()


def test_weights_stay_those_of_a_model_that_can_be_trained():
    made = BY_NAME["llama"].build()
    with torch.inference_mode():
        merged = merge(made)
    assert len(merged.names) == 4 and not any(weight.is_inference() for weight in made.parameters())
    made(tokens(2, 7)).logits.sum().backward()
    assert all(weight.grad is not None and weight.requires_grad for weight in made.parameters())


def test_layers_called_alone_or_with_gradients_compute_their_own():
    plain = BY_NAME["llama"].build()
    made = copy.deepcopy(plain)
    merge(made)
    (plain(tokens(2, 7)).logits.square().sum()).backward()
    (made(tokens(2, 7)).logits.square().sum()).backward()
    for (name, one), other in zip(plain.named_parameters(), made.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    x = torch.randn(3, 32)
    with torch.no_grad():
        for layer in ("k_proj", "q_proj", "v_proj"):
            own, its = (getattr(each.model.layers[1].self_attn, layer) for each in (made, plain))
            assert distance(own(x), its(x)) < 1e-6 and distance(own(x + 1), its(x + 1)) < 1e-6


def test_weights_may_change_in_place_or_move(tmp_path):
    plain = BY_NAME["llama"].build()
    made = copy.deepcopy(plain)
    merge(made)
    with torch.no_grad():
        for each in (plain, made):
            each.model.layers[0].self_attn.k_proj.weight.mul_(2.0)
        assert distance(made(tokens(1, 9)).logits, plain(tokens(1, 9)).logits) < 1e-6
        made.load_state_dict(BY_NAME["llama"].build().state_dict())
        assert distance(made(tokens(1, 9)).logits, BY_NAME["llama"].build()(tokens(1, 9)).logits) < 1e-6
        moved = made.model.layers[0].mlp.up_proj
        moved.weight.data = moved.weight.data * 3.0
        plain = BY_NAME["llama"].build()
        plain.model.layers[0].mlp.up_proj.weight.mul_(3.0)
        assert distance(made(tokens(1, 9)).logits, plain(tokens(1, 9)).logits) < 1e-6
        assert distance(copy.deepcopy(made)(tokens(1, 9)).logits, plain(tokens(1, 9)).logits) < 1e-6
        made.save_pretrained(tmp_path)
        again = type(made).from_pretrained(tmp_path, attn_implementation="eager")
        assert torch.equal(again(tokens(1, 9)).logits, plain(tokens(1, 9)).logits)


class Scaled(nn.Linear):
    """Not plain."""

    def forward(self, x):
        return 2.0 * super().forward(x)


def test_what_is_not_plain_is_left_alone():
    def names(change):
        made = BY_NAME["llama"].build()
        layer = made.model.layers[0].self_attn
        change(layer)
        plain, merged = copy.deepcopy(made), merge(made)
        with torch.no_grad():
            assert distance(made(tokens(1, 9)).logits, plain(tokens(1, 9)).logits) < 1e-6
        return [name for group in merged.names for name in group if name.startswith("model.layers.0.self_attn")]

    prefix = "model.layers.0.self_attn."
    assert names(lambda layer: None) == [f"{prefix}{name}_proj" for name in "qkv"]
    assert names(lambda layer: setattr(layer.k_proj, "__class__", Scaled)) == [f"{prefix}q_proj", f"{prefix}v_proj"]
    assert names(lambda layer: layer.k_proj.register_forward_hook(lambda module, args, out: out * 2)) == []
    assert names(lambda layer: setattr(layer.k_proj, "weight", layer.v_proj.weight)) == []
    assert names(lambda layer: setattr(layer.k_proj, "bias", nn.Parameter(torch.ones(16)))) == []
    assert names(lambda layer: parametrizations.weight_norm(layer.q_proj)) == [f"{prefix}k_proj", f"{prefix}v_proj"]
    assert names(lambda layer: setattr(layer.v_proj, "forward", lambda x: x[..., :16])) == []


def test_a_model_whose_layers_change_their_input_is_left_as_it_was(monkeypatch):
    made = BY_NAME["llama"].build()
    plain = copy.deepcopy(made)
    forward = type(made.model.layers[0].mlp).forward

    def changes(self, x):
        gate = self.act_fn(self.gate_proj(x))
        x += 1.0
        return self.down_proj(gate * self.up_proj(x))

    assert forward is not changes
    monkeypatch.setattr(type(made.model.layers[0].mlp), "forward", changes)
    assert merge(made).names == []
    with torch.no_grad():
        assert torch.equal(made(tokens(1, 9)).logits, plain(tokens(1, 9)).logits)
