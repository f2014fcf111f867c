"""The table before a conversion, against bytes that are really there."""

from __future__ import annotations

import pytest
import torch

from hasten.convert import gqa, kv_cost
from hasten.errors import ArgumentError
from tests.convert import families
from tests.models import tiny


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "t5", "bart"])
def test_cache_and_weight_bytes_are_those_of_the_converted_model(name):
    model = families.build(name)
    for row in kv_cost.costs(model, context=10):
        converted = model if row.num_kv_heads == 4 else gqa.to_gqa(model, row.num_kv_heads)
        given = {"input_ids": tiny.tokens(1, 10)}
        if converted.config.is_encoder_decoder:
            given["decoder_input_ids"] = tiny.tokens(1, 10)
        cache = converted(**given, use_cache=True).past_key_values
        parts = [getattr(cache, f"{part}_attention_cache", None) for part in ("self", "cross")]
        layers = [layer for part in (parts if parts[0] is not None else [cache]) for layer in part.layers]
        assert row.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        biases = 4 * sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
        assert 0 <= row.weight_bytes - sum(p.nbytes for p in converted.parameters()) <= biases


def test_rows_are_the_numbers_that_can_be():
    assert [row.num_kv_heads for row in kv_cost.costs(families.build("llama"))] == [4, 2, 1]
    assert [row.num_kv_heads for row in kv_cost.costs(families.build("llama", num_key_value_heads=2))] == [2, 1]


def test_figures_follow_from_bytes_and_bandwidth():
    model = families.build("llama", tie_word_embeddings=False)
    (row, *_) = kv_cost.costs(model, gpu="L4", context=100, dtype=torch.bfloat16)
    assert row.kv_bytes_per_token == 2 * 2 * 4 * 8 * 2  # layers, k and v, heads, head_dim, bytes
    read = 2 * (sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel())
    assert row.tokens_per_s_single == pytest.approx(300e9 / (read + row.kv_bytes))
    assert row.largest_batch == int((0.9 * 24e9 - row.weight_bytes) // row.kv_bytes)
    assert row.tokens_per_s_largest == pytest.approx(
        row.largest_batch * 300e9 / (read + row.largest_batch * row.kv_bytes)
    )


def test_a_sliding_window_bounds_what_is_kept():
    model = families.build("gemma2")  # layers: sliding, full, sliding
    (row, *_) = kv_cost.costs(model, context=50)
    assert row.kv_bytes == row.kv_bytes_per_token // 3 * (50 + 2 * tiny.WINDOW)


def test_the_encoder_is_not_read_while_decoding():
    for name in ("t5", "bart"):
        model = families.build(name)
        encoder = sum(
            p.numel() for n, p in model.named_parameters() if ".encoder." in f".{n}" and "embed_tokens" not in n
        )
        total = sum(p.numel() for p in model.parameters())
        assert total - kv_cost._decoding_parameters(model) >= encoder


def test_what_is_unknown_is_refused():
    model = families.build("llama")
    with pytest.raises(ArgumentError, match="gpu: expected one of B200, H200"):
        kv_cost.costs(model, gpu="abacus")
    with pytest.raises(ArgumentError, match="context: expected at least 1"):
        kv_cost.costs(model, context=0)
