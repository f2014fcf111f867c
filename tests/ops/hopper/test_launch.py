"""What the host works out for a launch, without any GPU: items, groups of heads, the tile, the envelope."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from hasten.masks import BlockSparse, Causal, Full, Mask, Window
from hasten.ops.call import Call
from hasten.ops.hopper import envelope, launch, table

MATRIX = BlockSparse(torch.ones(2, 4, 2, 2, dtype=torch.bool), 64)


def sizes(seqlen: int, heads: int, kv_heads: int, batch: int = 2, mask: Mask | None = None, dim: int = 64) -> Any:
    """Sizes of a dense call."""
    q, k = (torch.empty(batch, seqlen, count, dim, dtype=torch.bfloat16) for count in (heads, kv_heads))
    terms = Call(mask=mask or Full(), softmax_scale=1.0, max_seqlen_q=seqlen, max_seqlen_k=seqlen)
    return launch.Sizes.of(q, k, k, terms)


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(100, 0)], ids=str)
@pytest.mark.parametrize("seqlen", [1, 1000, 16384, 500_000])
@pytest.mark.parametrize(("heads", "kv_heads", "batch"), [(1, 1, 1), (16, 16, 16), (32, 4, 3), (71, 1, 2)])
def test_groups_hold_whole_groups_of_query_heads(seqlen, heads, kv_heads, batch, mask):
    own = sizes(seqlen, heads, kv_heads, batch, mask)
    small, num_groups = own.groups(table.D64, 132)
    assert small >= 1 and small % (heads // kv_heads) == 0
    assert 0 <= num_groups * small <= heads * batch


def test_the_last_group_evens_out_the_end_where_items_differ():
    full, causal = (sizes(4096, 16, 16, 4, mask, 128).groups(table.D128, 132) for mask in (Full(), Causal()))
    assert full == (5, 12)  # 5 heads of 32 tiles fill 132 CTAs
    assert causal == (5, 9) and (64 - 5 * 9) * 32 >= 4 * 132


def test_items_of_packed_sequences_are_bounded():
    bounds = torch.tensor([0, 1000, 1001, 1003], dtype=torch.int32)
    q = torch.empty(1003, 4, 64, dtype=torch.bfloat16)
    terms = Call(
        mask=Full(), softmax_scale=1.0, max_seqlen_q=1000, max_seqlen_k=1000, cu_seqlens_q=bounds, cu_seqlens_k=bounds
    )
    line = table.D64
    exact = 4 * sum(-(-length // line.block_m) for length in (1000, 1, 2))
    assert exact <= launch.Sizes.of(q, q, q, terms).num_items(line) == 4 * (1003 // 128 + 3)


@pytest.mark.parametrize(("heads", "want"), [(4, (8, 2))])
def test_lists_that_differ_by_batch_and_head_have_strides(heads, want):
    own = sizes(128, heads, heads, 2, MATRIX)
    assert own.list_strides(table.Tile(1, 64, 2, 2)) == want
    assert sizes(128, heads, heads, 2, Window(3, 3, dilation=2) | Window(1, 1)).list_strides(table.D64) == (
        0,
        0,
    )


@pytest.mark.parametrize(("dim", "dim_v", "columns"), [(8, 8, 64), (64, 72, 128), (192, 128, 256), (256, 8, 256)])
def test_columns_hold_both_dims(dim, dim_v, columns):
    q, v = torch.empty(1, 5, 1, dim), torch.empty(1, 5, 1, dim_v)
    terms = Call(mask=Full(), softmax_scale=1.0, max_seqlen_q=5, max_seqlen_k=5)
    assert launch.Sizes.of(q, q, v, terms).columns == columns


@pytest.mark.parametrize("line", [table.D64, table.D64_TALL, table.D128, table.D256], ids=str)
def test_registers_fit_the_file(line):
    """65,536 of them; the warpgroup of the producer has those of all its four warps."""
    assert 128 * (line.consumers * line.consumer_registers + line.producer_registers) <= 65536
    assert line.consumer_registers % 8 == line.producer_registers % 8 == 0
    assert 2 * line.stages <= 8  # named barriers


def test_a_descriptor_takes_any_stride_of_a_dimension_of_one():
    q = torch.empty(7, 3, 2, 64, dtype=torch.bfloat16)[:1]
    odd = q.as_strided(q.shape, (5, *q.stride()[1:]))
    made = launch.describe(odd, 64, 64)
    assert made.shape == [1, 2, 3, 64] and made.strides == [64, 64, 128, 1] and made.block_shape == [1, 1, 64, 64]


def aligned(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (aligned(2, 5, 3, 64), None),
        (aligned(1 + 2 * 5 * 3 * 64)[1:].view(2, 5, 3, 64), "start at a multiple of 16 bytes"),
        (aligned(2, 5, 3, 128)[..., ::2], "last stride of 1"),
        (aligned(2, 5, 3, 65)[..., :64], "strides of a positive multiple of 16 bytes"),
        (aligned(2, 5, 1, 64).expand(2, 5, 3, 64), "strides of a positive multiple of 16 bytes"),
        (aligned(1, 5, 3, 64).expand(1, 5, 3, 64), None),
    ],
)
def test_what_tma_cannot_address_is_named(tensor, reason):
    said = envelope.untouchable("k", tensor)
    assert said is None if reason is None else reason in said and "k" in said


def test_versions_of_triton_are_gated(monkeypatch):
    end = ".".join(map(str, envelope.END_VERSION))
    for version, is_served in (("3.5.1", False), ("3.6.0", True), ("3.7.1+git", True), (f"{end}.0", False)):
        monkeypatch.setattr(envelope.triton, "__version__", version)
        assert (envelope.version_refusal() is None) is is_served


def test_lists_say_which_keys_of_a_map_any_row_sees():
    from hasten.masks import Dense
    from hasten.ops.tiles import tile_lists

    matrix = torch.rand(200, 300, generator=torch.Generator().manual_seed(0)) < 0.01
    lists = tile_lists(Dense(matrix), 1, 1, 200, 300, 192, 128, torch.device("cpu"))
    bits = (lists.bits[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    seen = (lists.keys_seen[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    assert torch.equal(seen, bits.amax(1)) and 0 < seen.float().mean() < 1
