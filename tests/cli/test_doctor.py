"""`hasten doctor` and `hasten explain`: what they tell, and that a wrong result is told by the exit code."""

from __future__ import annotations

import json

import pytest
import torch

from hasten.bench import selfcheck
from hasten.cli import app

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def served_by_the_oracle(monkeypatch):
    monkeypatch.setenv("HASTEN_IMPLEMENTATION", "reference")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        app.main(arguments)
    code = exit_info.value.code
    return code if isinstance(code, int) else 0


def test_doctor_tells_what_is_here_and_passes(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "HASTEN_IMPLEMENTATION  'reference'" in out
    assert "window and global tokens  reference" in out
    assert out.count("PASS") == 3
    assert "FAIL" not in out


def test_doctor_as_json_is_one_object(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_exact"] is True
    assert found["installed"]["torch"] == torch.__version__
    assert set(found["served_by"]) == set(selfcheck.FEATURES)
    assert found["environment"]["HASTEN_IMPLEMENTATION"] == "reference"


def test_doctor_tells_that_a_version_of_triton_is_not_served(capsys, monkeypatch):
    envelope = pytest.importorskip("hasten.ops.hopper.envelope", reason="needs triton")
    assert selfcheck.not_served() == {}
    major, minor = envelope.END_VERSION
    monkeypatch.setattr(envelope.triton, "__version__", f"{major}.{minor}.0")
    assert run("doctor") == 0
    assert f"hopper is not served: written for triton >= 3.6, < {major}.{minor}, this is" in capsys.readouterr().out
    assert run("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["not_served"]["hopper"].startswith("written for triton")


def test_doctor_tells_that_triton_is_missing(monkeypatch):
    monkeypatch.setattr(selfcheck.importlib.util, "find_spec", lambda name: None)
    assert selfcheck.not_served() == dict.fromkeys(("hopper", "portable"), "triton is not installed")


def test_a_wrong_result_fails(capsys, monkeypatch):
    right = selfcheck._ours
    monkeypatch.setattr(selfcheck, "_ours", lambda q, k, v: right(q, k, v) * 1.01)
    assert run("doctor") == 1
    assert "FAIL  reference float32: out 1.0e-02" in capsys.readouterr().out


def test_nan_is_never_exact(monkeypatch):
    right = selfcheck._ours
    monkeypatch.setattr(selfcheck, "_ours", lambda q, k, v: right(q, k, v) * float("nan"))
    assert not selfcheck.check_exactness(CPU, torch.float32).is_exact


def test_what_none_serves_is_a_dash(monkeypatch):
    def refuse(*tensors, **arguments):
        raise selfcheck.UnsupportedError("any", "not here", "use another")

    monkeypatch.setattr(selfcheck, "explain", refuse)
    assert selfcheck.served_by(CPU)["causal"] == {"float32": "—", "bfloat16": "—", "float16": "—"}


def test_explain_tells_the_cost(capsys):
    sizes = {"batch": 2, "seqlen": 1024, "heads": 8, "kv-heads": 2, "head-dim": 64, "device": "cpu"}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert run("explain", *words, "--mask", "window:256,0") == 0
    out = capsys.readouterr().out
    assert out.startswith("implementation  reference")
    assert "Window(256, 0)" in out
    assert run("explain", *words, "--mask", "causal", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["forward_flops"] == 4 * 2 * 8 * 1024 * 1025 // 2 * 64
    assert told["forward_bytes"] == 2 * (2 * 1024 * 64 * 2) * (8 + 2) + 2 * 1024 * 8 * 4


def test_explain_of_a_long_sequence_needs_no_memory_for_it(capsys):
    assert run("explain", "--batch", "64", "--seqlen", "1048576", "--heads", "64", "--device", "cpu") == 0
    assert "50.0% of the cells visible" in capsys.readouterr().out


def test_explain_refuses_a_mask_in_one_line(capsys):
    assert run("explain", "--mask", "causual") == 2
    assert capsys.readouterr().err.startswith("error: mask: expected causal, full")
