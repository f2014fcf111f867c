"""`hasten bench decode` as a verb: a table, or records, of a tiny grid on a CPU."""

from __future__ import annotations

import json

import typer
from typer.testing import CliRunner

from hasten.bench import decode as suite
from hasten.cli import bench_decode

SMALL = ["--heads", "mqa", "--batch", "1", "--context", "32", "--head-dim", "16", "--device", "cpu", "--peers", "none"]


def invoke(*words: str):
    app = typer.Typer()
    app.command()(bench_decode.decode)
    return CliRunner().invoke(app, [*SMALL, *words])


def test_a_table_goes_to_stdout_and_records_to_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "measure_read", lambda device: 10.0)
    done = invoke("--out", str(tmp_path / "made.jsonl"))
    assert done.exit_code == 0, done.output
    assert "mqa ctx=32 B=1" in done.stdout
    lines = (tmp_path / "made.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["decode", "decode"]


def test_json_lines_on_request(monkeypatch):
    monkeypatch.setattr(suite, "measure_read", lambda device: 10.0)
    done = invoke("--json")
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(lines[0])["implementation"] == "hasten_paged"
