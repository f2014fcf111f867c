"""Fewer key/value heads: exactness on every architecture, classes of the results, refusals."""

from __future__ import annotations

import pytest
import torch

import hasten
from hasten.convert import gqa, merge
from hasten.errors import ArgumentError, ArgumentTypeError
from tests.convert import families
from tests.models import tiny

TIGHT = 1e-5  # float32: sums of another shape round differently
NAMES = tuple(families.FAMILIES)


@pytest.fixture(scope="module")
def model_of():
    made = {}
    return lambda name: made.setdefault(name, families.build(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_equal_heads_in_each_group_convert_with_identical_logits(name, num_kv_heads):
    model = families.equal_heads(families.build(name), num_kv_heads)
    for method in ("mean", "first", "aligned"):
        converted = gqa.to_gqa(model, num_kv_heads, method=method)
        assert tiny.distance(families.logits(converted), families.logits(model)) < TIGHT, method


@pytest.mark.parametrize("name", NAMES)
def test_expanding_gives_identical_logits_and_a_strided_grouping_does_not(model_of, name):
    converted = gqa.to_gqa(model_of(name), 2)
    expanded = gqa.to_mha(converted)
    assert type(expanded) is type(model_of(name))
    assert {n: p.shape for n, p in expanded.named_parameters()} == {
        n: p.shape for n, p in model_of(name).named_parameters()
    }
    assert tiny.distance(families.logits(expanded), families.logits(converted)) < TIGHT
    strided = gqa.to_mha(converted, is_strided=True)
    assert tiny.distance(families.logits(strided), families.logits(converted)) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_multi_query_expands_to_itself(model_of, name):
    converted = gqa.to_gqa(model_of(name), 1)
    assert tiny.distance(families.logits(gqa.to_mha(converted)), families.logits(converted)) < TIGHT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("method", "groups"), [("aligned", "clustered"), ("factored", "contiguous")])
def test_better_methods_run_everywhere_and_expand_to_themselves(model_of, name, method, groups):
    calibration = [tiny.tokens(2, 9, seed=4)]
    converted = gqa.to_gqa(model_of(name), 2, method=method, groups=groups, calibration=calibration)
    assert tiny.distance(families.logits(gqa.to_mha(converted)), families.logits(converted)) < TIGHT


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("llama", 2, "LlamaForCausalLM"),
        ("llama", (2, 1), "LlamaGQAForCausalLM"),
        ("phi3", (1, 4), "Phi3GQAForCausalLM"),
        ("gemma3", 2, "Gemma3ForCausalLM"),
        ("gpt2", 1, "GPTBigCodeForCausalLM"),
        ("gpt2", 2, "GPT2GQALMHeadModel"),
        ("gpt2-scaled-by-layer", 1, "GPT2GQALMHeadModel"),
        ("gpt_neox", 1, "GPTNeoXGQAForCausalLM"),
        ("falcon-parallel", 2, "FalconForCausalLM"),
        ("falcon-new", 1, "FalconForCausalLM"),
        ("falcon-serial", 1, "FalconForCausalLM"),
        ("falcon-serial", 2, "FalconGQAForCausalLM"),
        ("t5", 1, "T5GQAForConditionalGeneration"),
        ("bart", (2, 4), "BartGQAForConditionalGeneration"),
    ],
)
def test_the_result_has_transformers_class_where_there_is_one(model_of, name, count, kind):
    assert type(gqa.to_gqa(model_of(name), count)).__name__ == kind


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3", "gpt2", "falcon-parallel", "t5"])
def test_every_layer_may_have_its_own_number(model_of, name):
    count = (2, 4, 1) if name == "gemma3" else (2, 1)
    converted = gqa.to_gqa(model_of(name), count)
    assert tiny.distance(families.logits(gqa.to_mha(converted)), families.logits(converted)) < TIGHT


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "t5", "bart", "falcon-serial", "falcon-alibi"])
def test_uneven_groups_are_held_by_carried_classes(model_of, name):
    converted = gqa.to_gqa(model_of(name), 2, method="aligned", groups="uneven")
    assert tiny.distance(families.logits(gqa.to_mha(converted)), families.logits(converted)) < TIGHT


@pytest.mark.parametrize("name", [*families.CARRIED, "llama"])
def test_decoding_step_by_step_gives_the_same_tokens_as_the_expanded_model(model_of, name):
    converted = gqa.to_gqa(model_of(name), (2, 1))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found, expected = (model.generate(tiny.tokens(2, 7), **options) for model in (converted, gqa.to_mha(converted)))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "gpt_neox", "falcon-serial"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_carried_classes_attend_alike_by_every_implementation(model_of, name, implementation):
    converted = gqa.to_gqa(model_of(name), 2)
    before = families.logits(converted)
    converted.set_attn_implementation(implementation)
    assert tiny.distance(families.logits(converted), before) < TIGHT


@pytest.mark.parametrize(
    ("name", "groups"),
    [(name, "contiguous") for name in ("t5", "bart", "gpt2", "gpt_neox", "llama", "phi3")]
    + [(name, "uneven") for name in ("t5", "bart", "gpt2", "gpt_neox")],
)
def test_hasten_serves_the_attention_of_carried_classes(model_of, name, groups):
    converted = gqa.to_gqa(model_of(name), (2, 1), groups=groups)
    before = families.logits(converted)
    hasten.accelerate(converted, implementation="reference")
    assert tiny.distance(families.logits(converted), before) < TIGHT


