"""Position tables made longer, and the windows of layers: what converters to Longformer and LED share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.errors import ArgumentError
from hasten.masks import from_longformer_window

#: what rounding may make of a self-check, relative to the largest number
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def tile(rows: Tensor, length: int, reserved: Tensor | None = None) -> Tensor:
    """(old, dim) -> (reserved + length, dim): the rows again and again, the last copy cut; `reserved` rows first."""
    copies = -(-length // rows.shape[0])
    tiled = rows.repeat(copies, 1)[:length]
    return tiled if reserved is None else torch.cat([reserved, tiled])


def windows_of(window: int | Sequence[int], num_layers: int) -> list[int]:
    """One window a layer; raises ArgumentError for odd ones or another number of them."""
    windows = [window] * num_layers if isinstance(window, int) else list(window)
    if len(windows) != num_layers:
        raise ArgumentError(
            "window", f"one number, or one for each of {num_layers} layers", windows, "both sides count"
        )
    for one in windows:
        from_longformer_window(one)
    return windows


def expect_length(max_length: int) -> None:
    """Raise ArgumentError unless a model can have that many positions."""
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
        raise ArgumentError("max_length", "a number of tokens >= 1", repr(max_length), "4096 is usual")
