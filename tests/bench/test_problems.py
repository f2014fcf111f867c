"""Patterns in every peer's words, what is drawn from them, and counts of cells."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from hasten.bench.problems import Pattern, Problem, block_layout, document_bounds, parse_dtype
from hasten.bench.suites import Grid
from hasten.errors import ArgumentError
from hasten.masks import Causal, Full, Global, Window

PATTERNS = ["causal", "full", "window:3,0", "window:2,5", "longformer:3,2"]
DRAWN = ["blocks:1", "blocks:25", "blocks:100", "documents:40", "packed:40"]


@pytest.mark.parametrize("text", [*PATTERNS, *DRAWN])
def test_a_pattern_says_the_same_to_us_and_to_flex(text):
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    size = 500 if pattern.is_drawn else 17
    query, key = torch.arange(size)[:, None], torch.arange(size)
    said = pattern.mask_mod(size)(0, 0, query, key).expand(size, size)
    assert torch.equal(said, pattern.mask(size).keep(size)[0, 0])


@pytest.mark.parametrize("text", [*PATTERNS, *DRAWN])
def test_flex_takes_the_function_of_a_pattern(text):
    pattern = Pattern.parse(text)
    if pattern.is_dense and pattern.right is None:
        pytest.skip("a full mask is no block mask")
    block_mask = flex_attention.create_block_mask(
        pattern.mask_mod(300), None, None, 300, 300, device="cpu", BLOCK_SIZE=64
    )
    blocks = F.pad(pattern.mask(300).keep(300)[0, 0], (0, 20, 0, 20)).unflatten(0, (5, 64)).unflatten(2, (5, 64))
    assert torch.equal(block_mask.to_dense()[0, 0].bool(), blocks.any(3).any(1))


@pytest.mark.parametrize("seqlen", [1, 130, 511])
@pytest.mark.parametrize("text", [*PATTERNS, "longformer:3,900", "window:600,0", *DRAWN])
def test_cells_are_counted_exactly(text, seqlen):
    pattern = Pattern.parse(text)
    sizes = {"batch": 1, "seqlen": seqlen, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    problem = Problem(**sizes, pattern=pattern, dtype=torch.bfloat16)
    keep = (torch.arange(seqlen) < pattern.num_global)[:, None] | (torch.arange(seqlen) < pattern.num_global)
    if pattern.num_global <= seqlen:
        keep = problem.mask(torch.device("cpu")).keep(seqlen)[0, 0]
    assert problem.pairs == 2 * int(keep.sum())
    assert problem.flops("forward") == 2 * problem.pairs * 2 * 16


@pytest.mark.parametrize("percent, kept", [(1, 1), (5, 6), (10, 13), (25, 32), (100, 128)])
def test_every_row_of_blocks_keeps_the_same_share_and_its_own(percent, kept):
    layout = block_layout(percent, 16384)
    assert layout.shape == (128, 128)
    assert set(layout.sum(1).tolist()) == {kept}
    assert bool(layout.diagonal().all())
    assert torch.equal(layout, block_layout(percent, 16384))


def test_documents_fill_the_row_and_are_of_that_length_in_the_mean():
    bounds = document_bounds(1024, 1 << 22)
    assert bounds[0] == 0
    assert bounds[-1] == 1 << 22
    assert all(after > before for before, after in itertools.pairwise(bounds))
    assert (1 << 22) / (len(bounds) - 1) == pytest.approx(1024, rel=0.1)
    assert document_bounds(1024, 100) == (0, 100)


def test_documents_are_one_row_and_what_is_drawn_needs_its_length():
    sizes = {"batch": 2, "seqlen": 64, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "dtype": torch.float32}
    with pytest.raises(ArgumentError, match="batch: expected 1, got 2"):
        Problem(**sizes, pattern=Pattern.parse("packed:9"))
    with pytest.raises(ArgumentError, match="mask: expected one that needs no length, got blocks:9"):
        Pattern.parse("blocks:9").mask()
    bounds, longest = Problem(**{**sizes, "batch": 1}, pattern=Pattern.parse("packed:9")).cu_seqlens("cpu")
    assert bounds.dtype == torch.int32
    assert int(bounds.diff().max()) == longest


def test_patterns_are_the_masks_of_their_names():
    assert Pattern.parse("causal").mask() == Causal()
    assert Pattern.parse("full").mask() == Full()
    assert Pattern.parse("window:7,0").mask() == Window(7, 0)
    assert Pattern.parse("longformer:4,2").mask() == Window(4, 4) | Global((0, 1))
    assert not Pattern.parse("window:7,0").is_causal


BAD_PATTERNS = ["", "casual", "causal:1", "window", "window:1", "window:1,2,3", "window:-1,0", "longformer:a,b"]
BAD_PATTERNS += ["blocks:0", "blocks:101", "blocks", "packed:0", "documents:1,2"]


@pytest.mark.parametrize("text", BAD_PATTERNS)
def test_other_masks_are_refused_by_name(text):
    with pytest.raises(ArgumentError, match=r"^mask: expected causal, full"):
        Pattern.parse(text)


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


def test_an_unknown_dtype_is_refused():
    assert parse_dtype("bf16") == torch.bfloat16
    with pytest.raises(ArgumentError, match="dtype: expected one of bf16, fp16, fp32, got 'float8'"):
        parse_dtype("float8")
