"""What holds for every test: which need is met in this process, fixed seeds, one thread per worker, no network."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded by a test; set before anyone imports the hub
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start; two workers already fill two cores

import hypothesis
import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("house")


def missing_need(marks: set[str]) -> str | None:
    """Return what this process lacks for a test with these marks, or None when it can run."""
    if "interpreter" in marks and not HAS_TRITON:
        return "needs triton"
    if "interpreter" in marks and not IS_INTERPRETED:
        return "needs TRITON_INTERPRET=1 from the start of the process (make test-interpreter)"
    if "compiler" in marks and not HAS_TRITON:
        return "needs triton"
    if "compiler" in marks and IS_INTERPRETED:
        return "the interpreter replaces the compiler in this process"
    if "gpu" in marks and IS_INTERPRETED:
        return "the interpreter replaces the GPU in this process"
    if "gpu" in marks and not torch.cuda.is_available():
        return "needs a CUDA device"
    return None


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        lack = missing_need({mark.name for mark in item.iter_markers()})
        if lack:
            item.add_marker(pytest.mark.skip(reason=lack))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
