"""Masks that hold data: global tokens, block layouts, documents, padding, and any boolean matrix.

Their tensors must not be written to while the mask is in use: what is derived from them is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import ArgumentError
from hasten.masks.algebra import Cells, Mask, brief, expect_sizes, expect_tensor, int_tensor


@dataclass(frozen=True, eq=False)
class Global(Mask):
    """Global tokens: seen by every query (`keys`) and seeing every key (`queries`).

    `tokens` are key positions (a sequence of ints, the same for all rows of the batch) or a bool tensor
    (seqlen_k,) or (batch, seqlen_k). A query is global if the key position it stands at is.
    """

    tokens: tuple[int, ...] | Tensor
    queries: bool = True
    keys: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.tokens, Tensor):
            expect_tensor("Global.tokens", self.tokens, (torch.bool,), (1, 2))
        elif any(not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in self.tokens):
            raise ArgumentError(
                "Global.tokens", "positions >= 0", repr(self.tokens), "or give a bool tensor (seqlen_k,)"
            )
        else:
            object.__setattr__(self, "tokens", tuple(sorted(set(self.tokens))))

    def check(self, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> None:
        if isinstance(self.tokens, Tensor):
            expect_sizes("Global.tokens", self.tokens, (batch, seqlen_k)[-self.tokens.ndim :])
        elif self.tokens and self.tokens[-1] >= seqlen_k:
            raise ArgumentError(
                "Global.tokens", f"positions < {seqlen_k}", self.tokens[-1], "drop tokens past the last key"
            )

    def parts(self) -> tuple[str, list[Tensor]]:
        tensors = [self.tokens] if isinstance(self.tokens, Tensor) else []
        return f"Global({'#0;' if tensors else self.tokens}, {self.queries}, {self.keys})", tensors

    @property
    def varies_by_batch(self) -> bool:
        return isinstance(self.tokens, Tensor) and self.tokens.ndim == 2

    def flags(self, seqlen_k: int, device: torch.device) -> Tensor:
        """bool (batch or 1, seqlen_k): which key positions are global."""
        if isinstance(self.tokens, Tensor):
            return self.tokens.to(device).reshape(-1, seqlen_k)
        flags = torch.zeros(1, seqlen_k, dtype=torch.bool, device=device)
        flags[:, list(self.tokens)] = True
        return flags

    def visible(self, cells: Cells) -> Tensor:
        if cells.seqlen_k == 0:
            return torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=cells.key.device)
        flags = self.flags(cells.seqlen_k, cells.key.device)
        row = cells.batch if flags.shape[0] > 1 else torch.zeros_like(cells.batch)
        keep = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=cells.key.device)
        if self.keys:
            keep = keep | flags[row, cells.key]
        if self.queries:
            position = cells.position
            keep = keep | (flags[row, position.clamp(0, cells.seqlen_k - 1)] & (position >= 0))
        return keep

    def __repr__(self) -> str:
        if isinstance(self.tokens, Tensor):
            tokens = brief(self.tokens)
        else:
            tokens = str(self.tokens) if len(self.tokens) <= 8 else f"{len(self.tokens)} tokens"
        return f"Global({tokens}{'' if self.queries else ', queries=False'}{'' if self.keys else ', keys=False'})"


@dataclass(frozen=True, eq=False)
class BlockSparse(Mask):
    """Blocks of `block_size` x `block_size` cells, visible where `layout` is True.

    `layout`: bool (rows, cols), (num_heads, rows, cols) or (batch, num_heads, rows, cols) with
    rows = ceil(seqlen_q / block_size), cols = ceil(seqlen_k / block_size); a leading size of 1 is shared.
    Blocks are counted from the first query and key (block-sparse FlashAttention, arXiv 2205.14135, 3.3).
    """

    layout: Tensor
    block_size: int

    def __post_init__(self) -> None:
        expect_tensor("BlockSparse.layout", self.layout, (torch.bool,), (2, 3, 4))
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ArgumentError(
                "BlockSparse.block_size", "an int >= 1", repr(self.block_size), "64 or 128 suit the kernels"
            )

    def check(self, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> None:
        grid = (-(-seqlen_q // self.block_size), -(-seqlen_k // self.block_size))
        sizes = (batch, num_heads, *grid)[-self.layout.ndim :]
        expect_sizes("BlockSparse.layout", self.layout, sizes, shared=self.layout.ndim - 2)

    def parts(self) -> tuple[str, list[Tensor]]:
        return f"BlockSparse(#0;, {self.block_size})", [self.layout]

    @property
    def varies_by_batch(self) -> bool:
        return self.layout.ndim == 4 and self.layout.shape[0] > 1

    @property
    def varies_by_head(self) -> bool:
        return self.layout.ndim >= 3 and self.layout.shape[-3] > 1

    def visible(self, cells: Cells) -> Tensor:
        layout = self.layout.to(cells.key.device)
        layout = layout.reshape((1,) * (4 - layout.ndim) + layout.shape)
        batch = cells.batch if layout.shape[0] > 1 else torch.zeros_like(cells.batch)
        head = cells.head if layout.shape[1] > 1 else torch.zeros_like(cells.head)
        return layout[batch, head, cells.query // self.block_size, cells.key // self.block_size]

    def __repr__(self) -> str:
        return f"BlockSparse({brief(self.layout)}, {self.block_size})"


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Documents packed into one sequence: a query sees the keys of its own document only.

    `cu_seqlens`: where documents begin, and the end: ints of shape (num_documents + 1,), or
    (batch, num_documents + 1) where rows differ (repeat the end for rows with fewer documents).
    """

    cu_seqlens: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.cu_seqlens, Tensor):
            object.__setattr__(self, "cu_seqlens", int_tensor("Documents.cu_seqlens", self.cu_seqlens))
        expect_tensor("Documents.cu_seqlens", self.cu_seqlens, (torch.int32, torch.int64), (1, 2))
        if self.cu_seqlens.shape[-1] == 0:
            raise ArgumentError("Documents.cu_seqlens", "at least one entry", "none", "it ends with the last position")

    def check(self, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> None:
        if self.cu_seqlens.ndim == 2:
            expect_sizes("Documents.cu_seqlens", self.cu_seqlens, (batch, self.cu_seqlens.shape[1]))

    def parts(self) -> tuple[str, list[Tensor]]:
        return "Documents(#0;)", [self.cu_seqlens]

    @property
    def varies_by_batch(self) -> bool:
        return self.cu_seqlens.ndim == 2

    def numbers(self, seqlen_k: int, device: torch.device) -> Tensor:
        """int64 (batch or 1, seqlen_k): the document of each key position; -1 before the first."""
        cu_seqlens = self.cu_seqlens.to(device, torch.int64).reshape(-1, self.cu_seqlens.shape[-1])
        position = torch.arange(seqlen_k, device=device).expand(cu_seqlens.shape[0], seqlen_k)
        return torch.searchsorted(cu_seqlens, position.contiguous(), right=True) - 1

    def visible(self, cells: Cells) -> Tensor:
        if cells.seqlen_k == 0:
            return torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=cells.key.device)
        numbers = self.numbers(cells.seqlen_k, cells.key.device)
        last = self.cu_seqlens.shape[-1] - 1
        row = cells.batch if numbers.shape[0] > 1 else torch.zeros_like(cells.batch)
        position = cells.position
        own = numbers[row, position.clamp(0, cells.seqlen_k - 1)]
        other = numbers[row, cells.key]
        return (own == other) & (position >= 0) & (own >= 0) & (own < last)

    def __repr__(self) -> str:
        return f"Documents({brief(self.cu_seqlens)})"


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """Rows of a batch have `lengths` real keys (batch,), first (`side="right"` is padding) or last ("left").

    Padding hides keys; the rows of padding queries are computed like any other, and mean nothing.
    """

    lengths: Tensor
    side: str = "right"

    def __post_init__(self) -> None:
        if not isinstance(self.lengths, Tensor):
            object.__setattr__(self, "lengths", int_tensor("Padding.lengths", self.lengths))
        expect_tensor("Padding.lengths", self.lengths, (torch.int32, torch.int64), (1,))
        if self.side not in ("left", "right"):
            raise ArgumentError(
                "Padding.side", "'left' or 'right'", repr(self.side), "name the side on which the padding is"
            )

    def check(self, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> None:
        expect_sizes("Padding.lengths", self.lengths, (batch,))

    def parts(self) -> tuple[str, list[Tensor]]:
        return f"Padding(#0;, '{self.side}')", [self.lengths]

    @property
    def varies_by_batch(self) -> bool:
        return True

    def key_range(self, seqlen_k: int, device: torch.device) -> Tensor:
        """int32 (batch, 2): the first real key of each row, and one past the last."""
        lengths = self.lengths.to(device, torch.int32).clamp(0, seqlen_k)
        if self.side == "right":
            return torch.stack([torch.zeros_like(lengths), lengths], dim=1)
        return torch.stack([seqlen_k - lengths, torch.full_like(lengths, seqlen_k)], dim=1)

    def visible(self, cells: Cells) -> Tensor:
        first, end = self.key_range(cells.seqlen_k, cells.key.device)[cells.batch].unbind(-1)
        return (cells.key >= first) & (cells.key < end)

    def __repr__(self) -> str:
        return f"Padding({brief(self.lengths)}{'' if self.side == 'right' else ', left'})"


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """Any boolean matrix, for what has no shorter name.

    `matrix`: bool, broadcastable to (batch, num_heads, seqlen_q, seqlen_k), 2 to 4 dimensions.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        expect_tensor("Dense.matrix", self.matrix, (torch.bool,), (2, 3, 4))

    def check(self, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> None:
        expected = (batch, num_heads, seqlen_q, seqlen_k)[-self.matrix.ndim :]
        expect_sizes("Dense.matrix", self.matrix, expected, shared=self.matrix.ndim)

    def parts(self) -> tuple[str, list[Tensor]]:
        return "Dense(#0;)", [self.matrix]

    @property
    def varies_by_batch(self) -> bool:
        return self.matrix.ndim == 4 and self.matrix.shape[0] > 1

    @property
    def varies_by_head(self) -> bool:
        return self.matrix.ndim >= 3 and self.matrix.shape[-3] > 1

    def visible(self, cells: Cells) -> Tensor:
        matrix = self.matrix.to(cells.key.device)
        matrix = matrix.reshape((1,) * (4 - matrix.ndim) + matrix.shape)
        axes = (cells.batch, cells.head, cells.query, cells.key)
        index = [axis if size > 1 else torch.zeros_like(axis) for axis, size in zip(axes, matrix.shape, strict=True)]
        return matrix[tuple(index)]

    def __repr__(self) -> str:
        return f"Dense({brief(self.matrix)})"
