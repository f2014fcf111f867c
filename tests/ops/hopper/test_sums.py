"""What pieces of long lines leave, made by plain PyTorch, against the whole: in the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from hasten.masks import Global, Mask, Window
from hasten.ops.call import Call
from hasten.ops.hopper import backward_launch, launch
from hasten.ops.hopper.table import Tile
from hasten.ops.tiles import Pieces, TileLists, tile_lists
from hasten.ops.tiles import pieces as cutting

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreter, id="cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="cuda"),
]
LINE = Tile(1, 64, 2, 2)  # 64 rows by 64 keys


def ranges(begin: int, middle: int, end: int, share: int) -> list[int]:
    """Entries of a line that a piece has."""
    part, parts = share >> 6 & 63, max(1, share & 63)
    full, partial = middle - begin, end - middle
    return [
        *range(begin + full * part // parts, begin + full * (part + 1) // parts),
        *range(middle + partial * part // parts, middle + partial * (part + 1) // parts),
    ]


def tiles_of(lists: TileLists, pieces: Pieces) -> Tensor:
    """bool (items, num_rows, num_cols): the tiles that each item visits."""
    found = torch.zeros(len(pieces.items), lists.num_rows, lists.num_cols, dtype=torch.bool)
    for item, (line, share) in enumerate(pieces.items.tolist()):
        found[item, line, lists.row_index[ranges(*lists.row_ptr[line].tolist(), share)].long().cpu()] = True
    return found


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64 of (batch, heads, rows, dim) and the cells that are kept."""
    scores = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp() @ v.double(), lse


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [64, 40])
def test_pieces_make_the_whole(dim: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tiles 0 and 10 of 11 are cut, the last one overhangs; most of their rows see nothing in most pieces."""
    monkeypatch.setattr(cutting, "_FEWEST", 5)
    batch, heads, seqlen = 2, 2, 700
    mask: Mask = Window(5, 5) | Global((2, 690))
    lists = tile_lists(mask, batch, heads, seqlen, seqlen, LINE.block_m, LINE.block_n, torch.device(device))
    pieces = lists.row_pieces(batch * heads, 100)
    assert pieces is not None and len(pieces.cut) == 2
    tiles = tiles_of(lists, pieces)
    assert torch.equal(tiles.sum(0) > 0, tiles.sum(0) == 1) and tiles.sum() == len(lists.row_index)
    q, k, v = (torch.randn(batch, heads, seqlen, dim, device=device) for _ in range(3))
    keep = mask.keep(seqlen, seqlen, batch=1, num_heads=1, device=q.device)
    want, want_lse = attention(q, k, v, keep)

    left = torch.full((batch * heads, pieces.num_slots, 64 * 65), torch.nan, device=device)
    parts, parts_lse = left[..., : 64 * 64].unflatten(-1, (64, 64)), left[..., 64 * 64 :]
    out, lse = want.float().transpose(1, 2).contiguous(), want_lse.float().contiguous()
    for (line, share), own in zip(pieces.items.tolist(), tiles, strict=True):
        if share:
            own = own.repeat_interleave(64, 0).repeat_interleave(64, 1)[:seqlen, :seqlen].to(device)
            rows = slice(line * 64, min(seqlen, line * 64 + 64))
            piece = attention(q, k, v, keep & own)
            length = rows.stop - rows.start
            parts[:, share >> 12, :length, :dim] = piece[0][:, :, rows].flatten(0, 1).float()
            parts_lse[:, share >> 12, :length] = piece[1][:, :, rows].flatten(0, 1).float()
            out[:, rows], lse[:, :, rows] = torch.nan, torch.nan
    call = Call(mask=mask, softmax_scale=1.0, max_seqlen_q=seqlen, max_seqlen_k=seqlen)
    sizes = launch.Sizes.of(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), call)
    launch.plan_merge(sizes, LINE, len(pieces.cut), pieces.num_slots)(pieces.cut, left, out, lse)
    torch.testing.assert_close(out, want.float().transpose(1, 2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_pieces_are_added(device: str) -> None:
    """Two columns of tiles, the second of which overhangs; the others and their slots are left alone."""
    batch, seqlen, heads, dim, dim_v = 2, 200, 2, 64, 40
    q, k, v = (torch.zeros(batch, seqlen, heads, size, device=device) for size in (dim, dim, dim_v))
    call = Call(mask=Window(1, 1) | Global((0,)), softmax_scale=1.0, max_seqlen_q=seqlen, max_seqlen_k=seqlen)
    lse = torch.zeros(batch, heads, seqlen, device=device)
    sizes = backward_launch.Sizes.of(q, k, v, (v, v, lse, None), call)
    assert sizes.tile.block_n == 128
    cut = torch.tensor([[0, 1, 3], [1, 4, 2]], dtype=torch.int32, device=device)
    parts = [torch.randn(batch * heads, 6, 128, 64, device=device) for _ in range(2)]
    dk, dv = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    backward_launch.plan_add(sizes, 2, 6)(cut, *parts, dk, dv)
    for got, part in zip((dk, dv), parts, strict=True):
        both = torch.cat([part[:, 1:4].sum(1), part[:, 4:6].sum(1)], 1)[:, :seqlen, : got.shape[-1]]
        torch.testing.assert_close(got, both.unflatten(0, (batch, heads)).transpose(1, 2))