def test_a_static_cache_is_made_from_the_keys_themselves(model_of):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for name in ("t5", "gpt2", "llama"):
        converted = gqa.to_gqa(model_of(name), (2, 1))
        found = converted.generate(tiny.tokens(2, 7), cache_implementation="static", **options)
        assert found.tolist() == converted.generate(tiny.tokens(2, 7), **options).tolist()


def test_the_cache_of_a_carried_model_holds_only_its_own_heads(model_of):
    for name in ("gpt2", "gpt_neox", "falcon-serial"):
        converted = gqa.to_gqa(model_of(name), 2)
        cache = converted(tiny.tokens(1, 5), use_cache=True).past_key_values
        assert cache.layers[0].keys.shape[1] == 2
    converted = gqa.to_gqa(model_of("t5"), 1)
    cache = converted(tiny.tokens(1, 5), decoder_input_ids=tiny.tokens(1, 3), use_cache=True).past_key_values
    assert cache.self_attention_cache.layers[1].keys.shape[1] == 1
    assert cache.cross_attention_cache.layers[1].values.shape[1] == 1


def test_the_encoder_and_everything_else_is_untouched(model_of):
    for name in ("t5", "bart"):
        old, new = model_of(name).state_dict(), gqa.to_gqa(model_of(name), 2).state_dict()
        changed = {key for key in old if old[key].shape != new[key].shape or not torch.equal(old[key], new[key])}
        assert changed
        assert all("decoder" in key and key.rsplit(".", 2)[-2] in ("k", "v", "k_proj", "v_proj") for key in changed)


def test_mean_is_the_mean_of_weights_and_biases(model_of):
    old, new = model_of("qwen2").state_dict(), gqa.to_gqa(model_of("qwen2"), 2).state_dict()
    for name in ("model.layers.1.self_attn.k_proj.bias", "model.layers.0.self_attn.v_proj.weight"):
        expected = old[name].unflatten(0, (2, 2, 8)).mean(1).flatten(0, 1)
        torch.testing.assert_close(new[name], expected)


def test_tied_embeddings_stay_tied_and_no_tensor_is_shared(model_of):
    model = families.build("llama", tie_word_embeddings=True)
    converted = gqa.to_gqa(model, 2)
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in converted.parameters()}


def test_a_grouped_model_may_be_grouped_further_and_keeps_its_dtype():
    model = families.build("llama", torch.bfloat16, num_key_value_heads=2)
    converted = gqa.to_gqa(model, 1)
    assert (converted.config.num_key_value_heads, converted.dtype) == (1, torch.bfloat16)


def test_random_heads_follow_the_seed(model_of):
    one, same, other = (gqa.to_gqa(model_of("llama"), 2, method="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(families.logits(one), families.logits(same))
    assert not torch.equal(families.logits(one), families.logits(other))


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (3, "num_kv_heads: expected a divisor of 4, got 3 in layer 0"),
        (0, "expected a divisor of 4"),
        (4, "expected fewer than 4, got 4; that changes nothing"),
        (8, "possible are 1, 2, 4"),
        ((2, 2, 2), "expected 2 numbers, got 3"),
    ],
)
def test_numbers_that_cannot_be_are_refused(model_of, count, message):
    with pytest.raises(ArgumentError) as caught:
        gqa.to_gqa(model_of("llama"), count)
    assert message in str(caught.value)


def test_a_converted_model_is_told_apart():
    model = families.build("llama", num_key_value_heads=2)
    with pytest.raises(ArgumentError, match="already converted"):
        gqa.to_gqa(model, 2)
    with pytest.raises(ArgumentError, match=r"possible are 1, 2 \(it is already grouped"):
        gqa.to_gqa(model, 4)


def test_a_converted_carried_model_can_be_converted_further(model_of):
    converted = gqa.to_gqa(gqa.to_gqa(model_of("t5"), 2), 1)
    assert converted.config.kv_heads == dict.fromkeys(converted.config.kv_heads, 1)
    with pytest.raises(ArgumentError, match="uneven or scattered"):
        gqa.to_gqa(gqa.to_gqa(model_of("gpt2"), 2, groups="uneven"), 1)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_uneven_groups_are_refused_where_nothing_holds_them(model_of, name):
    with pytest.raises(ArgumentError, match="groups: expected contiguous or clustered"):
        gqa.to_gqa(model_of(name), 2, groups="uneven")


def test_unknown_things_are_refused_by_name(model_of):
    bert = next(one for one in tiny.ARCHITECTURES if one.name == "bert").build()
    with pytest.raises(ArgumentError, match=r"model: expected one of llama, .*, got bert"):
        gqa.to_gqa(bert, 2)
    with pytest.raises(ArgumentTypeError, match="PreTrainedModel, got Linear"):
        gqa.to_gqa(torch.nn.Linear(2, 2), 2)
    with pytest.raises(ArgumentError, match="method: expected one of mean"):
        gqa.to_gqa(model_of("llama"), 2, method="median")
    with pytest.raises(ArgumentError, match="calibration: expected at least one batch"):
        gqa.to_gqa(model_of("llama"), 2, method="aligned", calibration=[])


def test_every_method_is_documented():
    assert all(f"`{name}`" in (gqa.to_gqa.__doc__ or "") for name in (*merge.METHODS, *merge.GROUPS))
