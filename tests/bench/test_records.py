"""Records: one line each, append-only, and only those of one run beside each other."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from hasten.bench import machine, records
from hasten.errors import ArgumentError

CPU = torch.device("cpu")


def test_a_file_only_grows_and_reads_back(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    some = [{"kind": "a", "value": 1}, {"kind": "b", "value": [1.5, None]}, {"kind": "b", "value": "—"}]
    records.append(path, some[:1])
    records.append(path, some[1:])
    assert len(path.read_text().splitlines()) == 3
    assert records.read(path) == some


def test_a_line_is_json_even_where_a_number_is_none():
    line = records.to_line({"kind": "a", "error": {"out": float("inf")}, "ms": float("nan"), "n": 3})
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {
        "kind": "a",
        "error": {"out": None},
        "ms": None,
        "n": 3,
    }


def test_what_is_no_record_is_named_with_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"kind": "a"}\n\n{"value": 1}\n')
    with pytest.raises(ArgumentError, match="got line 3 of"):
        records.read(path)
    path.write_text("kind")
    with pytest.raises(ArgumentError, match="got line 1 of"):
        records.read(path)
    with pytest.raises(ArgumentError, match="got no file"):
        records.read(tmp_path / "none.jsonl")


def test_the_newest_run_of_each_case_stands_alone():
    def record(run: str, case: str, value: int) -> records.Record:
        return {"run": run, "case": case, "value": value}

    some = [record("1", "x", 1), record("1", "y", 2), record("1", "x", 3), record("2", "x", 4), record("2", "x", 5)]
    assert [item["value"] for item in records.newest(some, ["case"])] == [4, 5, 2]


def test_the_environment_names_device_versions_commit_and_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/hasten", "bench", "attention", "--window", "a b"])
    place = records.environment(CPU, "0123abc")
    assert place["torch"] == torch.__version__
    assert place["commit"] == "0123abc"
    assert place["command"] == "hasten bench attention --window 'a b'"
    assert place["device"] == machine.device_name(CPU) != ""
    assert place["threads"] == torch.get_num_threads()
    assert place["run"] != records.environment(CPU)["run"]
    assert place["peers"].get("transformers") == machine.package_version("transformers")
    assert all(place["peers"].values())  # those that are here


def test_the_commit_is_that_of_the_sources():
    folder = Path(machine.__file__).parent
    done = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode:
        assert machine.git_commit() is None
    else:
        assert done.stdout.startswith(machine.git_commit().removesuffix("+changed"))


def test_a_machine_is_described_without_what_it_lacks(monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda words: None)
    facts = machine.describe()
    assert facts["driver"] is None
    assert facts["commit"] is None
    assert facts["torch"] == torch.__version__
    assert "threads" in facts["CPU"]
    assert machine.package_version("no-such-package") is None
