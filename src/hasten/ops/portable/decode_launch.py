"""Host side of the decode kernels: which parts, which tile, buffers for the parts, grids. All was checked above.

Nothing here depends on the values of lengths or tables, so a captured call can be replayed with others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hasten.ops.decode_call import DecodeCall
from hasten.ops.kv import KV, PagedKV, RingKV
from hasten.ops.portable.decode import decode_part
from hasten.ops.portable.decode_merge import decode_merge
from hasten.ops.portable.launch import limits
from hasten.ops.portable.table import Limits

#: keys of a unit, units of a group, groups that are merged at once: the tree that defines the bits of an answer
UNIT, GROUP, CHUNK = 256, 8, 16
#: dimensions of a row that are merged at once
DIMS = 32
#: queries of a sequence above which keys are not split: a chunk of a prompt has rows enough
MOST_SPLIT = 16
MOST_ROWS = 64


@dataclass(frozen=True)
class Tile:
    """BLOCK_N keys, warps of a program, stages of the software pipeline."""

    block_n: int
    num_warps: int
    num_stages: int


# (bytes of a stored number, largest padded head_dim) -> tile. Not measured yet: chosen so that two or three programs of
# a Hopper SM hold 100 KB of keys in flight, without spills. Twice the warps from 32 rows on.
TABLE: dict[tuple[int, int], Tile] = {
    (1, 64): Tile(64, 4, 4),
    (1, 128): Tile(64, 4, 4),
    (1, 256): Tile(32, 4, 3),
    (2, 64): Tile(64, 4, 4),
    (2, 128): Tile(64, 4, 3),
    (2, 256): Tile(32, 4, 3),
    (4, 64): Tile(16, 4, 3),
    (4, 128): Tile(16, 8, 2),
    (4, 256): Tile(16, 8, 2),
}


@dataclass(frozen=True)
class Plan:
    """How one call is run. units: keys of a part in units, 1 or GROUP, 0 for all keys in one part."""

    units: int
    block_m: int
    tile: Tile
    prefix_units: int = 0
    prefix_tile: Tile | None = None


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call, the same names in dense and packed layout."""

    batch: int
    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int

    @classmethod
    def of(cls, q: Tensor, keys: KV) -> Sizes:
        """Read them off the tensors."""
        tokens = q.shape[0] if q.ndim == 3 else q.shape[0] * q.shape[1]
        num_kv_heads, head_dim_v = keys.values.shape[2:]
        return cls(keys.batch, tokens, q.shape[-2], num_kv_heads, q.shape[-1], head_dim_v)

    @property
    def group_size(self) -> int:
        """Query heads of one K/V head."""
        return self.num_heads // self.num_kv_heads


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


@lru_cache
def _num_programs(device: torch.device) -> int:
    """Programs that fill the GPU: fewer than that, and keys are split finer. Decides speed, never bits."""
    if device.type != "cuda":
        return 8
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def tile_for(
    element_size: int, block_d: int, block_m: int, is_split: bool, gpu: Limits | None, is_halved: bool = False
) -> Tile:
    """The line of the table for a padded head_dim and rows, made to fit the shared memory of the GPU.

    Not `is_split`: chunks of prompts and shared prefixes, which keep one state and not two. `is_halved`: probabilities
    are two numbers, as under float16 queries over 8 bits.
    """
    line = TABLE[min(key for key in TABLE if key[0] == element_size and key[1] >= block_d)]
    generation = "ampere" if gpu is None else gpu.generation
    has_room = generation != "ampere" and block_d <= 128  # registers of four warps
    if element_size == 1 and (block_m >= 64 or is_halved):  # numbers of 8 bits are widened in registers
        line = replace(line, block_n=32)
    is_medium = is_split and block_m == 32
    if is_medium and (element_size, block_d) == (2, 128):  # fewer registers than with eight warps: three programs an SM
        line = replace(line, block_n=32, num_stages=5)
    elif block_m >= 32 and (is_split or not has_room):
        line = replace(line, num_warps=8)
    while gpu is not None and line.num_stages > 1:
        need = (block_m * 4 + 2 * line.block_n * element_size * line.num_stages) * block_d + 4096
        if need <= gpu.shared_bytes:
            break
        line = replace(line, num_stages=line.num_stages - 1)
    return line


