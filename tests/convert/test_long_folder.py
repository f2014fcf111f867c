"""Folders: what is written loads in plain transformers, and an accident leaves nothing behind."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from hasten.convert import led, long_folder, longformer
from hasten.convert.report import Check
from hasten.errors import ArgumentError, CheckpointError
from tests.convert.encoders import build, ids

OPTIONS = {"max_length": 100, "window": 16}


def saved(folder, family="Roberta", task="ForMaskedLM"):
    model = build(family, task)
    model.save_pretrained(folder)
    return model


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("kind", "family", "task"),
    [
        ("longformer", "Roberta", "ForMaskedLM"),
        ("longformer", "DistilBert", "ForQuestionAnswering"),
        ("led", "Bart", "ForConditionalGeneration"),
    ],
)
@torch.no_grad()
def test_what_is_written_loads_in_plain_transformers(tmp_path, kind, family, task):
    model = saved(tmp_path / "in", family, task)
    stages = []
    report = long_folder.convert_folder(kind, tmp_path / "in", tmp_path / "out", **OPTIONS, progress=stages.append)
    assert len(stages) == 4
    assert all(check.has_passed for check in report.checks)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == kind
    loaded = getattr(transformers, config.architectures[0]).from_pretrained(tmp_path / "out").eval()
    given = {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    if kind == "led":
        given["decoder_input_ids"] = ids(2, 5)
    expected, got = model(**given)[0], loaded(**given, global_attention_mask=torch.zeros(2, 9, dtype=torch.int64))[0]
    assert ((expected - got).abs().max() / expected.abs().max()) < 1e-5
    written = json.loads((tmp_path / "out" / "hasten_conversion.json").read_text())
    assert len(written["entries"]) == len(report.entries) > 40


def test_the_tokenizer_comes_along_with_its_new_length(tmp_path):
    saved(tmp_path / "in", "Bert", "ForMaskedLM")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=64).save_pretrained(tmp_path / "in")
    long_folder.convert_folder("longformer", tmp_path / "in", tmp_path / "out", **OPTIONS)
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("in", "out"))
    assert after.model_max_length == 100
    assert after("a b a")["input_ids"] == before("a b a")["input_ids"]
    assert type(after) is type(before)


@pytest.mark.parametrize("kind", ["longformer", "led"])
def test_a_failed_check_writes_nothing(tmp_path, monkeypatch, kind):
    saved(tmp_path / "in", *(("Roberta", "ForMaskedLM") if kind == "longformer" else ("Bart", "Model")))
    converter = {"longformer": longformer, "led": led}[kind]
    monkeypatch.setattr(converter, "self_checks", lambda *_: [Check("short texts", 1.0, 1e-4)])
    with pytest.raises(CheckpointError, match="self-check failed: short texts differs by 1"):
        long_folder.convert_folder(kind, tmp_path / "in", tmp_path / "out", **OPTIONS)
    assert names(tmp_path) == ["in"]


def test_an_interruption_writes_nothing(tmp_path):
    saved(tmp_path / "in")

    def interrupt(stage):
        if stage.startswith("loading what was written"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        long_folder.convert_folder("longformer", tmp_path / "in", tmp_path / "out", **OPTIONS, progress=interrupt)
    assert names(tmp_path) == ["in"]


def test_what_is_wrong_is_said_before_weights_are_read(tmp_path, monkeypatch):
    saved(tmp_path / "in")
    monkeypatch.setattr("hasten.convert.source.load_model", lambda path: pytest.fail("the weights were read"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    for changes, words in (
        ({}, "OUT: expected a folder that does not exist yet"),
        ({"out": tmp_path / "new", "window": 5}, "attention_window: expected an even number"),
        ({"out": tmp_path / "new", "max_length": -3}, "max_length"),
        ({"out": tmp_path / "new", "kind": "led"}, "MODEL: expected bart, got roberta"),
    ):
        given = {"kind": "longformer", "path": tmp_path / "in", "out": tmp_path / "out", **OPTIONS, **changes}
        with pytest.raises(ArgumentError, match=words):
            long_folder.convert_folder(**given)


@pytest.mark.parametrize(("text", "wanted"), [("512", 512), ("32,64", [32, 64])])
def test_windows_from_the_command_line(text, wanted):
    assert long_folder.parse_windows(text) == wanted
    with pytest.raises(ArgumentError, match="window"):
        long_folder.parse_windows("wide")
