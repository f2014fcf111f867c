"""What each portable kernel is told besides addresses: worked out once for each call that differs, and kept.

`launch.py` asks with what a call depends on (`Sizes`, the line of the table, the GPU, strides) and gets a tile and a
`Launch`, which takes the tensors.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from hasten.ops import dropout
from hasten.ops.call import Call
from hasten.ops.launching import TENSOR, Launch
from hasten.ops.portable.bias import attention_dbias
from hasten.ops.portable.forward import attention_forward
from hasten.ops.portable.gradients import attention_delta, attention_dkdv, attention_dq
from hasten.ops.portable.table import TABLE, Kind, Limits, Tile, tile
from hasten.ops.tiles import as_band

_MOST_PLANS = 256  # of each kernel; one is a few kilobytes
_NO_BIAS = (None, None, None, None)

Strides = tuple[int, ...]


class Sizes(NamedTuple):
    """Sizes, strides and terms of one call, the same names in dense and packed layout. Holds no tensor.

    `terms` are (scale, softcap, dropout threshold, 1 / (1 - p), four strides of the bias), None for what is not
    there. `band` is (left, right), None for a mask that is no band; that one `varies` by batch and by head or not.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    max_seqlen_q: int
    max_seqlen_k: int
    element_size: int
    q_strides: Strides
    k_strides: Strides
    v_strides: Strides
    terms: tuple[Any, ...]
    slope_stride: int
    kind: Kind
    band: tuple[int | None, int | None] | None
    is_padded: bool
    varies: tuple[bool, bool]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Sizes:
        """Read them off the tensors and the call."""
        q_shape, slopes = q.shape, call.slopes
        terms: tuple[Any, ...] = (call.softmax_scale, call.softcap or None, None, None, *_NO_BIAS)
        if call.bias is not None or call.seed is not None:
            terms = _terms(call)
        mask = call.mask
        band = as_band(mask)
        is_rich = band is None or call.softcap or call.bias is not None or slopes is not None or call.seed is not None
        return cls(
            q_shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1,
            q_shape[-2],
            k.shape[-2],
            q_shape[-1],
            v.shape[-1],
            call.max_seqlen_q,
            call.max_seqlen_k,
            q.element_size(),
            q.stride(),
            k.stride(),
            v.stride(),
            terms,
            0 if slopes is None or slopes.shape[0] == 1 else slopes.shape[1],
            "rich" if is_rich else "plain",
            None if band is None else (band.left, band.right),
            band is not None and band.padding is not None,
            (False, False) if band is not None else (mask.varies_by_batch, mask.varies_by_head),
        )

    def line(self, phase: str) -> Tile | None:
        """What the table says now for this call; a plan made from another line is not taken (the tuner writes them)."""
        widest = max(self.head_dim, self.head_dim_v)
        lines = TABLE.get((phase, self.element_size, 64 if widest <= 64 else 128 if widest <= 128 else 256))
        return None if lines is None else lines.get(self.kind, lines["plain"])

    def tile(self, phase: str, limits: Limits | None) -> Tile:
        """The tile of a phase on that GPU."""
        return tile(phase, self.element_size, max(padded(self.head_dim), padded(self.head_dim_v)), self.kind, limits)

    def visits(self, block: Tile, columns: bool) -> tuple[Any, Any]:
        """(lists, band) as the kernels take them; `columns` for dk and dv."""
        if self.band is not None:
            return None, self.band
        lines = -(-self.max_seqlen_k // block.block_n) if columns else -(-self.max_seqlen_q // block.block_m)
        by_batch, by_head = self.varies
        batch_stride = lines * (self.num_heads if by_head else 1) if by_batch and self.batch > 1 else 0
        head_stride = lines if by_head and self.num_heads > 1 else 0
        return (TENSOR, TENSOR, TENSOR, TENSOR, batch_stride, head_stride), (None, None)

    @property
    def lengths(self) -> tuple[int, int]:
        """The last arguments of the kernels."""
        return self.max_seqlen_q, self.max_seqlen_k

    def options(self, block: Tile) -> dict[str, Any]:
        """Compile-time constants; float32 keeps all its bits (tf32 has an error of 3e-4)."""
        return {
            "GROUP_SIZE": self.num_heads // self.num_kv_heads,
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "BLOCK_D": padded(self.head_dim),
            "BLOCK_DV": padded(self.head_dim_v),
            "BLOCK_M": block.block_m,
            "BLOCK_N": block.block_n,
            "PRECISION": "ieee",
            "num_warps": block.num_warps,
            "num_stages": block.num_stages,
        }


def padded(head_dim: int) -> int:
    """head_dim as a tile size: a power of two, at least what the matrix units take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _terms(call: Call) -> tuple[Any, ...]:
    strides: tuple[Any, ...] = _NO_BIAS
    if call.bias is not None:
        strides = tuple(
            0 if size == 1 else stride for size, stride in zip(call.bias.shape, call.bias.stride(), strict=True)
        )
    drops = (None, None) if call.seed is None else (dropout.threshold(call.dropout_p), 1.0 / (1.0 - call.dropout_p))
    return (call.softmax_scale, call.softcap or None, *drops, *strides)


def _rows(strides: Strides) -> Strides:
    """(batch, row, head) strides of q, k, v, out and their gradients; packed tensors have no batch."""
    return (0, *strides[:2]) if len(strides) == 3 else strides[:3]


def _statistic(strides: Strides) -> Strides:
    """(batch, row, head) strides of lse, delta or dlse."""
    return (0 if len(strides) == 2 else strides[0]), strides[-1], strides[-2]


@lru_cache(maxsize=_MOST_PLANS)
def forward(sizes: Sizes, line: Tile | None, limits: Limits | None, out: Strides, lse: Strides) -> tuple[Tile, Launch]:
    """(tile, launch of q, k, v, out, lse, sinks, bias, slopes, seed, cu_seqlens_q, cu_seqlens_k, key_range, lists)."""
    block = sizes.tile("forward", limits)
    num_tiles = -(-sizes.max_seqlen_q // block.block_m)
    arguments = (
        *(TENSOR,) * 12, *sizes.visits(block, columns=False), sizes.terms,
        _rows(sizes.q_strides), _rows(sizes.k_strides), _rows(sizes.v_strides), _rows(out), _statistic(lse),
        sizes.slope_stride, num_tiles, sizes.num_heads, *sizes.lengths,
    )  # fmt: skip
    grid = (num_tiles * sizes.num_heads * sizes.batch,)
    return block, Launch(attention_forward, grid, arguments, sizes.options(block))


@lru_cache(maxsize=_MOST_PLANS)
def delta(sizes: Sizes, out: Strides, dout: Strides, lse: Strides, dlse: Strides | None) -> Launch:
    """Launch of out, dout, dlse, delta, cu_seqlens_q."""
    block_m = 4096 // padded(sizes.head_dim_v)
    num_tiles = -(-sizes.max_seqlen_q // block_m)
    arguments = (
        *(TENSOR,) * 5, _rows(out), _rows(dout), _statistic(lse), None if dlse is None else _statistic(dlse),
        num_tiles, sizes.num_heads, sizes.max_seqlen_q,
    )  # fmt: skip
    constants = {"HEAD_DIM_V": sizes.head_dim_v, "BLOCK_DV": padded(sizes.head_dim_v), "BLOCK_M": block_m}
    return Launch(attention_delta, (num_tiles * sizes.num_heads * sizes.batch,), arguments, constants)


@lru_cache(maxsize=_MOST_PLANS)
def dkdv(
    sizes: Sizes, line: Tile | None, limits: Limits | None, dout: Strides, lse: Strides, dk: Strides, dv: Strides
) -> tuple[Tile, Launch]:
    """(tile, launch of q, k, v, dout, lse, delta, dk, dv, bias, slopes, seed, cu_seqlens, key_range, lists)."""
    block = sizes.tile("dkdv", limits)
    num_tiles = -(-sizes.max_seqlen_k // block.block_n)
    arguments = (
        *(TENSOR,) * 14, *sizes.visits(block, columns=True), sizes.terms,
        _rows(sizes.q_strides), _rows(sizes.k_strides), _rows(sizes.v_strides), _rows(dout), _rows(dk), _rows(dv),
        _statistic(lse), sizes.slope_stride, num_tiles, sizes.num_kv_heads, *sizes.lengths,
    )  # fmt: skip
    grid = (num_tiles * sizes.num_kv_heads * sizes.batch,)
    return block, Launch(attention_dkdv, grid, arguments, sizes.options(block))


@lru_cache(maxsize=_MOST_PLANS)
def dq(
    sizes: Sizes, line: Tile | None, limits: Limits | None, dout: Strides, lse: Strides, dq: Strides
) -> tuple[Tile, Launch]:
    """(tile, launch of q, k, v, dout, lse, delta, dq, dslope, bias, slopes, seed, cu_seqlens, key_range, lists)."""
    block = sizes.tile("dq", limits)
    num_tiles = -(-sizes.max_seqlen_q // block.block_m)
    arguments = (
        *(TENSOR,) * 14, *sizes.visits(block, columns=False), sizes.terms,
        _rows(sizes.q_strides), _rows(sizes.k_strides), _rows(sizes.v_strides), _rows(dout), _rows(dq),
        _statistic(lse), sizes.slope_stride, num_tiles, sizes.num_heads, *sizes.lengths,
    )  # fmt: skip
    grid = (num_tiles * sizes.num_heads * sizes.batch,)
    return block, Launch(attention_dq, grid, arguments, sizes.options(block))


@lru_cache(maxsize=_MOST_PLANS)
def dbias(
    sizes: Sizes, line: Tile | None, limits: Limits | None, bias: tuple[int, ...], dout: Strides, lse: Strides
) -> tuple[Tile, Launch, tuple[int, ...]]:
    """(tile, launch of q, k, v, dout, lse, delta, dbias, bias, seed, key_range, lists; shape of dbias)."""
    block = sizes.tile("dbias", limits)
    num_tiles = -(-sizes.max_seqlen_q // block.block_m)
    one = [size == 1 for size in bias]
    shape = (bias[0], bias[1], num_tiles if one[2] else bias[2], bias[3])
    contiguous = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3])
    arguments = (
        *(TENSOR,) * 10, *sizes.visits(block, columns=False), sizes.terms,
        _rows(sizes.q_strides), _rows(sizes.k_strides), _rows(sizes.v_strides), _rows(dout), contiguous,
        _statistic(lse), num_tiles, sizes.batch, sizes.num_heads, *sizes.lengths,
    )  # fmt: skip
    options = {"ONE_BATCH": one[0], "ONE_HEAD": one[1], "ONE_ROW": one[2], "ONE_KEY": one[3], **sizes.options(block)}
    return block, Launch(attention_dbias, (num_tiles * shape[0] * shape[1],), arguments, options), shape


KEPT = (forward, delta, dkdv, dq, dbias)


def clear() -> None:
    """Forget every plan."""
    for plan in KEPT:
        plan.cache_clear()
