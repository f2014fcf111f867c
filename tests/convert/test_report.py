"""A converted checkpoint is written whole or not at all, and its report names every tensor."""

from __future__ import annotations

import pytest
import torch

from hasten.convert.report import COPIED, KEPT, Check, Report, expect_free, writing
from hasten.errors import ArgumentError, CheckpointError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with writing(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(tmp_path, error):
    with pytest.raises(error), writing(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        raise error
    assert names(tmp_path) == []


def test_an_interruption_leaves_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_an_existing_folder_is_replaced_only_when_told(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    with pytest.raises(ArgumentError, match=r"OUT: expected a folder that does not exist yet.*--overwrite"):
        expect_free(tmp_path / "out", overwrite=False)
    with writing(tmp_path / "out", overwrite=True) as folder:
        (folder / "model.safetensors").write_text("new")
    assert names(tmp_path / "out") == ["model.safetensors"]
    assert names(tmp_path) == ["out"]


def test_what_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("all my work")
    with pytest.raises(ArgumentError, match="a checkpoint to overwrite"):
        expect_free(tmp_path / "thesis", overwrite=True)
    with pytest.raises(ArgumentError, match="inside one that exists"):
        expect_free(tmp_path / "no" / "out", overwrite=False)


def test_the_report_counts_and_joins_layers():
    report = Report("BertModel", "LongformerModel")
    for layer in range(3):
        report.add(f"layer.{layer}.query", KEPT, f"layer.{layer}.q", torch.zeros(2, 2))
        report.add(f"layer.{layer}.query_global", COPIED, f"layer.{layer}.q", torch.zeros(2, 2), "from query")
    report.checks.append(Check("short inputs", 1e-7, 1e-5))
    lines = report.lines()
    assert lines[0] == "BertModel -> LongformerModel: 3 kept, 3 copied, 0 made, 0 dropped"
    assert lines[1] == "  copied  layer.N.query_global (3 layers) 2x2: from query"
    assert "short inputs: equal" in lines[2]
    report.expect_passed()
    assert report.to_dict()["entries"][1]["origin"] == "copied"


@pytest.mark.parametrize("difference", [1.0, float("nan")])
def test_a_failed_check_is_an_error(difference):
    report = Report("a", "b", checks=[Check("short inputs", difference, 1e-5)])
    with pytest.raises(CheckpointError, match="self-check failed: short inputs differs"):
        report.expect_passed()
