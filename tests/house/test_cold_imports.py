"""Importing hasten is cheap: in a fresh process it loads no optional giant, asks no device, opens no connection."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "triton",
    "transformers",
    "tokenizers",
    "typer",
    "rich",
    "starlette",
    "fastapi",
    "uvicorn",
    "matplotlib",
    "redis",
)
MAX_IMPORT_S = 0.5  # CPU seconds of `import hasten` beyond `import torch`

PROBE = """
import json, socket, sys, time

def refuse(*args, **kwargs):
    raise AssertionError("a connection was opened at import")

socket.socket.connect = refuse
import torch
before = set(sys.modules)
start = time.process_time()
{statement}
seconds = time.process_time() - start
print(json.dumps({{
    "seconds": seconds,
    "loaded": sorted(name for name in set(sys.modules) - before if "." not in name),
    "is_cuda_asked": torch.cuda.is_initialized(),
}}))
"""


def probe(statement: str) -> dict[str, object]:
    command = [sys.executable, "-c", PROBE.format(statement=statement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def heavy(facts: dict[str, object]) -> list[str]:
    return sorted(set(HEAVY) & set(facts["loaded"]))


def test_import_hasten_is_cold_and_quick():
    facts = probe("import hasten")
    assert heavy(facts) == []
    assert not facts["is_cuda_asked"]
    best_s = min(facts["seconds"], *(probe("import hasten")["seconds"] for _ in range(2)))
    assert best_s < MAX_IMPORT_S, f"import hasten takes {best_s:.2f} s beyond torch"


@pytest.mark.parametrize("name", ["attention", "merge", "explain", "Causal"])
def test_the_tensor_names_need_neither_triton_nor_transformers(name):
    facts = probe(f"import hasten; hasten.{name}")
    assert heavy(facts) == []
    assert not facts["is_cuda_asked"]


def test_one_call_on_the_cpu_needs_neither_triton_nor_transformers():
    facts = probe("import hasten; q = torch.zeros(1, 3, 2, 16); hasten.attention(q, q, q, mask=hasten.Causal())")
    assert not {"transformers", "typer", "rich", "matplotlib"} & set(facts["loaded"])
    assert not facts["is_cuda_asked"]


def test_the_probe_sees_a_heavy_import():
    assert heavy(probe("import rich")) == ["rich"]
