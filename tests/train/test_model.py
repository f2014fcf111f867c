"""The loss of every decoder against logits of each document by itself, and models that cannot be trained."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from hasten.errors import ArgumentError, CheckpointError
from hasten.models import builtin
from hasten.train.loss import IGNORED
from hasten.train.model import LanguageModel, decoder_layers, enable_recompute, load
from tests.engine.tiny_checkpoints import llama
from tests.models.tiny import DECODERS, tokens

DOCUMENTS = (5, 1, 9)
# one of each kind: rotary, learned positions, softcap and window, masks made without positions; a second each
QUICK = [one for one in DECODERS if one.name in ("llama", "gpt2", "gemma2", "gpt_oss")]
OTHERS = [one for one in DECODERS if one not in QUICK]


def packed():
    """Two rows: three documents, and one."""
    seqlen = sum(DOCUMENTS)
    ids = tokens(2, seqlen)
    positions = torch.stack([torch.cat([torch.arange(n) for n in DOCUMENTS]), torch.arange(seqlen)])
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORED)], dim=1)
    labels[0, torch.tensor(DOCUMENTS).cumsum(0) - 1] = IGNORED
    return ids, positions, labels


def alone(model, ids):
    """Sum of the losses, each document in a forward of its own."""
    total = 0.0
    for row, lengths in zip(ids, (DOCUMENTS, (sum(DOCUMENTS),)), strict=True):
        for document in row.split(lengths):
            logits = model(input_ids=document[None]).logits[0]
            total = total + F.cross_entropy(logits[:-1].float(), document[1:], reduction="sum")
    return total


@pytest.mark.parametrize(
    "architecture", [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)], ids=str
)
def test_packed_documents_train_as_if_each_were_alone(architecture):
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    eager, fast = architecture.pair(**(dropout if architecture.name == "gpt2" else {}))
    ids, positions, labels = packed()
    want = alone(eager, ids)
    want.backward()
    language = LanguageModel(fast.train())
    assert language.is_fused
    assert language.is_flat == (architecture.name == "gpt_oss")
    got = language(ids, positions, labels)
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    theirs = dict(eager.named_parameters())
    for name, weight in fast.named_parameters():
        if theirs[name].grad is not None:
            torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=2e-3, atol=2e-4)


def test_a_model_whose_documents_see_each_other_is_refused():
    (oss,) = (one for one in DECODERS if one.name == "gpt_oss")
    with pytest.raises(ArgumentError, match="one that keeps packed documents apart, got GptOssForCausalLM"):
        LanguageModel(oss.build())


def test_logits_that_are_more_than_a_product_are_taken_as_they_are(monkeypatch):
    eager, fast = DECODERS[0].pair()
    plain = type(fast).forward

    def scaled(self, *args, **options):
        out = plain(self, *args, **options)
        out.logits = out.logits * 0.5
        return out

    monkeypatch.setattr(type(fast), "forward", scaled)
    language = LanguageModel(fast)
    ids, positions, labels = packed()
    assert not language.is_fused
    torch.testing.assert_close(language(ids, positions, labels), alone(eager, ids), rtol=1e-5, atol=1e-5)


def test_recomputed_layers_give_the_same_gradients():
    _, fast = DECODERS[0].pair()
    language = LanguageModel(fast.train())
    language(*packed()).backward()
    want = {name: one.grad.clone() for name, one in fast.named_parameters()}
    fast.zero_grad()
    enable_recompute(fast)
    language(*packed()).backward()
    assert all(torch.equal(one.grad, want[name]) for name, one in fast.named_parameters())


def test_layers_are_the_decoders():
    assert [len(decoder_layers(one.build())) for one in DECODERS[:6]] == [2, 2, 2, 2, 3, 3]


def test_a_checkpoint_is_loaded_in_float32_and_accelerated(tmp_path):
    saved = llama(tmp_path, torch.bfloat16)
    made = load(str(tmp_path))
    assert made.attention == "hasten" and made.model.config._attn_implementation == "hasten"
    assert made.model.training
    assert made.tokenizer.decode([made.tokenizer.eos_token_id]) == "<eos>"
    for one, other in zip(made.model.parameters(), saved.parameters(), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other.float())
    assert made.identity == load(str(tmp_path), attention="eager").identity != load("builtin").identity


def test_a_configuration_alone_begins_from_random_weights(tmp_path):
    llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    one, again, other = (load(str(path), seed=seed).model for path, seed in _starts(tmp_path))
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    tokenizer = load(str(tmp_path / "config.json"), tokenizer="builtin").tokenizer
    assert len(tokenizer) == json.loads((builtin.path() / "config.json").read_text())["vocab_size"]


def _starts(folder):
    return (folder, 1), (folder / "config.json", 1), (folder, 2)


def test_what_cannot_be_trained_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: not there; give a folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="no configuration there"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: "):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match="cannot be trained as a causal language model"):
        load(str(tmp_path))
    llama(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer there"):
        load(str(tmp_path), tokenizer=str(tmp_path / "nowhere"))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="cannot be trained"):
        load(str(tmp_path))
