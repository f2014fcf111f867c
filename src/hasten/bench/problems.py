"""What is measured: the sizes and the mask of one attention, and grids of them.

A mask here is a few numbers, so that every peer can be told of it in its own words. Knows no clock and no peer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import ArgumentError
from hasten.masks import Causal, Full, Global, Mask, Window
from hasten.ops import cost

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MASK_FORMS = "causal, full, window:LEFT,RIGHT or longformer:WINDOW,GLOBAL"


@dataclass(frozen=True)
class Pattern:
    """A window of `left` and `right` keys round each query (None: unlimited), and the first keys as global tokens."""

    left: int | None = None
    right: int | None = None
    num_global: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "causal", "full", "window:256,0" or "longformer:256,64"; raises ArgumentError for all else."""
        name, _, numbers = text.partition(":")
        sizes = [int(size) for size in numbers.split(",")] if numbers.replace(",", "").isdecimal() else []
        if (name, numbers) == ("causal", ""):
            return cls(right=0)
        if (name, numbers) == ("full", ""):
            return cls()
        if name == "window" and len(sizes) == 2:
            return cls(*sizes)
        if name == "longformer" and len(sizes) == 2:
            return cls(sizes[0], sizes[0], sizes[1])
        raise ArgumentError("mask", _MASK_FORMS, repr(text), "LEFT and RIGHT count keys beside the query's own")

    def __str__(self) -> str:
        if self.num_global:
            return f"longformer:{self.left},{self.num_global}"
        if self.left is None:
            return "full" if self.right is None else "causal"
        return f"window:{self.left},{self.right}"

    @property
    def is_dense(self) -> bool:
        """True for full and causal: those every peer has its own word for."""
        return self.left is None

    @property
    def is_causal(self) -> bool:
        """True for causal alone, not for a window without keys to its right."""
        return self.is_dense and self.right == 0

    def mask(self) -> Mask:
        """The same in our words."""
        if self.is_dense:
            return Causal() if self.is_causal else Full()
        window = Window(self.left, self.right)
        return window | Global(tuple(range(self.num_global))) if self.num_global else window

    def mask_mod(self) -> Callable[[Any, Any, Any, Any], Any]:
        """The same in FlexAttention's: True where query index sees key index, both from 0."""
        left, right, num_global = self.left, self.right, self.num_global

        def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
            seen = (query >= 0) if left is None else (key >= query - left)
            if right is not None:
                seen = seen & (key <= query + right)
            if num_global:
                seen = seen | (key < num_global) | (query < num_global)
            return seen

        return visible


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

    @property
    def pairs(self) -> int:
        """Visible cells over all batch entries and heads."""
        return self.batch * self.num_heads * _pairs(self.pattern, self.seqlen)

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


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Problems of one number of tokens and one model width, as the papers plot them.

    `heads` and `batch` default to width / head_dim and tokens / seqlen; `kv_heads` to as many as heads.
    """

    head_dims: Sequence[int]
    seqlens: Sequence[int]
    patterns: Sequence[Pattern]
    dtype: torch.dtype
    tokens: int = 16384
    width: int = 2048
    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None

    def __iter__(self) -> Iterator[Problem]:
        for head_dim, pattern, seqlen in itertools.product(self.head_dims, self.patterns, self.seqlens):
            heads = self.heads or max(1, self.width // head_dim)
            yield Problem(
                batch=self.batch or max(1, self.tokens // seqlen),
                seqlen=seqlen,
                num_heads=heads,
                num_kv_heads=self.kv_heads or heads,
                head_dim=head_dim,
                pattern=pattern,
                dtype=self.dtype,
            )


@functools.cache
def _pairs(pattern: Pattern, seqlen: int) -> int:
    """Visible cells of one head; kept, because counting a long Longformer mask takes seconds."""
    return cost.visible_pairs(pattern.mask(), 1, 1, seqlen, seqlen)


def dtype_name(dtype: torch.dtype) -> str:
    """The short name: bf16, fp16, fp32."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def parse_dtype(text: str) -> torch.dtype:
    """The dtype of a short name; raises ArgumentError."""
    if text not in DTYPES:
        raise ArgumentError("dtype", f"one of {', '.join(DTYPES)}", repr(text), "bf16 is usual on a GPU")
    return DTYPES[text]


def parse_sizes(argument: str, text: str) -> list[int]:
    """Read "64,128" or "512..16384" (doubling); raises ArgumentError that names the argument."""
    sizes: list[int] = []
    for part in text.split(","):
        ends = part.split("..")
        if len(ends) > 2 or not all(end.strip().isdecimal() and int(end) > 0 for end in ends):
            raise ArgumentError(argument, "sizes such as 64,128 or 512..16384", repr(text), "every size is at least 1")
        size = int(ends[0])
        while size <= int(ends[-1]):
            sizes.append(size)
            size *= 2
    return sizes
