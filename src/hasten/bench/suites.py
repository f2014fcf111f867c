"""Which problems are measured together: grids of sizes, and named suites of what a target asks for.

A suite is a table of rows; a row is a list of problems, named as `tables.py` names its groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from hasten.bench.problems import Pattern, Problem
from hasten.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Problems of one number of tokens and one model width, as the papers plot them.

    `heads` and `batch` default to width / head_dim and tokens / seqlen; `kv_heads` to as many as heads.
    """

    head_dims: Sequence[int]
    seqlens: Sequence[int]
    patterns: Sequence[Pattern]
    dtype: torch.dtype
    tokens: int = 16384
    width: int = 2048
    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None

    def __iter__(self) -> Iterator[Problem]:
        for head_dim, pattern, seqlen in itertools.product(self.head_dims, self.patterns, self.seqlens):
            heads = self.heads or max(1, self.width // head_dim)
            yield Problem(
                batch=self.batch or max(1, self.tokens // seqlen),
                seqlen=seqlen,
                num_heads=heads,
                num_kv_heads=self.kv_heads or heads,
                head_dim=head_dim,
                pattern=pattern,
                dtype=self.dtype,
            )


def hopper(dtype: torch.dtype) -> dict[str, list[Problem]]:
    """The rows by which the Hopper kernels are judged: dense ones of 16k tokens and width 2048, others of batch 1."""

    def problem(text: str, seqlen: int, num_heads: int, head_dim: int) -> Problem:
        sizes = {"batch": 1, "seqlen": seqlen, "num_heads": num_heads, "num_kv_heads": num_heads, "head_dim": head_dim}
        return Problem(**sizes, pattern=Pattern.parse(text), dtype=dtype)

    lengths = parse_sizes("seqlen", "512..16384")
    causal, full = Pattern(right=0), Pattern()
    dense = Grid(head_dims=(64, 128, 256), seqlens=lengths, patterns=(causal, full), dtype=dtype)
    grouped = Grid(head_dims=(128,), seqlens=(4096, 16384), patterns=(causal,), dtype=dtype, heads=32, kv_heads=8)
    blocks = [problem(f"blocks:{share}", 16384, 2048 // dim, dim) for dim in (64, 128) for share in (5, 10, 25)]
    return {
        "dense": list(dense),
        "gqa": list(grouped),
        "window": [problem("window:511,0", 65536, 16, 64)],
        "longformer": [problem("longformer:256,64", seqlen, 16, 64) for seqlen in (4096, 16384, 65536)],
        "blocks": blocks,
        "packed": [problem("packed:1024", 32768, 16, 128)],
        "documents": [problem("documents:1024", 32768, 16, 128)],
    }


SUITES: Mapping[str, Callable[[torch.dtype], dict[str, list[Problem]]]] = {"hopper": hopper}


def find_problems(suite: str, rows: Sequence[str], dtype: torch.dtype) -> list[Problem]:
    """Problems of those rows of a suite, of all its rows where none is named; raises ArgumentError for a wrong name."""
    if suite not in SUITES:
        raise ArgumentError("suite", f"one of {', '.join(SUITES)}", repr(suite), "or leave it out and give sizes")
    table = SUITES[suite](dtype)
    unknown = [row for row in rows if row not in table]
    if unknown:
        raise ArgumentError("rows", f"some of {', '.join(table)}", repr(unknown[0]), "separate by commas")
    return [problem for row in rows or table for problem in table[row]]


def parse_sizes(argument: str, text: str) -> list[int]:
    """Read "64,128" or "512..16384" (doubling); raises ArgumentError that names the argument."""
    sizes: list[int] = []
    for part in text.split(","):
        ends = part.split("..")
        if len(ends) > 2 or not all(end.strip().isdecimal() and int(end) > 0 for end in ends):
            raise ArgumentError(argument, "sizes such as 64,128 or 512..16384", repr(text), "every size is at least 1")
        size = int(ends[0])
        while size <= int(ends[-1]):
            sizes.append(size)
            size *= 2
    return sizes
