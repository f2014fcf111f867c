"""The attention function: what a layer hands over arrives in `hasten.attention`, and nothing is ignored in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

import hasten.models
from hasten.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from hasten.masks import Causal, Dense, Documents, Window
from hasten.models.interface import forward, name_of
from hasten.models.masking import ModelMask, make_mask
from hasten.ops.attention import attention
from hasten.ops.choose import NAMES
from tests.models.tiny import ARCHITECTURES, inputs

CAUSAL = ModelMask(Causal())


class Layer(nn.Module):
    is_causal = True


def tensors(seqlen_q=5, seqlen_k=5, batch=2):
    """q, k, v as a layer has them: (batch, heads, seqlen, head_dim), transposed views."""
    q = torch.randn(batch, seqlen_q, 4, 8).transpose(1, 2)
    k, v = (torch.randn(batch, seqlen_k, 2, 8).transpose(1, 2) for _ in range(2))
    return q, k, v


def direct(q, k, v, mask, **options):
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, **options)


def test_both_registries_know_every_name():
    for implementation in (None, *NAMES):
        assert name_of(implementation) in AttentionInterface().valid_keys()
        assert AttentionMaskInterface()[name_of(implementation)] is make_mask


def test_registering_again_changes_nothing():
    keys = list(AttentionInterface().valid_keys())
    hasten.models.register()
    assert list(AttentionInterface().valid_keys()) == keys


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ArgumentError, match=r"implementation: expected one of .*reference"):
        name_of("fastest")


def test_what_a_layer_asks_arrives():
    q, k, v = tensors()
    bias, sinks = torch.randn(1, 4, 5, 5), torch.randn(4)
    options = {"scaling": 0.3, "softcap": 5.0, "s_aux": sinks, "position_bias": bias}
    out, weights = forward(Layer().eval(), q, k, v, CAUSAL, dropout=0.9, **options)
    expected = direct(q, k, v, Causal(), softmax_scale=0.3, softcap=5.0, sinks=sinks, bias=bias)
    assert weights is None and out.shape == (2, 5, 4, 8)
    torch.testing.assert_close(out, expected)


def test_tensors_are_handed_over_as_they_lie(monkeypatch):
    seen = []
    monkeypatch.setattr("hasten.models.interface.attention", lambda q, k, v, *a, **b: seen.extend([q, k, v]) or q)
    q, k, v = tensors()
    forward(Layer(), q, k, v, CAUSAL)
    assert [t.data_ptr() for t in seen] == [t.data_ptr() for t in (q, k, v)]
    assert [t.shape[2] for t in seen] == [4, 2, 2]


def test_keys_beyond_the_filled_part_are_cut_and_the_bias_with_them():
    q, k, v = tensors(3, 9)
    bias = torch.randn(1, 4, 3, 9)
    out, _ = forward(Layer(), q, k, v, ModelMask(Causal(), 5), position_bias=bias)
    torch.testing.assert_close(out, direct(q, k[:, :, :5], v[:, :, :5], Causal(), bias=bias[..., :5]))


@pytest.mark.parametrize(
    ("seqlen_q", "options", "expected"),
    [
        (5, {}, Causal()),
        (5, {"is_causal": False}, None),
        (1, {}, None),
        (5, {"sliding_window": 2}, Window(1, 0)),
        (1, {"sliding_window": 2}, Window(1, 0)),
    ],
    ids=["causal", "not causal", "one query", "window", "one query in a window"],
)
def test_without_a_mask_the_layer_says_whether_it_is_causal(seqlen_q, options, expected):
    q, k, v = tensors(seqlen_q)
    torch.testing.assert_close(forward(Layer(), q, k, v, None, **options)[0], direct(q, k, v, expected))


def test_without_a_mask_queries_in_an_unknown_place_are_refused():
    with pytest.raises(
        ArgumentError, match="attention_mask: expected a mask, got none, for 3 queries over 5 keys in Layer"
    ):
        forward(Layer(), *tensors(3), None)


def test_a_bool_tensor_shows_and_a_float_tensor_is_added():
    q, k, v = tensors()
    visible = torch.rand(2, 1, 5, 5) > 0.3
    torch.testing.assert_close(forward(Layer(), q, k, v, visible)[0], direct(q, k, v, Dense(visible)))
    added, bias = torch.randn(2, 1, 5, 5), torch.randn(1, 4, 5, 5)
    out = forward(Layer(), q, k, v, added, position_bias=bias)[0]
    torch.testing.assert_close(out, direct(q, k, v, None, bias=added + bias))


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 5).bool(), torch.ones(2, 1, 5, 5, dtype=torch.int64), "causal"], ids=str
)
def test_any_other_mask_is_refused(mask):
    with pytest.raises((ArgumentError, ArgumentTypeError), match="attention_mask"):
        forward(Layer(), *tensors(), mask)


@pytest.mark.parametrize("name", ["output_attentions", "cache", "sinks", "block_indices"])
def test_what_cannot_be_given_is_refused_by_name(name):
    with pytest.raises(ArgumentError, match=f"^{name}: "):
        forward(Layer(), *tensors(), CAUSAL, **{name: True})


def test_a_flattening_collator_separates_sequences_once():
    q, k, v = tensors(batch=1)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    apart = Causal() & Documents(bounds)
    for mask in (CAUSAL, ModelMask(apart)):
        torch.testing.assert_close(forward(Layer(), q, k, v, mask, cu_seq_lens_q=bounds)[0], direct(q, k, v, apart))
    with pytest.raises(ArgumentError, match="cu_seq_lens_q"):
        forward(Layer(), *tensors(), CAUSAL, cu_seq_lens_q=bounds)


def test_asking_a_model_for_attention_weights_is_an_error():
    _, fast = ARCHITECTURES[0].pair()
    with pytest.raises(ArgumentError, match=r"^output_attentions: .*eager"):
        fast(**inputs(ARCHITECTURES[0]), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        fast.config.output_attentions = True


def test_forcing_an_implementation_reaches_the_attention():
    _, fast = ARCHITECTURES[0].pair()
    hasten.models.accelerate(fast, implementation="portable")
    with pytest.raises(UnsupportedError, match="portable"):
        fast(**inputs(ARCHITECTURES[0]))
