"""Longformer of transformers, accelerated, computes what it computed before: every mask, every parameter's gradient."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

import hasten.models
from hasten.errors import ArgumentError
from hasten.models import adapters
from tests.models.longformers import MASKS, codes, user_masks
from tests.models.tiny import distance

VOCAB = 67
TOLERANCE = 5e-6
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "attention_window": [4, 8],
    "max_position_embeddings": 64,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "sep_token_id": 2,
}


def config(**options):
    return transformers.LongformerConfig(**{**BASE, **options})


def widen(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def pair(kind, **options):
    """(model of transformers, accelerated copy of it)."""
    torch.manual_seed(0)
    theirs = widen(getattr(transformers, kind)(config(**options)))
    return theirs, hasten.models.accelerate(copy.deepcopy(theirs))


def ids(batch, seqlen, mask=None):
    drawn = torch.randint(3, VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(1))
    return drawn if mask is None else drawn.masked_fill(mask == 0, 1)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(theirs, ours):
    scale = max(gradient.abs().max() for gradient in theirs.values() if gradient is not None)
    for name, gradient in theirs.items():
        got = torch.zeros(()) if ours[name] is None else ours[name]
        assert (got - (0.0 if gradient is None else gradient)).abs().max() < 4 * TOLERANCE * scale, name


@pytest.mark.parametrize("name", MASKS)
def test_a_layer_as_transformers_calls_it(name):
    torch.manual_seed(0)
    theirs = widen(LongformerSelfAttention(config(attention_window=[8, 8]), 0))
    ours = copy.deepcopy(theirs)
    adapters.serve(ours, None, None)
    additive = torch.tensor([torch.finfo(torch.float32).min, 0.0, torch.finfo(torch.float32).max])[codes(name, 3, 40)]
    words = {"is_index_masked": additive < 0, "is_index_global_attn": additive > 0}
    outs, grads = [], []
    for layer in (theirs, ours):
        hidden = torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        out = layer(hidden, additive, **words, is_global_attn=bool((additive > 0).any()))[0]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        grads.append(gradients(layer, (out * weights).sum()) | {"hidden": hidden.grad})
        outs.append(out.detach())
    assert (outs[0] - outs[1]).abs().max() < TOLERANCE
    assert_same_gradients(*grads)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("seqlen", [24, 29])
def test_a_model_with_every_mask(name, seqlen):
    theirs, ours = pair("LongformerModel")
    mask, is_global = user_masks(name, 3, seqlen)
    given = ids(3, seqlen, mask)
    outs, grads = [], []
    for model in (theirs, ours):
        out = model(given, attention_mask=mask, global_attention_mask=is_global)
        weights = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(3)) * mask[..., None]
        grads.append(gradients(model, (out[0] * weights).sum() + out.pooler_output.sum()))
        outs.append(out)
    for index in (0, 1):
        assert (outs[0][index] - outs[1][index]).abs().max() < TOLERANCE
    assert_same_gradients(*grads)
    three = ours(given, attention_mask=mask * (is_global + 1)).last_hidden_state
    assert torch.equal(three, outs[1].last_hidden_state)


@pytest.mark.parametrize("form", ["nothing", "embeds", "tuple", "states"])
@torch.no_grad()
def test_other_ways_to_call_a_model(form):
    theirs, ours = pair("LongformerModel", type_vocab_size=2)
    given = {"input_ids": ids(2, 21), "token_type_ids": torch.arange(21).expand(2, 21) % 2}
    given["global_attention_mask"] = (torch.arange(21) < 2).long().expand(2, 21)
    if form == "nothing":
        del given["global_attention_mask"], given["token_type_ids"]
    if form == "embeds":
        given["inputs_embeds"] = theirs.get_input_embeddings()(given.pop("input_ids"))
    options = {"return_dict": form != "tuple", "output_hidden_states": form in ("states", "tuple")}
    expected, got = theirs(**given, **options), ours(**given, **options)
    assert isinstance(expected, tuple) == isinstance(got, tuple)
    expected, got = ((one if isinstance(one, tuple) else one.to_tuple()) for one in (expected, got))
    assert len(expected) == len(got)
    for one, other in zip(expected, got, strict=True):
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (one, other)), strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "kind",
    [
        "LongformerForQuestionAnswering",
        "LongformerForSequenceClassification",
        "LongformerForTokenClassification",
        "LongformerForMaskedLM",
        "LongformerForMultipleChoice",
    ],
)
def test_heads_with_their_own_global_tokens(kind):
    theirs, ours = pair(kind)
    given = {"input_ids": ids(2, 27)}
    given["input_ids"][:, [6, 7, 26]] = 2  # three separators: what comes before the second is the question
    given["attention_mask"] = torch.ones(2, 27, dtype=torch.int64)
    if kind == "LongformerForQuestionAnswering":
        given |= {"start_positions": torch.tensor([3, 9]), "end_positions": torch.tensor([5, 20])}
    elif kind == "LongformerForMultipleChoice":
        given = {name: value[:, None].repeat(1, 2, 1) for name, value in given.items()}
        given["input_ids"][:, 1, 10:20] = 5
        given["labels"] = torch.tensor([1, 0])
    elif kind == "LongformerForSequenceClassification":
        given["labels"] = torch.tensor([1, 0])
    else:
        given["labels"] = given["input_ids"] % 2
    outs, grads = [], []
    for model in (theirs, ours):
        out = model(**given)
        grads.append(gradients(model, out.loss))
        outs.append(out)
    for one, other in zip(outs[0].to_tuple(), outs[1].to_tuple(), strict=True):
        assert (one - other).abs().max() < 2 * TOLERANCE
    assert_same_gradients(*grads)


def test_gradient_checkpointing_and_training_mode():
    theirs, ours = pair("LongformerForMaskedLM", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    newest = getattr(ours, "activation_checkpointing_enable", None)  # transformers 5.17 has the other name only
    (newest or ours.gradient_checkpointing_enable)()
    given = {"input_ids": ids(2, 19), "global_attention_mask": (torch.arange(19) == 0).long().expand(2, 19)}
    given["labels"] = given["input_ids"]
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    assert_same_gradients(*(gradients(model, model.train()(**given).loss) for model in (theirs, ours)))


@pytest.mark.parametrize("capacity", [None, 4])
def test_a_whole_model_is_one_graph(capacity):
    torch._dynamo.reset()
    theirs, ours = pair("LongformerModel")
    hasten.models.accelerate(ours, global_capacity=capacity)
    mask, is_global = user_masks("different_right", 3, 29)
    given = {"input_ids": ids(3, 29, mask), "attention_mask": mask, "global_attention_mask": is_global}
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    outs = [model(**given).last_hidden_state for model in (theirs, compiled)]
    assert (outs[0] - outs[1]).abs().max() < TOLERANCE
    grads = [gradients(model, out.square().sum()) for model, out in zip((theirs, ours), outs, strict=True)]
    assert_same_gradients(*grads)
    torch._dynamo.reset()


@torch.no_grad()
def test_what_is_saved_loads_in_plain_transformers(tmp_path):
    theirs, ours = pair("LongformerForMaskedLM")
    ours.save_pretrained(tmp_path)
    assert "hasten" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    given = ids(2, 16)
    assert type(loaded) is transformers.LongformerForMaskedLM
    assert torch.equal(loaded(given).logits, theirs(given).logits)
    base = hasten.models.accelerate(pair("LongformerModel")[0])
    base.save_pretrained(tmp_path / "base")
    assert '"LongformerModel"' in (tmp_path / "base" / "config.json").read_text()


@torch.no_grad()
def test_the_model_stays_itself():
    theirs, ours = pair("LongformerModel")
    assert isinstance(ours, transformers.LongformerModel)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert len(hasten.models.attention_layers(ours)) == 2
    again = hasten.models.accelerate(ours)  # a second time changes nothing
    given = ids(2, 16)
    expected = ours(given).last_hidden_state
    assert again is ours
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(given).last_hidden_state, expected)
    wrapper = nn.Sequential(nn.ModuleDict({"base": pair("LongformerModel")[0]}))
    hasten.models.accelerate(wrapper)
    assert torch.equal(wrapper[0]["base"](given).last_hidden_state, expected)
    forced = hasten.models.accelerate(pair("LongformerModel")[0], implementation="reference")
    assert distance(forced(given).last_hidden_state, expected) < TOLERANCE


@torch.no_grad()
def test_nothing_is_quadratic(monkeypatch):
    shapes = []
    monkeypatch.setattr(hasten.models.longformer, "attention", recorded(hasten.models.longformer.attention, shapes))
    _, ours = pair("LongformerModel", max_position_embeddings=1030)
    ours(ids(1, 1025), global_attention_mask=(torch.arange(1025) == 0).long()[None])
    assert [shape[1] for shape in shapes] == [1025, 1, 1025, 1]  # not padded; the one global query on its own


def recorded(function, shapes):
    def run(q, *others, **options):
        shapes.append(tuple(q.shape))
        return function(q, *others, **options)

    return run


@torch.no_grad()
def test_bad_input_is_named():
    _, ours = pair("LongformerModel")
    with pytest.raises(ArgumentError, match="attention_mask: expected values 0, 1 and 2, got 7"):
        ours(ids(2, 8), attention_mask=torch.full((2, 8), 7))
    with pytest.raises(ArgumentError, match="output_attentions"):
        ours(ids(2, 8), output_attentions=True)
    with pytest.raises(ArgumentError, match="input_ids: expected either"):
        ours()
    with pytest.raises(ArgumentError, match="global_capacity: expected at least 3, got 2"):
        hasten.models.accelerate(ours, global_capacity=2)(
            ids(2, 8), global_attention_mask=(torch.arange(8) < 3).expand(2, 8)
        )
