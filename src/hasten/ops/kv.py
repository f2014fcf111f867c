"""Views of a KV cache: where the keys and values of each sequence lie, and how many there are.

Made by caches and the engine, read by `decode_attention` and `append_kv`. A view owns nothing, allocates nothing
and never looks at the values of its lengths and tables, so it can be made while a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.errors import ArgumentError, ArgumentTypeError

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: storage in 8 bits, and the largest number each holds
QUANTIZED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
PAGE_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class PagedKV:
    """Keys and values in pages of a pool: token p of sequence b lies in page block_table[b, p // page_size].

    key_pages: (num_pages, page_size, num_kv_heads, head_dim); value_pages: (..., head_dim_v); any strides, last one 1;
    page_size 16, 32, 64, 128 or 256. block_table: int32 (batch, max_pages), rows of any stride.
    cache_seqlens: int32 (batch,): tokens of each sequence, those of the present call included.

    Only entries of `block_table` whose page holds a key that some query sees are read: entries past the length, and
    those before a window, may be anything. So may the rest of a last page (NaN too). A slice of columns
    `block_table[:, :n]` bounds the lengths and makes the call cheaper: capacity is max_pages * page_size.

    key_scales, value_scales: for pages of int8 or float8_e4m3fn, float32 (num_pages, page_size, num_kv_heads): a key is
    its stored number times the scale of its token and head. Any strides: one scale a page, a head or for all is an
    expanded tensor. They have to be given for 8-bit pages: a silent 1.0 is a known way to lose accuracy.
    """

    key_pages: Tensor
    value_pages: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    kind: ClassVar[str] = "paged"

    def __post_init__(self) -> None:
        _check_rows(self, "key_pages", "value_pages", "(num_pages, page_size, num_kv_heads, head_dim)")
        if self.page_size not in PAGE_SIZES:
            raise ArgumentError("key_pages", f"page_size in {PAGE_SIZES}", self.page_size, "powers of two only")
        _check_ints(self, "block_table", "(batch, max_pages)", 2)
        if self.block_table.shape[0] != self.cache_seqlens.shape[0]:
            got = f"{self.block_table.shape[0]} for {self.cache_seqlens.shape[0]} lengths"
            raise ArgumentError("block_table", "one row a sequence", got, "slice both to the same batch")

    @property
    def keys(self) -> Tensor:
        """The storage of keys, (num_pages, page_size, num_kv_heads, head_dim)."""
        return self.key_pages

    @property
    def values(self) -> Tensor:
        """The storage of values, (num_pages, page_size, num_kv_heads, head_dim_v)."""
        return self.value_pages

    @property
    def page_size(self) -> int:
        """Tokens of one page."""
        return self.key_pages.shape[1]

    @property
    def capacity(self) -> int:
        """The most tokens a sequence of this view can have."""
        return self.block_table.shape[1] * self.page_size

    @property
    def batch(self) -> int:
        """How many sequences."""
        return self.cache_seqlens.shape[0]


@dataclass(frozen=True, eq=False)
class ContiguousKV:
    """Keys and values of one sequence after another: token p of sequence b is k[b, p].

    k: (batch, capacity, num_kv_heads, head_dim); v: (..., head_dim_v); any strides, last one 1, so a cache stored
    (batch, heads, capacity, dim) is `.transpose(1, 2)` of it. cache_seqlens: int32 (batch,): tokens of each sequence,
    those of the present call included; what lies behind them may be anything (NaN too).
    key_scales, value_scales: float32 (batch, capacity, num_kv_heads) for int8 or float8_e4m3fn; see `PagedKV`.
    """

    k: Tensor
    v: Tensor
    cache_seqlens: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    kind: ClassVar[str] = "contiguous"
    block_table: ClassVar[None] = None

    def __post_init__(self) -> None:
        _check_rows(self, "k", "v", "(batch, capacity, num_kv_heads, head_dim)")
        if self.k.shape[0] != self.cache_seqlens.shape[0]:
            got = f"{self.k.shape[0]} for {self.cache_seqlens.shape[0]} lengths"
            raise ArgumentError("k", "one row a sequence", got, "slice both to the same batch")

    @property
    def keys(self) -> Tensor:
        """The storage of keys, (batch, capacity, num_kv_heads, head_dim)."""
        return self.k

    @property
    def values(self) -> Tensor:
        """The storage of values, (batch, capacity, num_kv_heads, head_dim_v)."""
        return self.v

    @property
    def capacity(self) -> int:
        """The most tokens a sequence of this view can have."""
        return self.k.shape[1]

    @property
    def batch(self) -> int:
        """How many sequences."""
        return self.cache_seqlens.shape[0]


@dataclass(frozen=True, eq=False)
class RingKV(ContiguousKV):
    """The last `capacity` tokens of each sequence: token p of sequence b is k[b, p % capacity].

    For layers with a sliding window: Window(left, 0) needs capacity >= left + seqlen_q, so that the tokens that a call
    overwrites are out of sight of its first query. Shapes are those of `ContiguousKV`; cache_seqlens counts all
    tokens that ever were, not those that are kept.
    """

    kind: ClassVar[str] = "ring"


#: what `decode_attention` and `append_kv` take
KV = PagedKV | ContiguousKV


def is_quantized(keys: KV) -> bool:
    """True if the view stores 8-bit numbers with scales."""
    return keys.keys.dtype in QUANTIZED


def rows_of(keys: KV, sequence: int, begin: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k and v (end - begin, num_kv_heads, dim) of tokens [begin, end) of one sequence, scaled, in `dtype`.

    Plain PyTorch, for the oracle and the CPU; a view where tokens lie in order and nothing has to be converted.
    """
    where: Tensor | slice
    if isinstance(keys, PagedKV):
        first, size = begin // keys.page_size, keys.page_size
        pages = keys.block_table[sequence, first : -(-end // size)].long()

        def take(storage: Tensor) -> Tensor:
            return storage[pages].flatten(0, 1)[begin - first * size : end - first * size]
    else:
        where = slice(begin, end)
        if isinstance(keys, RingKV):
            turn = begin // max(1, keys.capacity) * keys.capacity
            where = slice(begin - turn, end - turn)
            if end - turn > keys.capacity:
                where = torch.arange(begin, end, device=keys.k.device) % keys.capacity

        def take(storage: Tensor) -> Tensor:
            return storage[sequence][where]

    return (
        _scaled(take(keys.keys), None if keys.key_scales is None else take(keys.key_scales), dtype),
        _scaled(take(keys.values), None if keys.value_scales is None else take(keys.value_scales), dtype),
    )


def common_prefix(
    block_table: Tensor | Sequence[Sequence[int]], cache_seqlens: Tensor | Sequence[int], page_size: int
) -> int:
    """How many first tokens all sequences have in common, by whole pages: the `shared_prefix` of `decode_attention`.

    block_table (batch, max_pages) and cache_seqlens (batch,) as the host has them, lists or CPU tensors: reading them
    back from a GPU would wait for it, and raises. Sequences of length 0 (rows of padding) do not count, but for the
    first row, through which the prefix is read; a page that any sequence still writes to does not count either.
    Returns 0 for fewer than two sequences: there is nothing to share.
    """
    for name, given in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        if isinstance(given, Tensor) and given.device.type != "cpu":
            raise ArgumentError(
                name, "a list or a CPU tensor", f"a tensor on {given.device}", "keep the host's own copy"
            )
    rows = block_table.tolist() if isinstance(block_table, Tensor) else block_table
    lengths = cache_seqlens.tolist() if isinstance(cache_seqlens, Tensor) else cache_seqlens
    used = [row for row, length in zip(rows, lengths, strict=True) if length > 0]
    if len(used) < 2 or lengths[0] == 0:
        return 0
    pages = (min(length for length in lengths if length > 0) - 1) // page_size
    for column, entry in enumerate(used[0][:pages]):
        if any(row[column] != entry for row in used):
            return column * page_size
    return pages * page_size


def _scaled(rows: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scales is None:
        return rows if rows.dtype == dtype else rows.to(dtype)
    return rows.to(dtype) * scales.to(dtype).unsqueeze(-1)


def _check_rows(view: KV, name: str, name_v: str, layout: str) -> None:
    """Raise unless keys and values fit each other, their scales and the lengths."""
    k, v = getattr(view, name), getattr(view, name_v)
    for own, rows in ((name, k), (name_v, v)):
        if not isinstance(rows, Tensor):
            raise ArgumentTypeError(own, f"a tensor {layout}", type(rows).__name__, "give the storage itself")
        if rows.ndim != 4:
            raise ArgumentError(own, f"shape {layout}", tuple(rows.shape), "one layer at a time")
        if rows.dtype not in PLAIN and rows.dtype not in QUANTIZED:
            raise ArgumentTypeError(own, "a floating dtype, int8 or float8_e4m3fn", rows.dtype, "convert it with .to()")
        if rows.dtype != k.dtype or rows.device != k.device:
            raise ArgumentError(
                own, f"{k.dtype} on {k.device} as {name}", f"{rows.dtype} on {rows.device}", "convert it"
            )
        if rows.shape[-1] == 0 or rows.shape[-2] == 0:
            raise ArgumentError(
                own, "at least one head of at least one dimension", tuple(rows.shape), "check the split"
            )
        if rows.stride(-1) != 1 and rows.shape[-1] > 1:
            raise ArgumentError(own, "a last stride of 1", rows.stride(-1), "a cache is not copied behind your back")
    if k.shape[:3] != v.shape[:3]:
        raise ArgumentError(
            name_v, f"{tuple(k.shape[:3])} as {name} has", tuple(v.shape[:3]), f"the layout is {layout}"
        )
    _check_ints(view, "cache_seqlens", "(batch,)", 1)
    for own, scales in (("key_scales", view.key_scales), ("value_scales", view.value_scales)):
        _check_scales(own, scales, k)


def _check_scales(name: str, scales: Tensor | None, k: Tensor) -> None:
    if scales is None:
        if k.dtype in QUANTIZED:
            raise ArgumentError(name, f"float32 {tuple(k.shape[:3])} for {k.dtype}", None, "torch.ones, if you mean it")
        return
    if k.dtype not in QUANTIZED:
        raise ArgumentError(name, f"None for {k.dtype}", "a tensor", "scales belong to int8 and float8_e4m3fn")
    if not isinstance(scales, Tensor) or scales.dtype != torch.float32 or scales.shape != k.shape[:3]:
        got = f"{scales.dtype} {tuple(scales.shape)}" if isinstance(scales, Tensor) else type(scales).__name__
        raise ArgumentError(name, f"float32 {tuple(k.shape[:3])}", got, "expand() a scale that several tokens share")
    if scales.device != k.device:
        raise ArgumentError(name, f"the device of the keys, {k.device}", scales.device, "move it")


def _check_ints(view: KV, name: str, layout: str, ndim: int) -> None:
    value = getattr(view, name)
    if not isinstance(value, Tensor) or value.dtype != torch.int32:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentTypeError(name, f"an int32 tensor {layout}", got, "convert it with .to(torch.int32)")
    if value.ndim != ndim:
        raise ArgumentError(name, f"shape {layout}", tuple(value.shape), "one row a sequence")
    if value.device != view.keys.device:
        raise ArgumentError(name, f"the device of the keys, {view.keys.device}", value.device, "move it")
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ArgumentError(name, "a last stride of 1", value.stride(-1), "make it contiguous once, before the layers")
