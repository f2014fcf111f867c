"""The preallocated cache: the tokens of transformers' own, written in place, read without copies, bounded."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging import version
from transformers import LlamaConfig

from hasten.cache import EncoderDecoderKVCache, KVCache, KVLayer, allocate
from hasten.errors import ArgumentError
from tests.models.tiny import GENERATORS, Architecture, distance, padding, tokens


def states(batch=1, heads=2, new=3, head_dim=4, dtype=torch.float32):
    return torch.randn(batch, heads, new, head_dim, dtype=dtype), torch.randn(
        batch, heads, new, head_dim + 1, dtype=dtype
    )


def filled(capacity=8, **shape):
    layer = KVLayer(capacity)
    layer.update(*states(**shape))
    return layer


SEARCHES = [
    pytest.param(architecture, options, id=f"{architecture}-{'beams' if options else 'greedy'}")
    for architecture in GENERATORS
    for options in ({}, {"num_beams": 3})
]


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize(("architecture", "options"), SEARCHES)
def test_generate_gives_the_same_tokens_as_with_its_own_cache(architecture, side, options):
    model = architecture.build()
    given = {
        "attention_mask": padding(2, 9, "ones" if side == "none" else side),
        "max_new_tokens": 9,
        "do_sample": False,
    }
    expected = model.generate(tokens(2, 9), **given, **options)
    cache = EncoderDecoderKVCache(10, 9) if architecture.kind == "seq2seq" else KVCache(18)
    got = model.generate(tokens(2, 9), **given, **options, past_key_values=cache)
    assert got.tolist() == expected.tolist()


WAYS = {
    "sampled": {"do_sample": True, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "do_sample": False},
    "drawn-beams": {"num_beams": 2, "do_sample": True},
    "lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "assisted": {"do_sample": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", GENERATORS, ids=str)
def test_an_accelerated_model_generates_in_every_way_what_eager_does(architecture, way):
    if way in ("lookup", "assisted") and version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip("transformers 5.17 itself fails over sliding windows, or forgets the cache it was given")
    eager, served = architecture.pair()
    rows = 1 if way in ("lookup", "assisted") else 2  # transformers takes one row alone for these
    given = {"attention_mask": torch.ones(rows, 9, dtype=torch.long), "max_new_tokens": 12, **WAYS[way]}
    if way == "assisted":
        given["assistant_model"] = architecture.build()
        with torch.no_grad():
            for parameter in given["assistant_model"].parameters():
                parameter.mul_(1.02)  # is often right, and often wrong
    torch.manual_seed(0)
    expected = eager.generate(tokens(rows, 9), **given)
    cache = EncoderDecoderKVCache(40, 9) if architecture.kind == "seq2seq" else KVCache(40)
    torch.manual_seed(0)
    assert served.generate(tokens(rows, 9), **given, past_key_values=cache).tolist() == expected.tolist()
    assert cache.length >= 9


def test_states_are_written_in_place_and_read_as_views():
    layer, (first, second) = KVLayer(8), states()
    layer.update(first, second)
    address = layer.key_buffer.data_ptr()
    keys, values = layer.update(*states(new=2))
    assert layer.key_buffer.data_ptr() == address == keys.data_ptr()
    assert keys.shape == (1, 2, 5, 4) and values.shape == (1, 2, 5, 5)
    assert torch.equal(keys[:, :, :3], first) and torch.equal(values[:, :, :3], second)
    assert layer.read(3)[0].data_ptr() == keys[:, :, 3:].data_ptr()


def test_bytes_are_those_of_the_kv_heads():
    cache = KVCache(16)
    assert cache.nbytes == 0
    for index in range(3):
        cache.update(*states(heads=2), index)
    assert cache.nbytes == 3 * 16 * 2 * (4 + 5) * 4
    assert cache.length == cache.get_seq_length() == 3 and cache.get_max_length() == 16


def test_what_is_not_filled_is_never_read():
    model = GENERATORS[0].build()
    ids, cache = tokens(2, 6), KVCache(16)
    with torch.no_grad():
        model(ids[:, :3], past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.key_buffer[:, :, 3:], layer.value_buffer[:, :, 3:] = float("nan"), float("nan")
        got = model(ids[:, 3:], past_key_values=cache, use_cache=True).logits
        assert distance(got, model(ids).logits[:, 3:]) < 1e-5


def test_more_than_fits_is_refused_and_changes_nothing():
    layer = filled(capacity=4)
    before = layer.key_buffer.clone()
    with pytest.raises(ArgumentError, match=r"capacity: expected at least 5 tokens, got 4; allocate"):
        layer.update(*states(new=2))
    assert layer.length == 3 and torch.equal(layer.key_buffer, before)


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 2}, {"heads": 1}, {"head_dim": 8}, {"dtype": torch.bfloat16}],
    ids=["batch", "heads", "head_dim", "dtype"],
)
def test_states_of_another_model_are_refused(wrong):
    with pytest.raises(ArgumentError, match=r"key_states: expected torch\.float32 .* as at the first write"):
        filled().update(*states(**wrong))


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_cache_for_nothing_is_refused(capacity):
    with pytest.raises(ArgumentError, match="capacity: expected at least 1 token"):
        KVCache(capacity)


def test_tokens_can_be_forgotten():
    layer = filled()
    keys = layer.keys.clone()
    layer.crop(-1)
    assert torch.equal(layer.keys, keys[:, :, :2])
    layer.truncate(1)
    assert layer.length == 1
    with pytest.raises(ArgumentError, match="length: expected 0 to 1"):
        layer.truncate(2)
    layer.reset()
    assert layer.keys.shape[2] == 0


def test_a_forward_that_failed_midway_can_be_undone():
    cache = KVCache(8)
    for index in range(2):
        cache.update(*states(), index)
    cache.update(*states(new=1), 0)
    cache.truncate(3)
    assert [layer.length for layer in cache.layers] == [3, 3]


def test_rows_can_change_places():
    layer = filled(batch=3)
    keys, address = layer.keys.clone(), layer.key_buffer.data_ptr()
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.keys, keys[[2, 0, 0]]) and layer.key_buffer.data_ptr() == address


def test_allocate_follows_the_configuration():
    by_name = {str(one): one for one in GENERATORS}
    assert type(allocate(by_name["llama"].build().config, 8)) is KVCache
    both = allocate(by_name["t5"].build().config, 8, 5)
    assert isinstance(both, EncoderDecoderKVCache)
    assert both.self_attention_cache.capacity == 8 and both.cross_attention_cache.capacity == 5


def test_a_model_that_keeps_other_things_is_refused():
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ArgumentError, match=r"model: expected layers of .*, got linear_attention; run it without"):
        allocate(config, 8)


def test_both_caches_of_an_encoder_decoder_count():
    architecture: Architecture = next(one for one in GENERATORS if one.name == "bart")
    model, cache = architecture.build(), EncoderDecoderKVCache(12, 7)
    with torch.no_grad():
        model(tokens(1, 7), decoder_input_ids=tokens(1, 3), past_key_values=cache, use_cache=True)
    assert cache.nbytes == 2 * 2 * 32 * 4 * (12 + 7)
    assert cache.length == 3 and cache.cross_attention_cache.length == 7
    cache.crop(-1)
    assert cache.length == 2 and cache.cross_attention_cache.length == 7
