"""`hasten generate` end to end on a tiny random checkpoint and on the built-in model: streams, figures, errors."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from hasten.cli import app
from hasten.engine import Sampling, generate
from hasten.models import builtin
from tests.engine.tiny_checkpoints import TOKENIZER, llama

PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    llama(path)
    return path


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*arguments, stdin=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_info:
            app.main(["generate", *map(str, arguments)])
        return Done(exit_info.value.code or 0, *capsys.readouterr())

    return call


def expected(folder, **options):
    model = llama(folder)
    *_, last = generate(model, TOKENIZER, PROMPT, Sampling(max_tokens=16, **options))
    return last


def test_text_on_stdout_and_figures_on_stderr(run, folder):
    done = run(folder, "--prompt", PROMPT, "--max-tokens", 16)
    assert done.exit_code == 0
    assert done.stdout.rstrip("\n") == expected(folder).text.rstrip("\n") and done.stdout.endswith("\n")
    first, second, third = done.stderr.strip().splitlines()[-3:]
    assert first.startswith("TTFT ") and " tokens/s (" in first and first.endswith(" tokens in, 16 out · length")
    assert second.startswith("KV cache 0.0") and second.endswith("MiB at its context of 64)")
    assert third == "float32 on cpu · attention: hasten · decoding: recorded step"


def test_the_prompt_from_stdin(run, folder):
    typed = run(folder, "--prompt", PROMPT, "--max-tokens", 16)
    piped = run(folder, "--prompt", "-", "--max-tokens", 16, stdin=PROMPT)
    assert piped.exit_code == 0 and piped.stdout == typed.stdout


def test_one_json_object(run, folder):
    done = run(folder, "--prompt", PROMPT, "--max-tokens", 16, "--json")
    found, last = json.loads(done.stdout), expected(folder)
    assert done.exit_code == 0 and done.stdout.count("\n") == 1
    assert (found["text"], tuple(found["token_ids"])) == (last.text, last.token_ids)
    assert found["model"] == str(folder) and found["finish_reason"] == "length" and found["cache_bytes"] > 0


def test_without_a_kv_cache_the_text_is_the_same_and_the_saving_is_shown(run, folder):
    with_cache = run(folder, "--prompt", PROMPT, "--max-tokens", 16)
    without = run(folder, "--prompt", PROMPT, "--max-tokens", 16, "--no-kv-cache")
    assert without.exit_code == 0 and without.stdout == with_cache.stdout
    assert "no KV cache: " in without.stderr and " times the " in without.stderr


def test_choices_reach_the_engine(run, folder):
    options = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 5}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = run(folder, "--prompt", PROMPT, "--max-tokens", 16, "--json", *flags)
    assert tuple(json.loads(done.stdout)["token_ids"]) == expected(folder, **options).token_ids


def test_stops_reach_the_engine(run, folder):
    full = expected(folder)
    done = run(folder, "--prompt", PROMPT, "--max-tokens", 16, "--json", "--stop-id", full.token_ids[3], "--stop", "§§")
    assert json.loads(done.stdout)["stopped_by"] == full.token_ids[3]
    piece = full.text[2:5]
    done = run(folder, "--prompt", PROMPT, "--max-tokens", 16, "--stop", piece, "--stop", "§§")
    assert done.stdout.rstrip("\n") == full.text[: full.text.index(piece)].rstrip("\n")


ERRORS = {
    "no_folder": (["/no/such/folder", "--prompt", "x"], "error: /no/such/folder: no such folder; give a local"),
    "empty_prompt": (["{}", "--prompt", ""], "error: prompt: expected at least one token, got ''"),
    "long_prompt": (["{}", "--prompt", "word " * 99], "error: prompt: expected at most 63 tokens, for a context of 64"),
    "no_tokens": (["{}", "--prompt", "x", "--max-tokens", "0"], "error: max_tokens: expected an int >= 1, got 0"),
    "cold_top_k": (["{}", "--prompt", "x", "--top-k", "3"], "error: top_k: expected a temperature above 0"),
    "dtype": (["{}", "--prompt", "x", "--dtype", "int4"], "error: dtype: expected one of auto, float32"),
    "device": (["{}", "--prompt", "x", "--device", "warp"], "error: device: expected a device of this machine"),
    "chat": (["{}", "--prompt", "x", "--chat"], "error: chat: expected a checkpoint with a chat template"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_and_exit_code_2(run, folder, name):
    arguments, message = ERRORS[name]
    done = run(*(argument.replace("{}", str(folder)) for argument in arguments))
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr


def test_a_missing_prompt_is_a_usage_error(run, folder):
    done = run(folder)
    assert done.exit_code == 2 and "--prompt" in done.stderr


def test_the_built_in_model_in_a_fresh_process():
    command = [sys.executable, "-c", "from hasten.cli.app import main; main()", "generate", "--max-tokens", "12"]
    done = subprocess.run(
        [*command, "--prompt", "import numpy as"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" np\n")
    assert "decoding: recorded step" in done.stderr and "warn" not in done.stderr.lower()
    assert str(builtin.path()) not in done.stderr
