"""LED of transformers, accelerated: the same losses, gradients and tokens, in the encoder and in the decoder."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import hasten.models
from hasten.errors import ArgumentError
from tests.models.adapters.test_longformer import assert_same_gradients, gradients, ids, widen
from tests.models.longformers import user_masks

TOLERANCE = 5e-6
BASE = {
    "vocab_size": 67,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "attention_window": [4, 8],
    "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 48,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


def pair(kind="LEDForConditionalGeneration", **options):
    torch.manual_seed(0)
    theirs = widen(getattr(transformers, kind)(transformers.LEDConfig(**{**BASE, **options})))
    return theirs, hasten.models.accelerate(copy.deepcopy(theirs))


def inputs(name, seqlen=29):
    mask, is_global = user_masks(name, 3, seqlen)
    return {"input_ids": ids(3, seqlen, mask), "attention_mask": mask, "global_attention_mask": is_global}


@pytest.mark.parametrize("name", ["plain", "right", "left", "holes", "all_global", "different_right", "padded_global"])
def test_loss_and_gradients(name):
    theirs, ours = pair()
    given = inputs(name) | {"labels": ids(3, 11)}
    if name == "right":
        given["decoder_attention_mask"] = user_masks("right", 3, 11)[0]
    outs = [model(**given) for model in (theirs, ours)]
    assert (outs[0].logits - outs[1].logits).abs().max() < 4 * TOLERANCE  # of about 4
    assert (outs[0].encoder_last_hidden_state - outs[1].encoder_last_hidden_state).abs().max() < TOLERANCE
    assert_same_gradients(*(gradients(model, out.loss) for model, out in zip((theirs, ours), outs, strict=True)))


@pytest.mark.parametrize("name", ["plain", "one_global", "left", "holes", "different_right"])
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generate_gives_the_same_tokens(name, beams):
    theirs, ours = pair()
    given = inputs(name) | {"max_new_tokens": 14, "num_beams": beams, "do_sample": False, "min_new_tokens": 14}
    assert ours.generate(**given).tolist() == theirs.generate(**given).tolist()


@pytest.mark.parametrize("form", ["embeds", "tuple", "states", "three"])
@torch.no_grad()
def test_other_ways_to_call_the_encoder(form):
    models = [model.get_encoder() for model in pair()]
    given = inputs("different_right", 21)
    options = {"return_dict": form != "tuple", "output_hidden_states": form in ("states", "tuple")}
    if form == "embeds":
        given["inputs_embeds"] = models[0].embed_tokens(given.pop("input_ids"))
    if form == "three":
        given["attention_mask"] = given["attention_mask"] * (given.pop("global_attention_mask") + 1)
    outs = [model(**given, **options) for model in models]
    expected, got = ((out if isinstance(out, tuple) else out.to_tuple()) for out in outs)
    for one, other in zip(expected, got, strict=True):
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (one, other)), strict=True):
            assert (a - b).abs().max() < TOLERANCE


def test_question_answering():
    theirs, ours = pair("LEDForQuestionAnswering")
    given = inputs("one_global") | {
        "start_positions": torch.tensor([3, 9, 1]),
        "end_positions": torch.tensor([5, 20, 2]),
    }
    outs = [model(**given) for model in (theirs, ours)]
    assert (outs[0].start_logits - outs[1].start_logits).abs().max() < 4 * TOLERANCE
    assert_same_gradients(*(gradients(model, out.loss) for model, out in zip((theirs, ours), outs, strict=True)))


def test_a_training_step_is_one_graph():
    torch._dynamo.reset()
    theirs, ours = pair()
    given = inputs("different_right") | {"labels": ids(3, 11), "use_cache": False}
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    outs = [model(**given) for model in (theirs, compiled)]
    assert abs(outs[0].loss - outs[1].loss) < TOLERANCE
    assert_same_gradients(*(gradients(model, out.loss) for model, out in zip((theirs, ours), outs, strict=True)))
    torch._dynamo.reset()


@torch.no_grad()
def test_what_is_saved_loads_in_plain_transformers(tmp_path):
    theirs, ours = pair()
    assert len(hasten.models.attention_layers(ours)) == 6
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.save_pretrained(tmp_path)
    assert "hasten" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    given = {"input_ids": ids(2, 16), "decoder_input_ids": ids(2, 5), "attention_mask": torch.ones(2, 16)}
    assert torch.equal(loaded(**given).logits, theirs(**given).logits)


@torch.no_grad()
def test_bad_input_is_named():
    _, ours = pair()
    with pytest.raises(ArgumentError, match="attention_mask: expected values 0, 1 and 2, got -1"):
        ours.generate(input_ids=ids(2, 8), attention_mask=torch.full((2, 8), -1), max_new_tokens=2)
    with pytest.raises(ArgumentError, match="output_attentions"):
        ours(ids(2, 8), output_attentions=True)
