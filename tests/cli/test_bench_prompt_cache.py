"""`hasten bench prompt-cache` as a verb: a table, or records, of a tiny grid with the built-in model on a CPU."""

from __future__ import annotations

import json

import typer
from typer.testing import CliRunner

from hasten.cli import bench_prompt_cache

SMALL = ["--lengths", "300", "--known", "100", "--repeats", "1", "--device", "cpu"]


def invoke(*words: str):
    app = typer.Typer()
    app.command()(bench_prompt_cache.prompt_cache)
    return CliRunner().invoke(app, [*SMALL, *words])


def test_a_table_goes_to_stdout_and_records_to_a_file(tmp_path):
    done = invoke("--out", str(tmp_path / "made.jsonl"), "--folder", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "| 300 | 100% |" in done.stdout and "GB/s" in done.stdout
    made = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    assert [one["tier"] for one in made] == ["cold", "pages", "disk"]
    assert [one["cached_tokens"] for one in made] == [0, 299, 299] and made[2]["restored_tokens"] == 299
    assert made[1]["times_cold"] > 1 and made[2]["break_even_gbps"] > 0 and made[2]["disk_gbps"] > 0


def test_a_share_that_is_none():
    done = invoke("--known", "150")
    assert done.exit_code != 0 and "shares: expected more than 0, at most 1, got 1.5" in str(done.exception)
