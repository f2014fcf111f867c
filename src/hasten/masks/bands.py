"""Masks that are a band round the diagonal: full, causal, sliding and dilated windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import ArgumentError
from hasten.masks.algebra import Cells, Mask


@dataclass(frozen=True, eq=False)
class Full(Mask):
    """Every query sees every key."""

    def visible(self, cells: Cells) -> Tensor:
        return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=cells.key.device)

    def __repr__(self) -> str:  # spelled out: torch.compile cannot trace the one that dataclass makes
        return "Full()"


@dataclass(frozen=True, eq=False)
class Causal(Mask):
    """A query sees its own position and all before it.

    seqlen 2 x 4   1 1 1 0
                   1 1 1 1
    """

    def visible(self, cells: Cells) -> Tensor:
        return cells.key <= cells.position

    def __repr__(self) -> str:
        return "Causal()"


@dataclass(frozen=True, eq=False)
class Window(Mask):
    """A query sees `left` keys before and `right` keys after its own position, and its own.

    None is unlimited. With `dilation` d (one for all heads, or a tuple with one per head) only every
    d-th key counts: positions p + d * t, t in [-left, right] (Longformer, arXiv 2004.05150, section 3.1).

        Window(1, 1)   1 1 0 0        Window(1, 0, dilation=2)   1 0 0 0
                       1 1 1 0                                   0 1 0 0
                       0 1 1 1                                   1 0 1 0
                       0 0 1 1                                   0 1 0 1
    """

    left: int | None = None
    right: int | None = None
    dilation: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            size = getattr(self, name)
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
                raise ArgumentError(f"Window.{name}", "an int >= 0 or None", repr(size), "None means unlimited")
        steps = tuple(self.dilation) if isinstance(self.dilation, tuple | list) else (self.dilation,)
        if not steps or any(not isinstance(step, int) or isinstance(step, bool) or step < 1 for step in steps):
            raise ArgumentError("Window.dilation", "ints >= 1", repr(self.dilation), "1 means none")
        if not isinstance(self.dilation, int):
            object.__setattr__(self, "dilation", steps[0] if len(set(steps)) == 1 else steps)

    def check(self, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> None:
        if isinstance(self.dilation, tuple) and len(self.dilation) != num_heads:
            expected = f"one value, or one for each of {num_heads} heads"
            raise ArgumentError("Window.dilation", expected, repr(self.dilation), "give as many as there are heads")

    @property
    def varies_by_head(self) -> bool:
        return isinstance(self.dilation, tuple)

    def visible(self, cells: Cells) -> Tensor:
        distance = cells.key - cells.position
        if isinstance(self.dilation, tuple):
            step = torch.tensor(self.dilation, device=distance.device)[cells.head]
        else:
            step = torch.tensor(self.dilation, device=distance.device)
        keep = distance % step == 0
        if self.left is not None:
            keep = keep & (distance >= -self.left * step)
        if self.right is not None:
            keep = keep & (distance <= self.right * step)
        return keep

    def __repr__(self) -> str:
        dilation = "" if self.dilation == 1 else f", dilation={self.dilation}"
        return f"Window({self.left}, {self.right}{dilation})"
