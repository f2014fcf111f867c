"""What is measured: the sizes and the mask of one attention.

A mask here is a few numbers, so that every peer can be told of it in its own words; what has no formula is drawn
from them, the same on every machine. Knows no clock and no peer.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import ArgumentError
from hasten.masks import BlockSparse, Causal, Documents, Full, Global, Mask, Window
from hasten.ops import cost

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCK = 128  # rows, and keys, of a block of a block-sparse mask
_MASK_FORMS = "causal, full, window:LEFT,RIGHT, longformer:WINDOW,GLOBAL, blocks:PERCENT, documents:MEAN or packed:MEAN"


@dataclass(frozen=True)
class Pattern:
    """A window of `left` and `right` keys round each query (None: unlimited), and the first keys as global tokens.

    Or `percent` of all blocks of 128 x 128 cells; or causal documents, `mean_length` long in the mean, told of by a
    mask or, if `is_packed`, as sequences of their own.
    """

    left: int | None = None
    right: int | None = None
    num_global: int = 0
    percent: int = 0
    mean_length: int = 0
    is_packed: bool = False

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "causal", "full", "window:256,0", "longformer:256,64", "blocks:10", "documents:1024", "packed:1024".

        Raises ArgumentError for all else.
        """
        name, _, numbers = text.partition(":")
        sizes = [int(size) for size in numbers.split(",")] if numbers.replace(",", "").isdecimal() else []
        if text in ("causal", "full"):
            return cls(right=0 if text == "causal" else None)
        if name == "window" and len(sizes) == 2:
            return cls(sizes[0], sizes[1])
        if name == "longformer" and len(sizes) == 2:
            return cls(sizes[0], sizes[0], sizes[1])
        if name == "blocks" and len(sizes) == 1 and 1 <= sizes[0] <= 100:
            return cls(percent=sizes[0])
        if name in ("documents", "packed") and len(sizes) == 1 and sizes[0] >= 1:
            return cls(right=0, mean_length=sizes[0], is_packed=name == "packed")
        raise ArgumentError("mask", _MASK_FORMS, repr(text), "LEFT and RIGHT count keys beside the query's own")

    def __str__(self) -> str:
        if self.mean_length:
            return f"{'packed' if self.is_packed else 'documents'}:{self.mean_length}"
        if self.percent:
            return f"blocks:{self.percent}"
        if self.num_global:
            return f"longformer:{self.left},{self.num_global}"
        if self.left is None:
            return "full" if self.right is None else "causal"
        return f"window:{self.left},{self.right}"

    @property
    def is_dense(self) -> bool:
        """True for full and causal: those every peer has its own word for."""
        return self.left is None and not self.is_drawn

    @property
    def is_causal(self) -> bool:
        """True for causal alone, not for a window without keys to its right."""
        return self.is_dense and self.right == 0

    @property
    def is_drawn(self) -> bool:
        """True for blocks and documents: their cells follow from the length alone, but from no formula."""
        return bool(self.percent or self.mean_length)

    def mask(self, seqlen: int | None = None, device: torch.device | str = "cpu") -> Mask:
        """The same in our words; `seqlen` and `device` are needed where it holds tensors (`is_drawn`)."""
        if not self.is_drawn:
            return self._band()
        if seqlen is None:
            raise ArgumentError("mask", "one that needs no length", str(self), "only hasten bench measures this one")
        return _drawn_mask(self, seqlen, torch.device(device))

    def _band(self) -> Mask:
        if self.is_dense:
            return Causal() if self.is_causal else Full()
        window = Window(self.left, self.right)
        return window | Global(tuple(range(self.num_global))) if self.num_global else window

    def mask_mod(self, seqlen: int, device: torch.device | str = "cpu") -> Callable[[Any, Any, Any, Any], Any]:
        """The same in FlexAttention's: True where query index sees key index, both from 0."""
        if self.percent:
            layout = block_layout(self.percent, seqlen).to(device)
            return lambda batch, head, query, key: layout[query // BLOCK, key // BLOCK]
        if self.mean_length:
            bounds = torch.tensor(document_bounds(self.mean_length, seqlen))
            number = torch.repeat_interleave(bounds.diff()).to(device)
            return lambda batch, head, query, key: (number[query] == number[key]) & (key <= query)
        return _band_mod(self.left, self.right, self.num_global)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention, self-attention of one length."""

    batch: int
    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    pattern: Pattern
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("batch", "seqlen", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, "an int >= 1", getattr(self, name), "give the sizes of one attention")
        if self.num_heads % self.num_kv_heads:
            hint = "each K/V head serves the same number of query heads"
            raise ArgumentError("kv_heads", f"a divisor of {self.num_heads}", self.num_kv_heads, hint)
        if self.pattern.mean_length and self.batch != 1:
            raise ArgumentError("batch", "1", self.batch, "documents share one row: give as many tokens as seqlen")

    @property
    def pairs(self) -> int:
        """Visible cells over all batch entries and heads."""
        return self.batch * self.num_heads * _pairs(self.pattern, self.seqlen)

    def mask(self, device: torch.device) -> Mask:
        """Who sees whom, in our words; packed documents as a mask too."""
        return self.pattern.mask(self.seqlen, device)

    def cu_seqlens(self, device: torch.device) -> tuple[Tensor, int]:
        """Where documents begin, and the end, int32; and the length of the longest."""
        bounds = document_bounds(self.pattern.mean_length, self.seqlen)
        longest = max(after - before for before, after in itertools.pairwise(bounds))
        return torch.tensor(bounds, dtype=torch.int32, device=device), longest

    def flops(self, phase: str) -> int:
        """FLOPs of "forward" or "backward"."""
        count = cost.backward_flops if phase == "backward" else cost.forward_flops
        return count(self.pairs, self.head_dim, self.head_dim)

    def hbm_bytes(self, phase: str) -> int:
        """The fewest bytes of "forward" or "backward"."""
        return cost.hbm_bytes(self.sizes, is_backward=phase == "backward")

    @property
    def sizes(self) -> cost.Sizes:
        """The same sizes as the cost model wants them."""
        return cost.Sizes(
            batch=self.batch,
            seqlen_q=self.seqlen,
            seqlen_k=self.seqlen,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim,
            element_bytes=self.dtype.itemsize,
        )

    def tensors(self, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random normal q, k, v and dout, (batch, seqlen, heads, head_dim): zeros would run faster than real data."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(num_heads: int) -> Tensor:
            shape = (self.batch, self.seqlen, num_heads, self.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(self.dtype)

        return normal(self.num_heads), normal(self.num_kv_heads), normal(self.num_kv_heads), normal(self.num_heads)

    def empty_tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of these sizes on a device, with nothing in them and next to no memory behind them."""

        def empty(num_heads: int) -> Tensor:
            row = torch.empty(self.head_dim, dtype=self.dtype, device=device)
            return row.expand(self.batch, self.seqlen, num_heads, self.head_dim)

        return empty(self.num_heads), empty(self.num_kv_heads), empty(self.num_kv_heads)

    def fields(self) -> dict[str, Any]:
        """What a record says of it."""
        return {
            "batch": self.batch,
            "seqlen": self.seqlen,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "mask": str(self.pattern),
            "dtype": dtype_name(self.dtype),
        }

    def __str__(self) -> str:
        heads = f"h{self.num_heads}" + ("" if self.num_kv_heads == self.num_heads else f"/{self.num_kv_heads}")
        return f"{self.pattern} b{self.batch} s{self.seqlen} {heads} d{self.head_dim} {dtype_name(self.dtype)}"


def _band_mod(left: int | None, right: int | None, num_global: int) -> Callable[[Any, Any, Any, Any], Any]:
    """A plain function of plain numbers: FlexAttention refuses bound methods."""

    def band_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = (query >= 0) if left is None else (key >= query - left)
        if right is not None:
            seen = seen & (key <= query + right)
        if num_global:
            seen = seen | (key < num_global) | (query < num_global)
        return seen

    return band_mod


def block_layout(percent: int, seqlen: int) -> Tensor:
    """bool (blocks, blocks): that share of every row of blocks, its own block among them, the others at random."""
    size = -(-seqlen // BLOCK)
    kept = max(1, round(size * percent / 100))
    draw = random.Random(percent)
    layout = torch.eye(size, dtype=torch.bool)
    for row in range(size):
        layout[row, draw.sample([column for column in range(size) if column != row], kept - 1)] = True
    return layout


@functools.cache
def document_bounds(mean_length: int, seqlen: int) -> tuple[int, ...]:
    """Where documents begin, and the end: lengths drawn log-normally with sigma 1; the last one is cut."""
    draw, bounds = random.Random(0), [0]
    while bounds[-1] < seqlen:
        length = max(1, round(draw.lognormvariate(math.log(mean_length) - 0.5, 1.0)))
        bounds.append(min(seqlen, bounds[-1] + length))
    return tuple(bounds)


@functools.lru_cache(maxsize=4)
def _drawn_mask(pattern: Pattern, seqlen: int, device: torch.device) -> Mask:
    """Kept, because what is derived from a mask's tensors is kept with them."""
    if pattern.percent:
        return BlockSparse(block_layout(pattern.percent, seqlen).to(device), BLOCK)
    bounds = torch.tensor(document_bounds(pattern.mean_length, seqlen), dtype=torch.int32, device=device)
    return Documents(bounds) & Causal()


@functools.cache
def _pairs(pattern: Pattern, seqlen: int) -> int:
    """Visible cells of one head, by arithmetic."""
    if pattern.mean_length:
        bounds = document_bounds(pattern.mean_length, seqlen)
        return cost.packed_pairs(Causal(), bounds, bounds, 1)
    if pattern.num_global:  # all cells in the rows and columns of global tokens, and the band among the others
        others = max(0, seqlen - pattern.num_global)
        return seqlen**2 - others**2 + cost.visible_pairs(Window(pattern.left, pattern.right), 1, 1, others, others)
    return cost.visible_pairs(pattern.mask(seqlen), 1, 1, seqlen, seqlen)


def dtype_name(dtype: torch.dtype) -> str:
    """The short name: bf16, fp16, fp32."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def parse_dtype(text: str) -> torch.dtype:
    """The dtype of a short name; raises ArgumentError."""
    if text not in DTYPES:
        raise ArgumentError("dtype", f"one of {', '.join(DTYPES)}", repr(text), "bf16 is usual on a GPU")
    return DTYPES[text]
