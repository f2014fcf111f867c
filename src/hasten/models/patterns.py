"""What a mask function of transformers says: a band round the diagonal, and where packed sequences begin.

transformers hands a mask interface a function of cell indices, composed of closures of its `masking_utils`.
Those closures are read here, and nothing is guessed: a function that is not made of known pieces has no
pattern, and the caller evaluates it cell by cell. Nothing here knows caches, padding or layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from hasten.masks import Causal, Documents, Full, Mask, Window

MaskFunction = Callable[..., Any]


@dataclass(frozen=True)
class Pattern:
    """Query i sees keys i - left to i + right (None: no limit) of its own sequence.

    `starts`: bool (batch, seqlen - 1), True where the token after that index begins a new packed sequence;
    None if nothing is packed. `is_remapped`: positions are counted within a sequence, which changes
    nothing for a band as long as `starts` separates the sequences.
    """

    left: int | None = None
    right: int | None = None
    starts: Tensor | None = None
    is_remapped: bool = False

    @property
    def is_band(self) -> bool:
        """True if it matters where the queries stand among the keys."""
        return self.left is not None or self.right is not None

    def band(self, seqlen_k: int) -> Mask:
        """The band as a mask over `seqlen_k` keys; a window that reaches them all is not one."""
        left = None if self.left is None or self.left >= seqlen_k - 1 else self.left
        if left is None and self.right == 0:
            return Causal()
        return Full() if left is None and self.right is None else Window(left, self.right)


def read(mask_function: MaskFunction) -> Pattern | None:
    """The pattern of a mask function, or None if it is not made of known pieces. Not under torch.compile."""
    pattern = _read(mask_function)
    return None if pattern is None or (pattern.is_remapped and pattern.starts is None) else pattern


def _read(mask_function: MaskFunction) -> Pattern | None:
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(right=0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern()
    if getattr(mask_function, "__module__", "") != masking_utils.__name__ or not inspect.isfunction(mask_function):
        return None
    reader = _READERS.get(mask_function.__qualname__)
    return None if reader is None else reader(inspect.getclosurevars(mask_function).nonlocals)


def _all_of(values: Any) -> Pattern | None:
    """and_masks(*mask_functions)"""
    joined = Pattern()
    for mask_function in values["mask_functions"]:
        part = _read(mask_function)
        if part is None or (part.starts is not None and joined.starts is not None):
            return None
        joined = Pattern(
            left=_tighter(joined.left, part.left),
            right=_tighter(joined.right, part.right),
            starts=part.starts if joined.starts is None else joined.starts,
            is_remapped=joined.is_remapped or part.is_remapped,
        )
    return joined


def _sliding(values: Any) -> Pattern:
    """sliding_window_overlay(W): key > query - W"""
    return Pattern(left=values["sliding_window"] - 1)


def _sliding_both(values: Any) -> Pattern:
    """sliding_window_bidirectional_overlay(W): |query - key| <= W"""
    return Pattern(left=values["sliding_window"], right=values["sliding_window"])


def _packed(values: Any) -> Pattern:
    """packed_sequence_mask_function(ids): ids[query] == ids[key]"""
    ids = values["packed_sequence_mask"]
    return Pattern(starts=ids[:, 1:] != ids[:, :-1])


def _remapped(values: Any) -> Pattern | None:
    """remap_positions_for_packed_sequence(f, positions): f(positions[query], positions[key])"""
    part = _read(values["mask_function"])
    return None if part is None or part.starts is not None else replace(part, is_remapped=True)


_READERS: dict[str, Callable[[Any], Pattern | None]] = {
    "and_masks.<locals>.and_mask": _all_of,
    "sliding_window_overlay.<locals>.inner_mask": _sliding,
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": _sliding_both,
    "packed_sequence_mask_function.<locals>.inner_mask": _packed,
    "remap_positions_for_packed_sequence.<locals>.inner_mask": _remapped,
}


def _tighter(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


def traced(
    mask_function: MaskFunction, local_size: int | None, is_bidirectional: bool, packed: Tensor | None
) -> Pattern | None:
    """The pattern while torch.compile traces, where closures cannot be opened.

    The mask makers of transformers join a band of `local_size` (chunked attention apart) with packed
    sequences, and only those use `and_masks`. Where sequences begin is asked of the function itself: just
    below the diagonal it says whether two neighbours see each other. packed: a tensor (batch, seqlen) on the
    device of the queries if sequences may be packed, else None.
    """
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(right=0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern()
    if mask_function.__name__.rpartition(".")[2] != "and_mask":  # torch 2.11 traces no __qualname__
        return None
    if is_bidirectional:
        return None if local_size is None else Pattern(left=local_size, right=local_size)
    pattern = Pattern(left=None if local_size is None else local_size - 1, right=0)
    if packed is None:
        return pattern
    row = torch.arange(packed.shape[0], device=packed.device)[:, None]
    query = torch.arange(1, packed.shape[1], device=packed.device)
    neighbours: Tensor = mask_function(row, 0, query, query - 1)
    return replace(pattern, starts=~neighbours.expand(packed.shape[0], packed.shape[1] - 1))


def documents(starts: Tensor, can_read: bool) -> Documents | None:
    """The packed sequences as a mask; None if there is but one in every row.

    If the tensor may not be read, every token gets a place in cu_seqlens and the end is repeated.
    """
    batch, seqlen = starts.shape[0], starts.shape[1] + 1
    if not can_read:
        position = torch.arange(1, seqlen, device=starts.device)
        bounds = torch.where(starts, position, seqlen).sort(dim=-1).values
        return Documents(torch.nn.functional.pad(torch.nn.functional.pad(bounds, (1, 0)), (0, 1), value=seqlen))
    found = starts.nonzero().tolist()
    if not found:
        return None
    rows: list[list[int]] = [[0] for _ in range(batch)]
    for row, index in found:
        rows[row].append(index + 1)
    longest = max(map(len, rows))
    cu_seqlens = [row + [seqlen] * (longest + 1 - len(row)) for row in rows]
    return Documents(torch.tensor(cu_seqlens, dtype=torch.int32, device=starts.device))
