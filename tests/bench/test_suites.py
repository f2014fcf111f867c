"""Grids and suites: the right problems, by their rows, and errors that name the argument."""

from __future__ import annotations

import pytest
import torch

from hasten.bench import tables
from hasten.bench.problems import Pattern
from hasten.bench.suites import SUITES, Grid, find_problems, parse_sizes
from hasten.errors import ArgumentError


def test_a_grid_holds_tokens_and_width():
    grid = Grid(head_dims=[64, 128], seqlens=[512, 16384], patterns=[Pattern(right=0)], dtype=torch.bfloat16)
    sizes = [(problem.head_dim, problem.seqlen, problem.batch, problem.num_heads) for problem in grid]
    assert sizes == [(64, 512, 32, 32), (64, 16384, 1, 32), (128, 512, 32, 16), (128, 16384, 1, 16)]
    assert all(problem.num_kv_heads == problem.num_heads for problem in grid)


def test_heads_and_batch_override_width_and_tokens():
    patterns = [Pattern()]
    grid = Grid(head_dims=[64], seqlens=[512], patterns=patterns, dtype=torch.float16, heads=8, kv_heads=2, batch=3)
    (problem,) = grid
    assert (problem.batch, problem.num_heads, problem.num_kv_heads) == (3, 8, 2)


def test_heads_that_do_not_divide_are_refused():
    grid = Grid(head_dims=[64], seqlens=[512], patterns=[Pattern()], dtype=torch.float16, heads=8, kv_heads=3)
    with pytest.raises(ArgumentError, match="kv_heads: expected a divisor of 8, got 3"):
        list(grid)


def test_sizes_are_lists_and_doubling_ranges():
    assert parse_sizes("seqlen", "512..4096,100") == [512, 1024, 2048, 4096, 100]
    assert parse_sizes("seqlen", "64") == [64]
    for text in ("", "a", "0", "1..2..3", "64,,128", "-4"):
        with pytest.raises(ArgumentError, match=r"^seqlen: expected sizes such as"):
            parse_sizes("seqlen", text)


def test_rows_of_a_suite_are_the_groups_of_its_tables():
    for suite in SUITES.values():
        for row, problems in suite(torch.bfloat16).items():
            assert problems
            assert {tables.group(problem.fields()) for problem in problems} == {row}


def test_the_hopper_suite_is_what_is_asked_for():
    rows = SUITES["hopper"](torch.bfloat16)
    assert len(rows["dense"]) == 3 * 6 * 2
    assert {problem.batch * problem.seqlen for problem in rows["dense"]} == {16384}
    assert {problem.num_heads * problem.head_dim for problem in rows["dense"]} == {2048}
    texts = [str(problem) for name in list(rows)[1:] for problem in rows[name]]
    assert texts == [
        "causal b4 s4096 h32/8 d128 bf16",
        "causal b1 s16384 h32/8 d128 bf16",
        "window:511,0 b1 s65536 h16 d64 bf16",
        "longformer:256,64 b1 s4096 h16 d64 bf16",
        "longformer:256,64 b1 s16384 h16 d64 bf16",
        "longformer:256,64 b1 s65536 h16 d64 bf16",
        *(f"blocks:{share} b1 s16384 h{heads} d{2048 // heads} bf16" for heads in (32, 16) for share in (5, 10, 25)),
        "packed:1024 b1 s32768 h16 d128 bf16",
        "documents:1024 b1 s32768 h16 d128 bf16",
    ]


def test_rows_are_chosen_by_name():
    chosen = find_problems("hopper", ["window", "gqa"], torch.float16)
    assert [str(problem.pattern) for problem in chosen] == ["window:511,0", "causal", "causal"]
    assert len(find_problems("hopper", [], torch.float16)) == 36 + 2 + 1 + 3 + 6 + 2
    with pytest.raises(ArgumentError, match="suite: expected one of hopper, got 'ampere'"):
        find_problems("ampere", [], torch.float16)
    with pytest.raises(ArgumentError, match=r"rows: expected some of dense, gqa.* got 'widow'"):
        find_problems("hopper", ["widow"], torch.float16)
