"""The mask algebra: what every mask can do, and its two connectives.

A mask is a small immutable value. `keep()` evaluates it cell by cell in plain PyTorch; tile lists,
kernels, pictures and tests all derive from it. Queries are aligned bottom-right: query i of seqlen_q
stands at key position i + seqlen_k - seqlen_q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import ArgumentError, ArgumentTypeError


@dataclass(frozen=True)
class Cells:
    """Cells of the attention matrix, as broadcastable int64 index tensors.

    `batch`, `head`, `query`, `key` index the matrix; `position` is the key position at which the query
    stands (query + seqlen_k - seqlen_q). Sizes say where the matrix ends.
    """

    batch: Tensor
    head: Tensor
    query: Tensor
    key: Tensor
    seqlen_q: int
    seqlen_k: int

    @property
    def position(self) -> Tensor:
        """Key position of each query, bottom-right aligned; same shape as `query`."""
        return self.query + (self.seqlen_k - self.seqlen_q)


class Mask:
    """A set of visible cells (query, key). Combine with `&` and `|`; compare and hash by value."""

    def visible(self, cells: Cells) -> Tensor:
        """bool tensor, broadcastable to the cells: True where the query sees the key."""
        raise NotImplementedError

    def check(self, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> None:
        """Raise ArgumentError if this mask does not fit an attention of that size."""

    def parts(self) -> tuple[str, list[Tensor]]:
        """The mask as text in which `#i;` stands for the i-th tensor, and those tensors (see wire.py)."""
        return repr(self), []

    @property
    def varies_by_batch(self) -> bool:
        """True if two batch entries may see different cells."""
        return False

    @property
    def varies_by_head(self) -> bool:
        """True if two heads may see different cells."""
        return False

    def keep(
        self,
        seqlen_q: int,
        seqlen_k: int | None = None,
        *,
        batch: int = 1,
        num_heads: int = 1,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The whole matrix: bool (batch, num_heads, seqlen_q, seqlen_k), True where visible.

        `seqlen_k` defaults to `seqlen_q`. This is the definition of the mask: everything else is
        tested against it. Raises ArgumentError if the mask does not fit the sizes.
        """
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        self.check(batch, num_heads, seqlen_q, seqlen_k)

        def axis(size: int, dim: int) -> Tensor:
            return torch.arange(size, device=device).view([size if d == dim else 1 for d in range(4)])

        cells = Cells(axis(batch, 0), axis(num_heads, 1), axis(seqlen_q, 2), axis(seqlen_k, 3), seqlen_q, seqlen_k)
        return self.visible(cells).expand(batch, num_heads, seqlen_q, seqlen_k)

    def picture(self, seqlen_q: int = 16, seqlen_k: int | None = None, *, batch: int = 0, head: int = 0) -> str:
        """A text picture of one (batch, head): `#` visible, `.` hidden, one line a query."""
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        query, key = torch.arange(seqlen_q).view(1, 1, -1, 1), torch.arange(seqlen_k).view(1, 1, 1, -1)
        where = [torch.full((1, 1, 1, 1), index) for index in (batch, head)]
        keep = self.visible(Cells(where[0], where[1], query, key, seqlen_q, seqlen_k)).expand(1, 1, seqlen_q, seqlen_k)[
            0, 0
        ]
        return "\n".join("".join("#" if cell else "." for cell in row) for row in keep.tolist())

    def __and__(self, other: Mask) -> Mask:
        return And.of(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or.of(self, other)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        (text, mine), (other_text, theirs) = self.parts(), other.parts()
        return text == other_text and all(a is b or torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def __hash__(self) -> int:
        return hash(self.parts()[0])


@dataclass(frozen=True, eq=False)
class _Connective(Mask):
    """Several masks joined; nested uses of the same connective are flattened."""

    masks: tuple[Mask, ...]

    @classmethod
    def of(cls, *masks: Mask) -> Mask:
        """Join masks, taking apart those already joined the same way."""
        for mask in masks:
            if not isinstance(mask, Mask):
                raise ArgumentTypeError("mask", "a hasten mask", type(mask).__name__, "join masks with masks only")
        return cls(tuple(part for mask in masks for part in (mask.masks if isinstance(mask, cls) else (mask,))))

    def check(self, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> None:
        for mask in self.masks:
            mask.check(batch, num_heads, seqlen_q, seqlen_k)

    def parts(self) -> tuple[str, list[Tensor]]:
        texts: list[str] = []
        tensors: list[Tensor] = []
        for mask in self.masks:
            text, own = mask.parts()
            for number in reversed(range(len(own))):
                text = text.replace(f"#{number};", f"#{number + len(tensors)};")
            texts.append(text)
            tensors.extend(own)
        return f"{type(self).__name__}({', '.join(texts)})", tensors

    @property
    def varies_by_batch(self) -> bool:
        return any(mask.varies_by_batch for mask in self.masks)

    @property
    def varies_by_head(self) -> bool:
        return any(mask.varies_by_head for mask in self.masks)


class And(_Connective):
    """Visible where every part is visible."""

    def visible(self, cells: Cells) -> Tensor:
        keep = self.masks[0].visible(cells)
        for mask in self.masks[1:]:
            keep = keep & mask.visible(cells)
        return keep

    def __repr__(self) -> str:
        return " & ".join(f"({mask!r})" if isinstance(mask, Or) else repr(mask) for mask in self.masks)


class Or(_Connective):
    """Visible where any part is visible."""

    def visible(self, cells: Cells) -> Tensor:
        keep = self.masks[0].visible(cells)
        for mask in self.masks[1:]:
            keep = keep | mask.visible(cells)
        return keep

    def __repr__(self) -> str:
        return " | ".join(f"({mask!r})" if isinstance(mask, And) else repr(mask) for mask in self.masks)


def expect_tensor(argument: str, value: Any, dtypes: tuple[torch.dtype, ...], ndims: tuple[int, ...]) -> None:
    """Raise unless `value` is a tensor of one of those dtypes and numbers of dimensions."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(argument, "a tensor", type(value).__name__, "wrap it with torch.tensor(...)")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ArgumentTypeError(argument, expected, str(value.dtype), f"convert it with .to({dtypes[0]})")
    if value.ndim not in ndims:
        expected = f"{' or '.join(map(str, ndims))} dimensions"
        raise ArgumentError(argument, expected, f"shape {tuple(value.shape)}", "reshape it")


def expect_sizes(argument: str, value: Tensor, sizes: tuple[int, ...], shared: int = 0) -> None:
    """Raise unless `value` has those sizes; the first `shared` dimensions may also be 1."""
    fits = [
        have == want or (dim < shared and have == 1)
        for dim, (have, want) in enumerate(zip(value.shape, sizes, strict=True))
    ]
    if not all(fits):
        raise ArgumentError(
            argument, f"shape {sizes}", f"shape {tuple(value.shape)}", "make the mask for this attention"
        )


def int_tensor(argument: str, values: Any) -> Tensor:
    """A sequence of ints as an int32 vector on the CPU."""
    values = list(values)
    if any(not isinstance(value, int) or isinstance(value, bool) for value in values):
        raise ArgumentTypeError(argument, "ints", repr(values), "lengths and positions are whole numbers")
    return torch.tensor(values, dtype=torch.int32)


def brief(tensor: Tensor) -> str:
    """A tensor in a few characters: its shape."""
    return "x".join(map(str, tensor.shape))
