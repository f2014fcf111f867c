"""Logits and gradients of every architecture equal `eager`: no padding, padded on either side, holes; three dtypes."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny import (
    ARCHITECTURES,
    DECODERS,
    distance,
    inputs,
    logits_and_gradients,
    real_positions,
    tokens,
)

FLOAT32_TOLERANCE = 4e-5


def worst(architecture, eager, fast, given, **options):
    real = real_positions(architecture, given)
    expected, expected_gradients = logits_and_gradients(eager, given, real, **options)
    got, gradients = logits_and_gradients(fast, given, real, **options)
    assert set(gradients) == set(expected_gradients)
    scale = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    differences = {name: (gradients[name] - expected_gradients[name]).abs().max().item() / scale for name in gradients}
    differences["logits"] = distance(got, expected)
    name = max(differences, key=lambda key: differences[key])
    return differences[name], name


@pytest.mark.parametrize("side", ["none", "ones", "right", "left", "mixed", "holes"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_logits_and_gradients_equal_eager(architecture, side):
    eager, fast = architecture.pair()
    error, where = worst(architecture, eager, fast, inputs(architecture, side=side))
    assert error < FLOAT32_TOLERANCE, where


# the experts of GPT-OSS have no float64 product on the CPU, and rounding to bfloat16 sends tokens to other experts
WITHOUT_EXPERTS = [one for one in ARCHITECTURES if one.name != "gpt_oss"]


@pytest.mark.parametrize("architecture", WITHOUT_EXPERTS, ids=str)
def test_float64_equals_eager(architecture):
    eager, fast = architecture.pair(torch.float64)
    error, where = worst(architecture, eager, fast, inputs(architecture, side="right"))
    assert error < (1e-12 if architecture.softmax_in_own_dtype else 1e-6), where


@pytest.mark.parametrize("architecture", WITHOUT_EXPERTS, ids=str)
def test_bfloat16_is_no_worse_than_eager(architecture):
    given = inputs(architecture, side="right")
    real = real_positions(architecture, given)
    exact, _ = logits_and_gradients(architecture.build(), given, real)
    eager, fast = architecture.pair(torch.bfloat16)
    ours = (logits_and_gradients(fast, given, real)[0] - exact).abs()
    theirs = (logits_and_gradients(eager, given, real)[0] - exact).abs()
    assert ours.mean() < 1.5 * theirs.mean()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_wrong_mask_would_be_seen(architecture):
    """The models are sensitive: hiding one key more changes the logits of others by far more than the tolerance."""
    eager = architecture.build()
    given = inputs(architecture, side="ones")
    logits = eager(**given).logits
    given["attention_mask"][:, 5] = 0
    others = logits.shape[1] - 1
    assert distance(eager(**given).logits[:, 6:others], logits[:, 6:others]) > 100 * FLOAT32_TOLERANCE


@pytest.mark.parametrize("architecture", DECODERS, ids=str)
def test_packed_sequences_equal_eager_and_stay_apart(architecture):
    eager, fast = architecture.pair()
    lengths = (3, 6, 1, 5)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    given = {"input_ids": tokens(1, sum(lengths)), "position_ids": position_ids}
    error, where = worst(architecture, eager, fast, given, use_cache=False)
    assert error < FLOAT32_TOLERANCE, where
    if architecture.name == "gpt_oss":
        return  # its model does not look at position_ids for packing, under any attention implementation
    together = fast(**given, use_cache=False).logits.split(lengths, dim=1)
    for ids, logits in zip(given["input_ids"].split(lengths, dim=1), together, strict=True):
        assert distance(logits, eager(ids).logits) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("architecture", [one for one in DECODERS if one.name in ("llama", "mistral", "gpt2")], ids=str)
def test_rows_may_be_packed_differently(architecture):
    eager, fast = architecture.pair()
    rows = [torch.cat([torch.arange(length) for length in lengths]) for lengths in ((3, 6), (9,), (1, 1, 7))]
    given = {"input_ids": tokens(3, 9), "position_ids": torch.stack(rows)}
    error, where = worst(architecture, eager, fast, given, use_cache=False)
    assert error < FLOAT32_TOLERANCE, where


def test_lengths_of_a_flattening_collator_separate_sequences_too():
    llama = DECODERS[0]
    eager, fast = llama.pair()
    ids = tokens(1, 9)
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}
    expected = eager(ids, position_ids=positions, use_cache=False).logits
    for options in ({}, lengths):
        got = fast(ids, position_ids=positions, use_cache=False, **options).logits
        assert distance(got, expected) < FLOAT32_TOLERANCE
    with_cache = fast(ids, position_ids=positions, use_cache=True, **lengths).logits
    assert distance(with_cache, expected) < FLOAT32_TOLERANCE
    assert distance(eager(ids, position_ids=positions, use_cache=True).logits, expected) > 1e-2


@pytest.mark.parametrize(
    "architecture", [one for one in ARCHITECTURES if one.name in ("llama", "gemma2", "bert")], ids=str
)
def test_a_mask_of_four_dimensions_is_taken_as_it_is(architecture):
    """Float is added to the scores, as in eager; bool shows, as in sdpa."""
    eager, fast = architecture.pair()
    visible = torch.rand(2, 1, 11, 11) > 0.4
    visible |= torch.eye(11, dtype=torch.bool)
    added = torch.where(visible, torch.randn(2, 1, 11, 11), torch.finfo(torch.float32).min)
    ids = tokens(2, 11)
    assert distance(fast(ids, attention_mask=added).logits, eager(ids, attention_mask=added).logits) < FLOAT32_TOLERANCE
    shown = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    assert (
        distance(fast(ids, attention_mask=visible).logits, eager(ids, attention_mask=shown).logits) < FLOAT32_TOLERANCE
    )


def test_a_decoder_may_be_made_bidirectional():
    for architecture in (one for one in DECODERS if one.name in ("llama", "mistral")):
        eager, fast = architecture.pair()
        for model in (eager, fast):
            model.config.is_causal = False
        error, where = worst(architecture, eager, fast, inputs(architecture, side="left"))
        assert error < FLOAT32_TOLERANCE, where