def plan_for(q: Tensor, keys: KV, call: DecodeCall) -> Plan:
    """The plan of a call, from shapes and the device alone."""
    sizes = Sizes.of(q, keys)
    rows = sizes.group_size * call.max_seqlen_q
    block_d = max(_padded(sizes.head_dim), _padded(sizes.head_dim_v))
    is_split = call.max_seqlen_q <= MOST_SPLIT
    is_wide = block_d > 128 or q.element_size() > 2
    block_m = min(MOST_ROWS // 2 if is_split and is_wide else MOST_ROWS, _padded(rows))  # two states, no spills
    stored = keys.keys.element_size()
    is_halved = stored == 1 and q.dtype == torch.float16
    line = tile_for(stored, block_d, block_m, is_split, limits(q.device), is_halved)
    if not is_split:
        return Plan(0, block_m, line)
    tiles = -(-rows // block_m) * sizes.num_kv_heads
    num_groups = _num_parts(keys, call, GROUP)
    enough = _num_programs(q.device) // (4 if num_groups == 1 and not call.shared_prefix else 1)  # nothing to merge
    is_full = sizes.batch * tiles * num_groups >= enough
    prefix_units, prefix_tile = 0, None
    if call.shared_prefix:
        prefix_rows = min(MOST_ROWS, _padded(rows * sizes.batch))
        prefix_tile = tile_for(stored, block_d, prefix_rows, False, limits(q.device), is_halved)
        shared_tiles = -(-rows * sizes.batch // MOST_ROWS) * sizes.num_kv_heads
        is_full_prefix = shared_tiles * -(-call.shared_prefix // (UNIT * GROUP)) >= _num_programs(q.device) // 2
        prefix_units = GROUP if is_full_prefix else 1
    return Plan(GROUP if is_full else 1, block_m, line, prefix_units, prefix_tile)


def _num_parts(keys: KV, call: DecodeCall, units: int) -> int:
    """The most parts that a sequence can have behind a shared prefix."""
    if units == 0:
        return 1
    step = UNIT * units
    bounds = [] if isinstance(keys, RingKV) else [-(-keys.capacity // step) - call.shared_prefix // step]
    if call.left is not None:
        bounds.append((call.left + call.max_seqlen_q + step - 2) // step + 1)
    return max(min(bounds), 1)


def forward(q: Tensor, keys: KV, call: DecodeCall, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) in the layouts of `decode.decode_attention`."""
    sizes = Sizes.of(q, keys)
    plan = plan_for(q, keys, call) if plan is None else plan
    call = call if plan.prefix_units else replace(call, shared_prefix=0)
    out = q.new_empty((*q.shape[:-1], sizes.head_dim_v))
    shape = (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(shape, dtype=torch.float32)
    assert UNIT % plan.tile.block_n == 0, "a tile of keys lies in one unit"
    num_parts = _num_parts(keys, call, plan.units)
    num_shared = -(-call.shared_prefix // (UNIT * plan.prefix_units)) if plan.prefix_units else 0
    if num_parts + num_shared == 1:
        _parts(q, keys, call, plan, (out, lse), (None, None, None), (1, 1, 0))
        return out, lse
    total = num_parts + num_shared
    acc = q.new_empty((sizes.tokens, sizes.num_heads, total, sizes.head_dim_v), dtype=torch.float32)
    statistics = q.new_empty((2, sizes.tokens, sizes.num_heads, total), dtype=torch.float32)
    parts = (acc, statistics[0], statistics[1])
    if num_shared:
        _parts(q, keys, call, plan, (None, lse), parts, (num_shared, total, 0), is_shared=True)
    _parts(q, keys, call, plan, (None, lse), parts, (num_parts, total, num_shared))
    _merge(q, keys, call, plan, (out, lse), parts, (total, num_shared))
    return out, lse


def _merge(
    q: Tensor,
    keys: KV,
    call: DecodeCall,
    plan: Plan,
    results: tuple[Tensor, Tensor],
    parts: tuple[Tensor, Tensor, Tensor],
    place: tuple[int, int],
) -> None:
    """Launch `decode_merge`; place: (parts in the buffers, those of a shared prefix)."""
    sizes = Sizes.of(q, keys)
    out, lse = results
    rows = keys.batch * call.max_seqlen_q * sizes.num_heads
    pieces = -(-sizes.head_dim_v // DIMS)
    runs = pieces if rows >= _num_programs(q.device) else 1
    overlaps = _overlaps(q.device)
    decode_merge[(rows * -(-pieces // runs),)](
        *parts, out, lse, keys.cache_seqlens, call.sinks, call.cu_seqlens_q, call.left, _row_strides(lse),
        sizes.num_heads, *place, call.max_seqlen_q, keys.capacity, call.shared_prefix,
        HEAD_DIM_V=sizes.head_dim_v, DIMS=DIMS, RUNS=runs, UNIT=UNIT, UNITS=plan.units,
        PREFIX_UNITS=plan.prefix_units, CHUNK=CHUNK, RING=isinstance(keys, RingKV), OVERLAP=overlaps,
        num_warps=4, **({"launch_pdl": True} if overlaps else {}),
    )  # fmt: skip


def _overlaps(device: torch.device) -> bool:
    """True where a kernel can be launched before the one it waits for has ended: NVIDIA from Hopper on."""
    gpu = limits(device)
    return gpu is not None and gpu.capability >= 90


def _parts(
    q: Tensor,
    keys: KV,
    call: DecodeCall,
    plan: Plan,
    results: tuple[Tensor | None, Tensor],
    parts: tuple[Tensor | None, Tensor | None, Tensor | None],
    place: tuple[int, int, int],
    is_shared: bool = False,
) -> None:
    """Launch `decode_part`; place: (parts to compute, parts in the buffers, first of them)."""
    sizes = Sizes.of(q, keys)
    out, lse = results
    rows = sizes.group_size * call.max_seqlen_q * (sizes.batch if is_shared else 1)
    block_m = min(MOST_ROWS, _padded(rows)) if is_shared else plan.block_m
    block = plan.prefix_tile if is_shared and plan.prefix_tile is not None else plan.tile
    num_tiles = -(-rows // block_m)
    grid = (num_tiles * sizes.num_kv_heads * place[0] * (1 if is_shared else sizes.batch),)
    table = keys.block_table
    decode_part[grid](
        q, keys.keys, keys.values, out, lse, *parts,
        table, keys.cache_seqlens, keys.key_scales, keys.value_scales, call.sinks, call.slopes, call.cu_seqlens_q,
        (call.softmax_scale, call.softcap or None), (call.left, call.right),
        _strides(q), keys.keys.stride()[:3], keys.values.stride()[:3], _scale_strides(keys.key_scales),
        _scale_strides(keys.value_scales), _row_strides(lse), 0 if table is None else table.stride(0),
        0 if call.slopes is None or call.slopes.shape[0] == 1 else call.slopes.shape[1],
        sizes.batch, num_tiles, sizes.num_kv_heads, *place, call.max_seqlen_q, keys.capacity, call.shared_prefix,
        GROUP_SIZE=sizes.group_size, HEAD_DIM=sizes.head_dim, HEAD_DIM_V=sizes.head_dim_v,
        BLOCK_D=_padded(sizes.head_dim), BLOCK_DV=_padded(sizes.head_dim_v), BLOCK_M=block_m,
        BLOCK_N=block.block_n, UNIT=UNIT, UNITS=plan.prefix_units if is_shared else plan.units,
        PAGE_SIZE=keys.page_size if isinstance(keys, PagedKV) else 0, RING=isinstance(keys, RingKV),
        SHARED=is_shared, DIRECT=out is not None, PRECISION="ieee",
        ALIKE=keys.keys.stride()[:3] == keys.values.stride()[:3],
        OVERLAP=out is None and not is_shared and _overlaps(q.device),
        num_warps=block.num_warps, num_stages=_stages(block, keys),
    )  # fmt: skip


def _stages(tile: Tile, keys: KV) -> int:
    """Stages of the pipeline: entries of a block table are fetched ahead too, and each level of loads takes its own."""
    return tile.num_stages if keys.block_table is None else 2 * tile.num_stages - 1


def _strides(q: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides of q; packed rows have no batch."""
    return (0, q.stride(0), q.stride(1)) if q.ndim == 3 else (q.stride(0), q.stride(1), q.stride(2))


def _row_strides(lse: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides of lse."""
    return (0, lse.stride(1), lse.stride(0)) if lse.ndim == 2 else (lse.stride(0), lse.stride(2), lse.stride(1))


def _scale_strides(scales: Tensor | None) -> Any:
    return None if scales is None else scales.stride()


def refuses(q: Tensor, keys: KV, call: DecodeCall) -> str | None:
    """Why the call is outside the envelope, or None."""
    if q.dtype == torch.float64:
        return "float64 is not offered (use reference or blockwise)"
    if max(q.shape[-1], keys.values.shape[-1]) > 256:
        return f"head_dim up to 256, got {max(q.shape[-1], keys.values.shape[-1])}"
    gpu = limits(q.device)
    if keys.keys.dtype == torch.float8_e4m3fn and gpu is not None and gpu.capability < 89:
        return "float8_e4m3fn needs compute capability 8.9"
    return None
