"""`hasten bench generate` as a verb: a table, or records, of a tiny model on a CPU."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from hasten.bench import generation as suite
from hasten.cli import bench_generate
from hasten.errors import ArgumentError

SMALL = ["--batch", "2", "--prompt", "5", "--new", "4", "--device", "cpu", "--repeats", "1", "--variants"]


def invoke(*words: str):
    app = typer.Typer()
    app.command()(bench_generate.generate)
    return CliRunner().invoke(app, [*SMALL, "transformers,hasten", *words])


@pytest.fixture(autouse=True)
def read(monkeypatch):
    monkeypatch.setattr(suite, "measure_read", lambda device: 10.0)


def test_a_table_goes_to_stdout_and_records_to_a_file(tmp_path):
    done = invoke("--out", str(tmp_path / "made.jsonl"), "--kv-dtype", "int8")
    assert done.exit_code == 0, done.output
    assert "| tiny 2x5+4 |" in done.stdout
    made = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    assert [(one["kind"], one["implementation"], one["kv_dtype"]) for one in made] == [
        ("generation", "transformers", None),
        ("generation", "hasten", "int8"),
    ]


def test_json_lines_on_request():
    done = invoke("--json")
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert [json.loads(line)["implementation"] for line in lines] == ["transformers", "hasten"]


def test_wrong_words_are_errors_that_name_them():
    for words, argument in ((("--shape", "gpt-5"), "shape"), (("--shape", "tiny", "--model", "x"), "shape")):
        done = invoke(*words)
        assert isinstance(done.exception, ArgumentError) and str(done.exception).startswith(f"{argument}: expected")
