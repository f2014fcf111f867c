"""Rings of shared memory that TMA fills and empties: boxes of a descriptor, which products take as matrices.

A box has the rank of its descriptor, (1, 1, rows, dims) or (1, 1, 1, rows, dims): Triton 3.9 asks for it in every
layout that TMA sees, and 3.6 makes the same code of it as of a matrix.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def ring(descriptor, SLOTS: gl.constexpr):
    """Shared memory for `SLOTS` boxes of a descriptor."""
    shape: gl.constexpr = [SLOTS] + descriptor.block_shape  # noqa: RUF005  # the compiler cannot unpack
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def matrix(box):
    """One box as (rows, dims)."""
    ROWS: gl.constexpr = box.shape[-2]
    DIMS: gl.constexpr = box.shape[-1]
    return box.reshape([ROWS, DIMS])
