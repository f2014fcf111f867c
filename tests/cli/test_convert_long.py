"""`hasten convert longformer` and `led` from end to end on tiny checkpoints."""

from __future__ import annotations

import json

import pytest

from hasten.cli import app
from tests.convert.encoders import build


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        app.main(["convert", *arguments])
    return exit_info.value.code or 0


@pytest.mark.parametrize(
    ("verb", "family", "task"), [("longformer", "Bert", "ForMaskedLM"), ("led", "Bart", "ForConditionalGeneration")]
)
def test_a_checkpoint_becomes_a_long_one(tmp_path, capsys, verb, family, task):
    build(family, task).save_pretrained(tmp_path / "in")
    given = [verb, str(tmp_path / "in"), str(tmp_path / "out"), "--max-length", "100", "--window", "8,16"]
    assert run(*given) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{family}{task} -> ")
    assert out.count("equal (largest difference") == 2
    assert out.splitlines()[-1] == f"written to {tmp_path / 'out'}"
    assert run(*given) == 2
    assert "expected a folder that does not exist yet" in capsys.readouterr().err
    assert run(*given, "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out)["checks"]


def test_errors_are_one_line(tmp_path, capsys):
    assert run("longformer", str(tmp_path / "nothing"), str(tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "no such folder" in err
