"""What the README tells a reader to type works: every command and every Python block, in order, in an empty folder.

A block that cannot run here carries `<!-- not run: reason -->` on the line above it. Lines that start with make,
pip, git or cd set up a machine; CI itself is their test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?P<above>[^\n]*)\n```(?P<language>sh|bash|console|python)\n(?P<body>.*?)\n```", re.DOTALL)
SETUP = ("make", "pip", "git", "cd")


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    excuse: str | None


def blocks(text: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer("\n" + text):
        excuse = re.search(r"<!-- not run: (.+?) -->", match["above"])
        found.append(Block(match["language"], match["body"], excuse[1] if excuse else None))
    return found


def commands(body: str) -> list[str]:
    lines = body.replace("\\\n", " ").splitlines()
    stripped = [line.removeprefix("$ ").strip() for line in lines]
    return [line for line in stripped if line and not line.startswith("#") and line.split()[0] not in SETUP]


def run(command: list[str], folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_every_command_in_the_readme_works(tmp_path):
    for block in blocks((ROOT / "README.md").read_text(encoding="utf-8")):
        if block.excuse is None and block.language != "python":
            for command in commands(block.body):
                run(["bash", "-c", command], tmp_path)


@pytest.mark.slow
def test_the_python_of_the_readme_works(tmp_path):
    found = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    program = "\n".join(block.body for block in found if block.language == "python" and block.excuse is None)
    run([sys.executable, "-c", program], tmp_path)


def test_blocks_commands_and_excuses_are_found():
    text = "```sh\nmake run\n$ hasten doctor \\\n  --json\n# talk\n```\n\n"
    text += "<!-- not run: needs a GPU -->\n```python\nx = 1\n```\n"
    first, second = blocks(text)
    assert commands(first.body) == ["hasten doctor    --json"]
    assert (first.excuse, second.excuse, second.language) == (None, "needs a GPU", "python")


def test_a_failing_command_fails(tmp_path):
    with pytest.raises(AssertionError, match="exit 3"):
        run(["bash", "-c", "exit 3"], tmp_path)
