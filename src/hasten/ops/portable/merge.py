"""Merging attention over disjoint keys in one pass over the parts, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.portable.visits import load_inside

BLOCK_M = 32


@triton.jit
def _place(ROWS: tl.constexpr, BLOCK_DV: tl.constexpr, head_dim, seqlen, num_heads, num_rows):
    """(rows in range, offsets of their elements, offsets of their statistics, dimensions in range).

    Rows count (batch, query, head), as out lies; a statistic of a row lies at (batch, head, query).
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    dims = tl.arange(0, BLOCK_DV)
    head, query, batch = rows % num_heads, (rows // num_heads) % seqlen, rows // num_heads // seqlen
    statistics = (batch * num_heads + head) * seqlen + query
    return rows < num_rows, rows[:, None] * head_dim + dims[None, :], statistics, dims[None, :] < head_dim


@triton.jit
def _weight(lse_ptr, at, in_rows, lse):
    """exp(own lse - merged lse), 0 where the part saw nothing."""
    own = tl.load(lse_ptr + at, mask=in_rows, other=-float("inf"))
    return tl.exp(own - tl.where(lse == -float("inf"), 0.0, lse))


@triton.jit
def merge_forward(
    outs, lses, out_ptr, lse_ptr, head_dim, seqlen, num_heads, num_rows, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """out and lse of the union of PARTS parts; all contiguous."""
    in_rows, at, statistics, in_dims = _place(ROWS, BLOCK_DV, head_dim, seqlen, num_heads, num_rows)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    for part in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(lses[part] + statistics, mask=in_rows, other=-float("inf")))
    safe = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([ROWS], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.exp(tl.load(lses[part] + statistics, mask=in_rows, other=-float("inf")) - safe)
    lse = tl.where(total == 0.0, -float("inf"), safe + tl.log(tl.where(total == 0.0, 1.0, total)))
    out = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for part in tl.static_range(PARTS):
        own = load_inside(outs[part] + at, in_rows, in_dims, False).to(tl.float32)
        weight = _weight(lses[part], statistics, in_rows, lse)[:, None]
        out += tl.where(weight == 0.0, 0.0, weight * own)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_dims)
    tl.store(lse_ptr + statistics, lse, mask=in_rows)


@triton.jit
def merge_backward(
    dout_ptr, dlse_ptr, out_ptr, lse_ptr, part_out, part_lse, dpart_out, dpart_lse,
    head_dim, seqlen, num_heads, num_rows, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Gradients of one part: dout_i = w_i dout, dlse_i = w_i (dout . (out_i - out) + dlse), w_i = exp(lse_i - lse)."""
    in_rows, at, statistics, in_dims = _place(ROWS, BLOCK_DV, head_dim, seqlen, num_heads, num_rows)
    dout = load_inside(dout_ptr + at, in_rows, in_dims, False).to(tl.float32)
    out = load_inside(out_ptr + at, in_rows, in_dims, False).to(tl.float32)
    own = load_inside(part_out + at, in_rows, in_dims, False).to(tl.float32)
    weight = _weight(part_lse, statistics, in_rows, tl.load(lse_ptr + statistics, mask=in_rows, other=0.0))
    dlse = tl.load(dlse_ptr + statistics, mask=in_rows, other=0.0) + tl.sum(dout * (own - out), 1)
    tl.store(dpart_out + at, (dout * weight[:, None]).to(dpart_out.dtype.element_ty), mask=in_rows[:, None] & in_dims)
    tl.store(dpart_lse + statistics, tl.where(weight == 0.0, 0.0, weight * dlse), mask=in_rows)


def _sizes(out: Tensor) -> tuple[int, int, int, int]:
    """(head_dim, seqlen, num_heads, rows) of a dense or packed output."""
    return out.shape[-1], out.shape[-3], out.shape[-2], out.numel() // max(1, out.shape[-1])


def _tile(out: Tensor) -> dict[str, int]:
    return {"ROWS": BLOCK_M, "BLOCK_DV": triton.next_power_of_2(out.shape[-1])}


def forward(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of the union of the parts, laid out as they are."""
    outs, lses = [out.contiguous() for out in outs], [lse.contiguous() for lse in lses]
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    sizes = _sizes(out)
    grid = (triton.cdiv(sizes[3], BLOCK_M),)
    merge_forward[grid](tuple(outs), tuple(lses), out, lse, *sizes, PARTS=len(outs), **_tile(out))
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of every part's out and lse."""
    douts, dlses = [torch.empty_like(out) for _ in outs], [torch.empty_like(lse) for _ in lses]
    sizes = _sizes(out)
    grid = (triton.cdiv(sizes[3], BLOCK_M),)
    dout, dlse = dout.contiguous(), dlse.contiguous()
    for part, (own, own_lse) in enumerate(zip(outs, lses, strict=True)):
        merge_backward[grid](
            dout, dlse, out, lse, own.contiguous(), own_lse.contiguous(), douts[part], dlses[part], *sizes, **_tile(out)
        )
    return douts, dlses
