"""Checkpoint folders: what is written loads in plain transformers, and nothing half-done is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from hasten.convert import gqa, gqa_folder, source
from hasten.convert.report import FILE, Check
from hasten.errors import ArgumentError, CheckpointError
from tests.convert import families
from tests.engine import tiny_checkpoints
from tests.models import tiny

transformers.utils.logging.disable_progress_bar()

LOAD_WITHOUT_HASTEN = """
import json, sys, torch, transformers
sys.modules["hasten"] = None  # an import of it fails
transformers.utils.logging.disable_progress_bar()
for folder, auto, given in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(**{name: torch.tensor(ids) for name, ids in given.items()}).logits
    torch.save(logits, folder + "/logits.pt")
"""


@pytest.fixture
def saved(tmp_path):
    def save(name, dtype=torch.float32, **options):
        folder = tmp_path / name
        families.build(name, dtype, **options).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def llama(tmp_path):
    tiny_checkpoints.llama(tmp_path / "llama", num_key_value_heads=4)
    return tmp_path / "llama"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "count"), [("qwen2", 2), ("gpt2", 1), ("falcon-parallel", 2), ("gemma3", 1)])
def test_results_of_transformers_classes_load_in_plain_transformers(saved, tmp_path, name, count, dtype):
    report = gqa_folder.convert_folder(saved(name, dtype), tmp_path / "out", count)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.dtype == dtype
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(report.checks) >= 2 and all(check.has_passed for check in report.checks)
    assert json.loads((tmp_path / "out" / FILE).read_text())["target"] == report.target
    assert not list((tmp_path / "out").glob("*.py"))


def test_carried_classes_load_in_plain_transformers_where_hasten_is_not(saved, tmp_path):
    jobs, expected = [], {}
    cases = [(name, 2) for name in families.CARRIED if "scaled" not in name] + [("llama", (2, 1)), ("phi3", (1, 2))]
    for name, count in cases:
        out = tmp_path / f"{name}-out"
        gqa_folder.convert_folder(saved(name), out, count)
        model = source.load_model(out)  # hasten's own loading runs no code of a checkpoint
        given = {"input_ids": tiny.tokens(2, 9).tolist()}
        given |= {"decoder_input_ids": tiny.tokens(2, 7).tolist()} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            expected[out] = model(**{key: torch.tensor(ids) for key, ids in given.items()}).logits
        auto = "AutoModelForSeq2SeqLM" if model.config.is_encoder_decoder else "AutoModelForCausalLM"
        jobs.append((str(out), auto, given))
    command = [sys.executable, "-c", LOAD_WITHOUT_HASTEN, json.dumps(jobs)]
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=cache, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for out, logits in expected.items():
        assert torch.equal(torch.load(out / "logits.pt"), logits), out.name


def test_tied_weights_are_written_once_and_tied_again(saved, tmp_path):
    gqa_folder.convert_folder(saved("llama", tie_word_embeddings=True), tmp_path / "out", 2)
    model = source.load_model(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_calibration_text_and_tokenizer(llama, tmp_path):
    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n" * 20)
    options = {"method": "factored", "groups": "clustered", "calibration": [text]}
    report = gqa_folder.convert_folder(llama, tmp_path / "out", 2, **options)
    assert not any("without calibration" in remark for remark in report.remarks)
    assert source.load_tokenizer(tmp_path / "out")("def").input_ids == source.load_tokenizer(llama)("def").input_ids


def test_crops_come_evenly_from_long_texts(tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("the quick brown fox " * 20_000)
    crops = gqa_folder.read_crops([text], tiny_checkpoints.TOKENIZER)
    assert len(crops) == gqa_folder.MAX_CROPS
    assert all(crop.shape[0] == 1 and 0 < crop.shape[1] <= gqa_folder.CROP for crop in crops)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"", "which is empty"), (b"\xff\xfe\x00", "a text file in UTF-8")]
)
def test_calibration_that_is_no_text_is_refused(llama, tmp_path, content, message):
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        gqa_folder.convert_folder(llama, tmp_path / "out", 2, method="aligned", calibration=[text])
    assert not (tmp_path / "out").exists()


def test_calibration_without_a_tokenizer_is_refused(saved, tmp_path):
    with pytest.raises(ArgumentError, match="a checkpoint with a tokenizer"):
        gqa_folder.convert_folder(saved("llama"), tmp_path / "out", 2, calibration=[__file__])


@pytest.mark.parametrize(
    "stage", ["loading the checkpoint", "converting by mean", "writing", "loading what was written"]
)
def test_an_interruption_leaves_nothing(llama, tmp_path, stage):
    def interrupt(now):
        if now.startswith(stage):
            raise KeyboardInterrupt

    before = left(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        gqa_folder.convert_folder(llama, tmp_path / "out", 2, progress=interrupt)
    assert left(tmp_path) == before


def test_a_failed_check_leaves_nothing_and_what_stood_there_stays(llama, tmp_path, monkeypatch):
    gqa_folder.convert_folder(llama, tmp_path / "out", 2)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(gqa_folder, "self_checks", lambda model: [Check("planted", 1.0, 0.1)])
    with pytest.raises(CheckpointError, match="planted differs by"):
        gqa_folder.convert_folder(llama, tmp_path / "out", 1, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert left(tmp_path) == ["llama", "out"]


def test_a_full_disk_is_one_line_and_leaves_nothing(llama, tmp_path, monkeypatch):
    def fail(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device; make room"):
        gqa_folder.convert_folder(llama, tmp_path / "out", 2)
    assert left(tmp_path) == ["llama"]


def test_saving_a_carried_model_anywhere_brings_its_code(tmp_path):
    gqa.to_gqa(families.build("t5"), 2).save_pretrained(tmp_path / "later")
    assert {"t5_gqa.py", "grouped.py"} <= set(left(tmp_path / "later"))
    config = json.loads((tmp_path / "later" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSeq2SeqLM"] == "t5_gqa.T5GQAForConditionalGeneration"
    gqa.to_mha(source.load_model(tmp_path / "later")).save_pretrained(tmp_path / "back")
    assert "auto_map" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_an_existing_folder_is_kept_unless_told(llama, tmp_path):
    gqa_folder.convert_folder(llama, tmp_path / "out", 2)
    with pytest.raises(ArgumentError, match="a folder that does not exist yet"):
        gqa_folder.convert_folder(llama, tmp_path / "out", 1)
    gqa_folder.convert_folder(llama, tmp_path / "out", 1, overwrite=True)
    assert source.load_model(tmp_path / "out").config.num_key_value_heads == 1


def test_what_cannot_be_is_refused_before_weights_are_read(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "load_model", lambda path: pytest.fail("read the weights"))
    with pytest.raises(ArgumentError, match="a divisor of 4, got 3"):
        gqa_folder.convert_folder(llama, tmp_path / "out", 3)


def test_checks_see_a_wrong_grouping(monkeypatch):
    model = gqa.to_gqa(families.build("llama"), 2)
    strided = gqa.to_mha(model, is_strided=True)
    monkeypatch.setattr(gqa_folder, "to_mha", lambda model, is_strided=False: strided)
    assert not any(check.has_passed for check in gqa_folder.self_checks(model) if "mean" not in check.name)


def test_incomplete_sources_are_refused(llama, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        source.load_config(tmp_path / "nowhere")
    config = json.loads((llama / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (llama / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(CheckpointError, match="quantised"):
        source.load_config(llama)
    (llama / "config.json").write_text(json.dumps(config))
    weights = llama / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        source.load_model(llama)
    weights.rename(llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="its weights are a pickle"):
        source.load_model(llama)
    (llama / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        source.load_config(llama)
