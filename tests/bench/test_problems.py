"""Patterns in every peer's words, grids, and the small parsers of the command line."""

from __future__ import annotations

import pytest
import torch

from hasten.bench.problems import Grid, Pattern, Problem, parse_dtype, parse_sizes
from hasten.errors import ArgumentError
from hasten.masks import Causal, Full, Global, Window

PATTERNS = ["causal", "full", "window:3,0", "window:2,5", "longformer:3,2"]


@pytest.mark.parametrize("text", PATTERNS)
def test_a_pattern_says_the_same_to_us_and_to_flex(text):
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    query, key = torch.arange(17)[:, None], torch.arange(17)
    said = pattern.mask_mod()(0, 0, query, key).expand(17, 17)
    assert torch.equal(said, pattern.mask().keep(17)[0, 0])


def test_patterns_are_the_masks_of_their_names():
    assert Pattern.parse("causal").mask() == Causal()
    assert Pattern.parse("full").mask() == Full()
    assert Pattern.parse("window:7,0").mask() == Window(7, 0)
    assert Pattern.parse("longformer:4,2").mask() == Window(4, 4) | Global((0, 1))
    assert not Pattern.parse("window:7,0").is_causal


BAD_PATTERNS = ["", "casual", "causal:1", "window", "window:1", "window:1,2,3", "window:-1,0", "longformer:a,b"]


@pytest.mark.parametrize("text", BAD_PATTERNS)
def test_other_masks_are_refused_by_name(text):
    with pytest.raises(ArgumentError, match=r"^mask: expected causal, full"):
        Pattern.parse(text)


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


def test_flops_are_of_the_visible_cells():
    def problem(text: str) -> Problem:
        pattern, dtype = Pattern.parse(text), torch.bfloat16
        return Problem(batch=2, seqlen=8, num_heads=4, num_kv_heads=2, head_dim=16, pattern=pattern, dtype=dtype)

    assert problem("full").flops("forward") == 4 * 2 * 4 * 64 * 16
    assert problem("causal").flops("forward") == 4 * 2 * 4 * 36 * 16
    assert problem("causal").flops("backward") == 2.5 * problem("causal").flops("forward")
    assert problem("full").hbm_bytes("forward") == 2 * (2 * 8 * 4 * 16 + 2 * 8 * 2 * 16) * 2 + 2 * 8 * 4 * 4


def test_tensors_are_random_and_repeat_by_seed():
    sizes = {"head_dims": [16], "seqlens": [8], "tokens": 16, "width": 32}
    (problem,) = Grid(**sizes, patterns=[Pattern()], dtype=torch.float32)
    cpu = torch.device("cpu")
    first, again, other = problem.tensors(cpu, 1), problem.tensors(cpu, 1), problem.tensors(cpu, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (2, 8, 2, 16)
    assert problem.empty_tensors(cpu)[0].shape == first[0].shape


def test_sizes_are_lists_and_doubling_ranges():
    assert parse_sizes("seqlen", "512..4096,100") == [512, 1024, 2048, 4096, 100]
    assert parse_sizes("seqlen", "64") == [64]
    for text in ("", "a", "0", "1..2..3", "64,,128", "-4"):
        with pytest.raises(ArgumentError, match=r"^seqlen: expected sizes such as"):
            parse_sizes("seqlen", text)


def test_an_unknown_dtype_is_refused():
    assert parse_dtype("bf16") == torch.bfloat16
    with pytest.raises(ArgumentError, match="dtype: expected one of bf16, fp16, fp32, got 'float8'"):
        parse_dtype("float8")
