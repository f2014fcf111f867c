"""The built-in model is what the documentation says it is: size, shape, tokenizer, record of its training."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import CheckpointError
from hasten.models import builtin


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(builtin.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(builtin.path())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in builtin.FILES[1:]:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"config\.json missing; reinstall"):
        builtin.path(tmp_path)


def test_size_and_shape(model) -> None:
    config = model.config
    assert 5e6 <= sum(p.numel() for p in model.parameters()) <= 8e6
    assert (builtin.path() / "model.safetensors").stat().st_size <= 16_000_000
    assert config.model_type == "llama" and config.tie_word_embeddings
    assert config.num_key_value_heads == config.num_attention_heads == 8  # so that it can be converted to GQA
    assert config.max_position_embeddings >= 8192
    assert json.loads((builtin.path() / "config.json").read_text())["dtype"] == "bfloat16"


def test_tokenizer_shape(model, tokenizer) -> None:
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_tokenizer_is_lossless(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("width", [4, 8, 12, 16, 20])
def test_indentation_is_one_token(tokenizer, width: int) -> None:
    assert len(tokenizer.encode(" " * width, add_special_tokens=False)) == 1


def test_a_prompt_that_ends_at_a_line_or_an_indent_is_a_prefix(tokenizer) -> None:
    text = "def f(x):\n    if x:\n        return 1\n"
    ids = tokenizer.encode(text)
    for cut in (text.index("\n"), text.index("\n") + 1, text.index("if"), text.index("return")):
        prompt = tokenizer.encode(text[:cut])
        assert ids[: len(prompt)] == prompt


def test_training_is_recorded(model) -> None:
    record = json.loads((builtin.path() / "training.json").read_text())
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert 0 < record["validation"]["1024"]["bits_per_byte"] < 1.2
    assert 0 < record["validation"]["8192"]["bits_per_byte"] <= record["validation"]["1024"]["bits_per_byte"]
    assert all(package["licence"] for package in record["data"]["packages"])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("import numpy as", " np\n"),
        ("class A(B):\n    def __init__(self):\n        super().", "__init__("),
        ("def f(items):\n    for i in range(len(", "items"),
    ],
)
def test_it_knows_python(model, tokenizer, prompt: str, expected: str) -> None:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0]
    assert tokenizer.decode(ids[inputs["input_ids"].shape[1] :]).startswith(expected)
