"""Tile shapes of the portable kernels: a table keyed by phase, element size and head_dim, and how to look up.

A line is (rows, keys, warps, stages). Measured on an H200 (docs/log.md); other GPUs take the same lines, and
`fits` halves a tile that would not fit their shared memory.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """One line of the table: tile of BLOCK_M rows by BLOCK_N keys, warps of a program, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (phase, bytes of an element, largest padded head_dim) -> tile
TABLE: dict[tuple[str, int, int], Tile] = {
    ("forward", 2, 32): Tile(128, 64, 4, 3),
    ("forward", 2, 64): Tile(128, 64, 4, 3),
    ("forward", 2, 128): Tile(64, 64, 4, 3),
    ("forward", 2, 256): Tile(128, 64, 8, 2),
    ("forward", 4, 64): Tile(64, 32, 4, 2),
    ("forward", 4, 128): Tile(64, 32, 4, 2),
    ("forward", 4, 256): Tile(32, 32, 4, 1),
    ("dkdv", 2, 32): Tile(64, 64, 4, 2),
    ("dkdv", 2, 64): Tile(64, 64, 4, 2),
    ("dkdv", 2, 128): Tile(64, 64, 4, 2),
    ("dkdv", 2, 256): Tile(32, 64, 8, 1),
    ("dkdv", 4, 64): Tile(32, 32, 4, 2),
    ("dkdv", 4, 128): Tile(32, 32, 4, 1),
    ("dkdv", 4, 256): Tile(32, 32, 8, 1),
    ("dq", 2, 32): Tile(64, 64, 4, 2),
    ("dq", 2, 64): Tile(64, 64, 4, 2),
    ("dq", 2, 128): Tile(64, 64, 4, 2),
    ("dq", 2, 256): Tile(64, 32, 8, 1),
    ("dq", 4, 64): Tile(32, 32, 4, 2),
    ("dq", 4, 128): Tile(32, 32, 4, 1),
    ("dq", 4, 256): Tile(32, 32, 8, 1),
}


def tile(phase: str, element_size: int, block_d: int) -> Tile:
    """The line for a padded head_dim (of q, k or v, the larger)."""
    sizes = sorted(size for kind, bytes_, size in TABLE if (kind, bytes_) == (phase, element_size))
    return TABLE[phase, element_size, next(size for size in sizes if size >= block_d)]
