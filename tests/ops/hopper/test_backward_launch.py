"""What the host works out for the Hopper backward: the order of the items, and the gradient of sinks."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import hasten
from hasten.masks import Causal, Full, Global, Mask, Window
from hasten.ops.call import Call
from hasten.ops.hopper.backward_launch import Sizes, Workspace, _dsinks, loadable
from hasten.ops.hopper.envelope import untouchable
from tests.ops.cases import laid_out

MASKS = {"full": Full(), "causal": Causal(), "lists": Window(5, 5) | Global((0,))}


def sizes_of(batch: int, seqlen: int, heads: int, kv_heads: int, head_dim: int, call: Call) -> Sizes:
    """Sizes of contiguous tensors that need no memory."""
    q, k = (torch.empty(batch, seqlen, n, head_dim, device="meta", dtype=torch.bfloat16) for n in (heads, kv_heads))
    return Sizes.of(q, k, k, (q, q, torch.empty(batch, heads, seqlen, device="meta"), None), call)


@pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "deterministic"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 64), (3, 500, 8, 2, 128), (5, 4096, 16, 16, 256), (2, 16384, 2, 1, 64)], ids=str
)
def test_every_tile_is_one_item_and_those_of_a_pair_ascend(
    shape: tuple[int, ...], mask: str, deterministic: bool
) -> None:
    """As `backward_schedule.find` counts them. A deterministic call relies on the second."""
    batch, seqlen, _, kv_heads, _ = shape
    call = Call(
        mask=MASKS[mask], softmax_scale=1.0, max_seqlen_q=seqlen, max_seqlen_k=seqlen, deterministic=deterministic
    )
    sizes = sizes_of(*shape, call)
    of_group, num_groups = sizes.groups(132)
    num_tiles, num_pairs = sizes.num_tiles[1], kv_heads * batch
    last: dict[int, int] = {}
    for item in range(num_tiles * num_pairs):
        group = min(item // (of_group * num_tiles), num_groups)
        first = group * of_group
        pairs = of_group if group < num_groups else num_pairs - first
        inside = item - first * num_tiles
        tile, pair = inside // pairs, first + inside % pairs
        assert tile == last.get(pair, -1) + 1
        last[pair] = tile
    assert last == dict.fromkeys(range(num_pairs), num_tiles - 1)


@pytest.mark.parametrize("layout", ["contiguous", "heads_first", "misaligned", "ones", "every_second", "sliced_dim"])
def test_an_output_gradient_that_tma_cannot_read_is_copied(layout: str) -> None:
    values = torch.randn(2, 9, 3, 16).bfloat16()
    dout = laid_out(values, layout)
    read = loadable(dout)
    assert untouchable("dout", read) is None and torch.equal(read, dout)
    assert (read is dout) is (layout in ("contiguous", "heads_first"))


def test_dsinks_from_the_row_statistics() -> None:
    batch, seqlen, heads, dim = 2, 150, 3, 64
    q, k, v, dout = (torch.randn(batch, seqlen, heads, dim, dtype=torch.float64) for _ in range(4))
    sinks = torch.randn(heads, requires_grad=True)
    out, lse = hasten.attention(
        q, k, v.requires_grad_(), Causal(), sinks=sinks, return_lse=True, implementation="reference"
    )
    dlse = torch.randn_like(lse)
    (want,) = torch.autograd.grad([out, lse], sinks, [dout, dlse])

    mask: Mask = Causal()
    call = Call(mask=mask, softmax_scale=dim**-0.5, max_seqlen_q=seqlen, max_seqlen_k=seqlen, sinks=sinks.detach())
    sizes = sizes_of(batch, seqlen, heads, heads, dim, call)
    space = Workspace.make(sizes, torch.device("cpu"), is_read=True)
    num_tiles, block_m = sizes.num_tiles[0], sizes.tile.block_m
    beyond = num_tiles * block_m - seqlen
    delta = (dout * out).sum(-1).transpose(1, 2) - dlse  # (batch, heads, rows)
    rows = [
        torch.nn.functional.pad(lse * math.log2(math.e), (0, beyond), value=math.inf),
        torch.nn.functional.pad(delta, (0, beyond)),
    ]
    blocks = [t.detach().unflatten(2, (num_tiles, block_m)).transpose(0, 1).flatten(1, 2) for t in rows]
    space.stats.copy_(torch.stack(blocks, 2).reshape(space.stats.shape))
    torch.testing.assert_close(_dsinks(space, sizes, call), want, rtol=1e-5, atol=1e-5)
