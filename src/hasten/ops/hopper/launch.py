"""Host side of the Hopper forward: outputs, and the launch of a call, worked out once for each that differs."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hasten.ops.call import Call
from hasten.ops.hopper.bridge import OPTIONS
from hasten.ops.hopper.forward import attention_forward
from hasten.ops.hopper.sums import merge_pieces
from hasten.ops.hopper.table import Tile, forward_tile, kind_of
from hasten.ops.launching import TENSOR, Described, Launch
from hasten.ops.tiles import as_band, tile_lists

# keys and values that one group of heads may hold in the L2 cache (50 MB) beside what else passes through it
_L2_BYTES = 32 * 2**20
_TURNS_OF_LAST_GROUP = 4
_STAGED_COLUMNS = 128  # of out, on its way through shared memory: what there is room for
_MERGED_ROWS = 16  # of a program that merges pieces
_MOST_PLANS = 256


class Sizes(NamedTuple):
    """Sizes and strides of one call, the same names in dense and packed layout. Holds no tensor.

    `band` is (left, right), None for a mask that is no band; that one `varies` by batch and by head or not.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    total_q: int
    total_k: int
    max_seqlen_q: int
    max_seqlen_k: int
    strides: tuple[tuple[int, ...], ...]
    is_packed: bool
    softmax_scale: float
    softcap: float | None
    band: tuple[int | None, int | None] | None
    varies: tuple[bool, bool]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Sizes:
        """Read them off the tensors and the call."""
        shape, mask = q.shape, call.mask
        band = as_band(mask)
        cu_seqlens = call.cu_seqlens_q
        return cls(
            shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
            shape[-2],
            k.shape[-2],
            shape[-1],
            v.shape[-1],
            shape[-3],
            k.shape[-3],
            call.max_seqlen_q,
            call.max_seqlen_k,
            (q.stride(), k.stride(), v.stride()),
            cu_seqlens is not None,
            call.softmax_scale,
            call.softcap or None,
            None if band is None else (band.left, band.right),
            (False, False) if band is not None else (mask.varies_by_batch, mask.varies_by_head),
        )

    @property
    def columns(self) -> int:
        """The tile that holds a row of q, k and v: TMA fills the columns past head_dim with zeros."""
        return max(64, 1 << (max(self.head_dim, self.head_dim_v) - 1).bit_length())

    def num_items(self, line: Tile) -> int:
        """Tiles of rows of all heads; of packed sequences, whose tiles the device counts, an upper bound."""
        per_sequence = -(-self.max_seqlen_q // line.block_m)
        tiles = self.batch * per_sequence
        return self.num_heads * (min(tiles, self.total_q // line.block_m + self.batch) if self.is_packed else tiles)

    def groups(self, line: Tile, num_programs: int) -> tuple[int, int]:
        """(heads of a group, how many such groups before one of all the other heads): their items run together.

        A group is as small as fills the GPU: then HBM is read at an even pace, and not K and V of 64 heads in the
        first of many turns (at 1k: 499 -> 596 TFLOP/s). Where items differ in length, the last group is large
        enough to fill the GPU several times, so that its short items even out the end (4k causal: 597 -> 623).
        """
        tiles, group_size = -(-self.max_seqlen_q // line.block_m), self.num_heads // self.num_kv_heads
        fitting = max(1, _L2_BYTES // (self.max_seqlen_k * 4 * self.columns))

        def heads(times: int) -> int:
            return max(1, min(fitting, -(-times * num_programs // (tiles * group_size)))) * group_size

        small, all_heads = heads(1), self.num_heads * self.batch
        last = 0 if self.band == (None, None) else heads(_TURNS_OF_LAST_GROUP)
        return small, max(0, all_heads - last) // small

    def list_strides(self, line: Tile) -> tuple[int, int]:
        """Rows of tiles in a list from one sequence to the next and from one head to the next; 0 where they share."""
        rows = -(-self.max_seqlen_q // line.block_m)
        by_batch, by_head = self.varies
        batch_stride = rows * (self.num_heads if by_head else 1) if by_batch and self.batch > 1 else 0
        return batch_stride, rows if by_head and self.num_heads > 1 else 0


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """CTAs of a persistent kernel: one for each."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def describe(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor (batch, heads, rows, head_dim) of a dense or packed tensor, for boxes of (rows, columns)."""
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(0)
    batch, seqlen, heads, head_dim = tensor.shape
    # the stride of a dimension of size 1 may be any number, and TMA still looks at it
    strides = [stride if size > 1 else head_dim for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return TensorDescriptor(
        tensor,
        [batch, heads, seqlen, head_dim],
        [strides[0], strides[2], strides[1], 1],
        [1, 1, rows, columns],
        gl.NVMMASharedLayout(128, 16, 4),
    )


@lru_cache(maxsize=_MOST_PLANS)
def plan(sizes: Sizes, line: Tile, num_programs: int, pieces: tuple[int, int] | None = None) -> Launch:
    """Launch of q, k, v, out, out if packed, lse, sinks, counter, cu_seqlens_q, cu_seqlens_k, key_range, lists, pieces.

    pieces: (items of a head, slots) where long rows of tiles are cut.
    """
    columns = sizes.columns
    rows, keys = (Described(partial(describe, rows=size, columns=columns)) for size in (64, line.block_n))
    outs = Described(partial(describe, rows=64, columns=min(columns, _STAGED_COLUMNS)))
    lists = None if sizes.band is not None else (TENSOR,) * 6
    num_tiles, num_slots = pieces or (-(-sizes.max_seqlen_q // line.block_m), 0)
    arguments = (
        rows, keys, keys, outs, TENSOR, TENSOR, TENSOR, TENSOR,
        TENSOR, TENSOR, TENSOR, lists, (TENSOR,) * 2 if pieces else None, sizes.softmax_scale, sizes.softcap,
        *(sizes.band or (None, None)), *sizes.list_strides(line),
        num_tiles, sizes.num_heads, sizes.batch, sizes.max_seqlen_q, sizes.max_seqlen_k,
        sizes.total_q, *sizes.groups(line, num_programs), sizes.num_heads // sizes.num_kv_heads,
        sizes.head_dim_v, num_slots,
    )  # fmt: skip
    options = {
        "BLOCK_D": columns,
        "BLOCK_N": line.block_n,
        "CONSUMERS": line.consumers,
        "STAGES": line.stages,
        "Q_STAGES": line.q_stages,
        "CONSUMER_REGISTERS": line.consumer_registers,
        "PRODUCER_REGISTERS": line.producer_registers,
        "num_warps": 4,
        **OPTIONS,
    }
    num_items = sizes.num_heads * sizes.batch * num_tiles if pieces else sizes.num_items(line)
    return Launch(attention_forward, (max(1, min(num_items, num_programs)),), arguments, options)


@lru_cache(maxsize=_MOST_PLANS)
def plan_merge(sizes: Sizes, line: Tile, num_cut: int, num_slots: int) -> Launch:
    """Launch of cut, what the pieces leave, out, lse."""
    options = {"HEAD_DIM_V": sizes.head_dim_v, "BLOCK_D": sizes.columns, "BLOCK_M": line.block_m, "ROWS": _MERGED_ROWS}
    grid = (num_cut * line.block_m // _MERGED_ROWS, sizes.batch * sizes.num_heads)
    arguments = (*(TENSOR,) * 4, sizes.num_heads, sizes.max_seqlen_q, num_slots)
    return Launch(merge_pieces, grid, arguments, {**options, "num_warps": 4})


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), as `call.py` says."""
    device = q.device
    sizes = Sizes.of(q, k, v, call)
    line = forward_tile(sizes.columns, kind_of(sizes.band), sizes.max_seqlen_q)
    out = q.new_empty((*q.shape[:-1], sizes.head_dim_v))
    shape = (sizes.num_heads, sizes.total_q) if sizes.is_packed else (sizes.batch, sizes.num_heads, sizes.total_q)
    lse = torch.empty(shape, dtype=torch.float32, device=device)
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    tensors = (
        q, k, v, out, out if sizes.is_packed else None, lse, call.sinks, counter, call.cu_seqlens_q, call.cu_seqlens_k,
    )  # fmt: skip
    band, num_programs = as_band(call.mask), num_multiprocessors(device)
    if band is not None:
        key_range = None if band.padding is None else band.padding.key_range(call.max_seqlen_k, device)
        plan(sizes, line, num_programs)(*tensors, key_range)
        return out, lse
    lengths = (call.max_seqlen_q, call.max_seqlen_k, line.block_m, line.block_n)
    found = tile_lists(call.mask, sizes.batch, sizes.num_heads, *lengths, device)
    lists = (found.row_ptr, found.row_index, found.row_bits, found.bits, found.keys_seen, found.row_order)
    pairs = sizes.batch * sizes.num_heads
    pieces = found.row_pieces(pairs, num_programs)
    if pieces is None:
        plan(sizes, line, num_programs)(*tensors, None, *lists)
        return out, lse
    left = (pairs, pieces.num_slots, line.block_m * (sizes.columns + 1))
    parts = torch.empty(left, dtype=torch.float32, device=device)
    launch = plan(sizes, line, num_programs, (len(pieces.items), pieces.num_slots))
    launch(*tensors, None, *lists, pieces.items, parts)
    plan_merge(sizes, line, len(pieces.cut), pieces.num_slots)(pieces.cut, parts, out, lse)
    return out, lse
