"""The kernel that only reads: every number once, ends included."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from hasten.ops.portable import read


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [1, 70_000, 2 * read.BLOCK * read.STEPS])
def test_every_number_is_read_once(size):
    source = torch.arange(size, dtype=torch.int32) % 7
    assert read.checksum(source) == int(source.sum())
