"""Reading memory and nothing else: the ceiling that decoding is measured against."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, STEPS = 4096, 16


@triton.jit
def read_all(source, sums, num_elements, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """The sum of BLOCK * STEPS numbers, so that no read can be left out."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    total = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source + at, mask=at < num_elements, other=0)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def read(source: Tensor) -> Tensor:
    """int32 sums of runs of `source`, a contiguous int32 tensor: every byte of it is read once."""
    programs = -(-source.numel() // (BLOCK * STEPS))
    sums = source.new_empty(programs)
    read_all[(programs,)](source, sums, source.numel(), BLOCK=BLOCK, STEPS=STEPS, num_warps=8)
    return sums


def checksum(source: Tensor) -> int:
    """The sum of all numbers modulo 2^32, for the test of `read`."""
    return int(read(source).to(torch.int64).sum()) % 2**32
