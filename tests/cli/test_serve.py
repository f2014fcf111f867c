"""`hasten serve` as a process: it says where it listens, answers, and ends after SIGINT; errors are one line."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import httpx2
import pytest

from hasten.cli import app

COMMAND = [sys.executable, "-c", "from hasten.cli.app import main; main()", "serve", "--port", "0", "--num-pages", "40"]


def test_it_serves_the_built_in_model_until_interrupted():
    with subprocess.Popen([*COMMAND, "--name", "small"], stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stderr.readline, "")
            address = next(found[1] for line in lines if (found := re.search(r"serving small at (http\S+)", line)))
            body = {"model": "small", "prompt": "def add(a, b):", "temperature": 0, "max_tokens": 4}
            answer = httpx2.post(f"{address}/completions", json=body, timeout=60)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()


WRONG = [("--port", "70000", "port"), ("--max-waiting", "0", "max_waiting"), ("--shutdown-s", "0", "shutdown_s")]


@pytest.mark.parametrize(("option", "value", "name"), WRONG, ids=[one[2] for one in WRONG])
def test_a_wrong_option_is_one_line(option, value, name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        app.main(["serve", "--num-pages", "40", option, value])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {name}: expected ")
