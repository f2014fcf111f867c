"""`hasten convert gqa` end to end: the table, the folder, the report, one line for an error."""

from __future__ import annotations

import json

import pytest

from hasten.cli import app
from hasten.convert import source
from tests.engine import tiny_checkpoints


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            app.main(["convert", "gqa", *map(str, arguments)])
        return exit_info.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def folder(tmp_path):
    tiny_checkpoints.llama(tmp_path / "model", num_key_value_heads=4)
    return tmp_path / "model"


def test_a_dry_run_prints_the_table_and_writes_nothing(run, folder, tmp_path):
    code, out, _ = run(folder, tmp_path / "out", "--dry-run", "--gpu", "A100-80GB", "--context", "100")
    title, head, *rows = out.splitlines()
    assert (code, len(rows)) == (0, 3)
    assert "A100-80GB, float32, 100 tokens" in title and "not measurements" in title
    assert head.split()[:2] == ["KV", "heads"]
    assert not (tmp_path / "out").exists()
    code, out, _ = run(folder, "--dry-run", "--json")
    assert [row["num_kv_heads"] for row in json.loads(out)] == [4, 2, 1]


def test_a_conversion_writes_a_checkpoint_and_reports(run, folder, tmp_path):
    code, out, err = run(folder, tmp_path / "out", "--kv-heads", "2", "--method", "aligned", "--calibration", __file__)
    assert code == 0
    assert "expanded to multi-head, logits: equal" in out and "KV/token" in err
    assert out.splitlines()[-1] == f"written to {tmp_path / 'out'}"
    assert source.load_model(tmp_path / "out").config.num_key_value_heads == 2


def test_layers_may_differ_and_json_is_one_object(run, folder, tmp_path):
    code, out, _ = run(folder, tmp_path / "out", "--kv-heads", "2,1", "--json")
    assert code == 0
    assert "carried" in json.loads(out)["target"]
    assert (tmp_path / "out" / "layers_gqa.py").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-heads", "3"], "error: num_kv_heads: expected a divisor of 4, got 3"),
        (["--kv-heads", "two"], "error: --kv-heads: expected a number"),
        ([], "error: --kv-heads: expected a number"),
        (["--kv-heads", "2", "--method", "magic"], "error: method: expected one of mean, first"),
        (["--kv-heads", "2", "--gpu", "abacus"], "error: gpu: expected one of"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(run, folder, tmp_path, arguments, message):
    code, _, err = run(folder, tmp_path / "out", *arguments)
    assert code == 2
    assert err.splitlines()[-1].startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_no_folder_and_no_model_are_said(run, folder, tmp_path):
    assert "error: OUT: expected a folder to write" in run(folder, "--kv-heads", "2")[2]
    assert "no such folder" in run(tmp_path / "nowhere", tmp_path / "out", "--kv-heads", "2")[2]
