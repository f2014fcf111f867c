"""A checkpoint is loaded as it is, or the error says what is wrong with it and what to do."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hasten.engine import Sampling, checkpoint, generate, load
from hasten.errors import ArgumentError, CheckpointError
from hasten.models import builtin
from tests.engine.tiny_checkpoints import llama, save
from tests.models.tiny import GENERATORS, PLAIN

BY_NAME = {one.name: one for one in GENERATORS}


def test_what_was_saved_is_loaded(tmp_path):
    model = llama(tmp_path)
    found = load(tmp_path, device="cpu")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.model.state_dict().items())
    assert not found.model.training and found.attention == "hasten"
    assert found.model.config._attn_implementation == "hasten"
    assert found.num_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert found.tokenizer.decode(found.tokenizer("def f")["input_ids"]) == "def f"


def test_parts_are_loaded(tmp_path):
    model = llama(tmp_path)
    save(model, tmp_path / "parts", max_shard_size="10KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    found = load(tmp_path / "parts", device="cpu")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.model.state_dict().items())


def test_an_encoder_decoder_is_loaded(tmp_path):
    save(BY_NAME["t5"].build(), tmp_path)
    assert load(tmp_path, device="cpu").model.config.is_encoder_decoder


def test_the_stages_are_told(tmp_path):
    llama(tmp_path)
    stages = []
    load(tmp_path, progress=stages.append)
    assert [stage.split()[0] for stage in stages] == ["checking", "loading", "loading"]


def test_a_model_whose_attention_is_out_of_reach_keeps_its_own(tmp_path):
    config = transformers.FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    save(transformers.FalconForCausalLM(config), tmp_path)
    found = load(tmp_path, device="cpu")
    assert "would not be reached" in found.attention
    *_, last = generate(found.model, found.tokenizer, "def f", Sampling(max_tokens=4))
    assert len(last.token_ids) == 4 and last.path.startswith("the model's own forward: ")


@pytest.mark.parametrize(
    ("stored", "asked", "got"),
    [
        (torch.bfloat16, "auto", torch.float32),
        (torch.float32, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.bfloat16, "bfloat16", torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes_on_a_cpu(tmp_path, stored, asked, got):
    llama(tmp_path, stored)
    assert load(tmp_path, device="cpu", dtype=asked).model.dtype == got


def test_large_half_precision_stays_as_stored_on_a_cpu(tmp_path, monkeypatch):
    model = llama(tmp_path, torch.bfloat16)
    size = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(checkpoint, "MAX_WIDENED_BYTES", 4 * size - 1)
    assert load(tmp_path, device="cpu").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype: expected one of auto, float32, bfloat16, float16, got 'float8'"),
        ({"device": "quantum"}, "device: expected a device of this machine, got 'quantum'; try cpu"),
        ({"device": "cuda:99"}, "device: expected a device of this machine, got 'cuda:99'; try cpu"),
    ],
    ids=str,
)
def test_a_dtype_or_device_that_cannot_be_had(tmp_path, options, message):
    llama(tmp_path)
    with pytest.raises(ArgumentError) as caught:
        load(tmp_path, **options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def edit(folder, **fields):
    file = folder / "config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, **fields}))


def truncate(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def to_parts(folder, loses):
    save(transformers.LlamaForCausalLM.from_pretrained(folder), folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    if loses:
        sorted(folder.glob("model-*.safetensors"))[1].unlink()
    else:
        (folder / "model.safetensors.index.json").write_text("{}")


def to_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


BREAKS = {
    "no_config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing; give the folder"),
    "config_no_json": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read: "),
    "config_a_list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json cannot be read: "),
    "unknown_architecture": (
        lambda folder: edit(folder, model_type="nope"),
        "unknown architecture 'nope'; transformers",
    ),
    "no_model_type": (lambda folder: edit(folder, model_type=None), "config.json cannot be read: "),
    "remote_code": (
        lambda folder: edit(folder, model_type="nope", auto_map={"AutoConfig": "evil.Config"}),
        "unknown architecture 'nope'; transformers",
    ),
    "no_head": (lambda folder: edit(folder, architectures=["LlamaModel"]), "LlamaModel does not generate text; "),
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights; expected model.safetensors"),
    "header_cut": (lambda folder: truncate(folder, 20), "truncated or damaged: "),
    "tensors_cut": (lambda folder: truncate(folder, -8), "truncated or damaged: "),
    "empty_weights": (lambda folder: truncate(folder, 0), "truncated or damaged: "),
    "missing_weight": (
        lambda folder: drop(folder, "model.layers.1.mlp.up_proj.weight"),
        "1 weights of LlamaForCausalLM are missing, the first is model.layers.1.mlp.up_proj.weight; ",
    ),
    "other_sizes": (lambda folder: edit(folder, intermediate_size=64), "cannot be loaded: "),
    "more_layers": (lambda folder: edit(folder, num_hidden_layers=3), "weights of LlamaForCausalLM are missing"),
    "part_lost": (lambda folder: to_parts(folder, loses=True), "parts are missing, the first is model-00002-of-"),
    "index_damaged": (lambda folder: to_parts(folder, loses=False), "cannot be read: "),
    "pickle": (to_pickle, "its weights are a pickle (pytorch_model.bin), which can run code; convert it"),
    "no_tokenizer": (without_tokenizer, "no tokenizer; save the tokenizer there too"),
    "tokenizer_damaged": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "its tokenizer cannot be loaded: ",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_checkpoint_is_told_in_one_line(tmp_path, name):
    llama(tmp_path)
    do, message = BREAKS[name]
    do(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, device="cpu")
    assert str(caught.value).startswith(str(tmp_path)) and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(("made", "problem"), [(None, "no such folder"), ("file", "not a folder")])
def test_a_path_that_is_no_folder(tmp_path, made, problem):
    path = tmp_path / "model"
    if made:
        path.write_text("")
    with pytest.raises(CheckpointError, match=f"{problem}; give a local Hugging Face checkpoint"):
        load(path)


def test_an_encoder_does_not_generate(tmp_path):
    save(transformers.BertForMaskedLM(transformers.BertConfig(**PLAIN)), tmp_path)
    with pytest.raises(CheckpointError, match="BertForMaskedLM does not generate text; generation needs"):
        load(tmp_path)


def test_a_pickle_is_read_on_an_explicit_word(tmp_path):
    model = llama(tmp_path)
    to_pickle(tmp_path)
    found = load(tmp_path, device="cpu", allow_pickle=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.model.state_dict().items())


def test_the_built_in_model_loads():
    found = load(builtin.path(), device="cpu")
    assert found.model.dtype == torch.float32 and found.attention == "hasten"
