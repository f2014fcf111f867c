"""A converted BART is the BART where theory says so."""

from __future__ import annotations

import pytest
import torch

import hasten
from hasten.convert import led
from hasten.errors import ArgumentError
from tests.convert.encoders import build, ids

WINDOW, LENGTH = 16, 150
TOLERANCE = 1e-5


@pytest.mark.parametrize("task", ["Model", "ForConditionalGeneration", "ForQuestionAnswering"])
@pytest.mark.parametrize("scale_embedding", [False, True])
@torch.no_grad()
def test_outputs_are_equal_where_the_window_reaches_all(task, scale_embedding):
    model = build("Bart", task, scale_embedding=scale_embedding)
    converted, report = led.convert(model, max_length=LENGTH, window=WINDOW)
    report.checks += led.self_checks(model, converted)
    report.expect_passed()
    assert {entry.name for entry in report.entries if entry.origin != "dropped"} == set(converted.state_dict())
    for seqlen, is_global in ((WINDOW // 2 + 1, 0), (41, 1)):
        given = {"input_ids": ids(2, seqlen), "decoder_input_ids": ids(2, 6)}
        mask = torch.ones_like(given["input_ids"])
        mask[0, seqlen - 2 :] = 0
        expected = model(**given, attention_mask=mask)[0]
        got = converted(**given, attention_mask=mask, global_attention_mask=torch.full_like(mask, is_global))[0]
        assert ((expected - got).abs().max() / expected.abs().max()) < TOLERANCE


@torch.no_grad()
def test_generate_gives_the_same_tokens():
    model = build("Bart", "ForConditionalGeneration")
    converted = hasten.accelerate(led.to_led(model, max_length=LENGTH, window=WINDOW))
    given = {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    given |= {"max_new_tokens": 12, "do_sample": False, "num_beams": 2}
    assert converted.generate(**given).tolist() == model.generate(**given).tolist()
    long = ids(1, LENGTH)
    assert converted.generate(input_ids=long, attention_mask=torch.ones_like(long), max_new_tokens=3).shape[0] == 1


def test_positions_lose_the_rows_that_led_has_not():
    model = build("Bart")
    converted = led.to_led(model, max_length=LENGTH, window=WINDOW)
    old, new = model.encoder.embed_positions.weight[2:], converted.encoder.embed_positions.weight
    assert new.shape[0] == LENGTH
    assert torch.equal(new[64:128], old)
    assert torch.equal(converted.decoder.embed_positions.weight, model.decoder.embed_positions.weight[2:])


@pytest.mark.parametrize("family", ["MBart", "Pegasus"])
def test_models_that_normalise_before_are_refused(family):
    options = {"vocab_size": 67, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8}
    options |= {"decoder_ffn_dim": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    with pytest.raises(ArgumentError, match=f"{family.lower()}, whose layers normalise before they attend"):
        led.to_led(build(family, **options))


def test_an_encoder_alone_is_sent_to_the_other_converter():
    with pytest.raises(ArgumentError, match="got bert; encoders alone convert with hasten convert longformer"):
        led.to_led(build("Bert"))
