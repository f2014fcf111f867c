"""Masks with a closed form: the keys of a run of query rows by arithmetic, without any list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hasten.masks import And, Causal, Full, Mask, Padding, Window


class KeyRange(NamedTuple):
    """Keys of a run of query rows: [begin, end) is seen by some row, [full_begin, full_end) by every row.

    Either range is empty if its begin is not below its end.
    """

    begin: int
    full_begin: int
    full_end: int
    end: int


@dataclass(frozen=True)
class Band:
    """Query i sees keys p - left ... p + right, p = i + seqlen_k - seqlen_q; None is unlimited.

    `padding`, if any, narrows that further for each row of the batch.
    """

    left: int | None = None
    right: int | None = None
    padding: Padding | None = None

    def keys(
        self, q0: int, q1: int, seqlen_q: int, seqlen_k: int, key_begin: int = 0, key_end: int | None = None
    ) -> KeyRange:
        """The keys of query rows [q0, q1), q0 < q1 <= seqlen_q.

        `key_begin`, `key_end`: the real keys of this row of the batch (`padding` itself is not read here).
        """
        limit = seqlen_k if key_end is None else min(key_end, seqlen_k)
        first, last = q0 + seqlen_k - seqlen_q, q1 - 1 + seqlen_k - seqlen_q
        begin = full_begin = max(key_begin, 0)
        end = full_end = limit
        if self.left is not None:
            begin, full_begin = max(begin, first - self.left), max(begin, last - self.left)
        if self.right is not None:
            end, full_end = min(end, last + self.right + 1), min(end, first + self.right + 1)
        return KeyRange(begin, full_begin, full_end, end)


def as_band(mask: Mask) -> Band | None:
    """The mask as a band: an `&` of Full, Causal, undilated Window and at most one Padding; None for any other."""
    if isinstance(mask, Full):
        return Band()
    if isinstance(mask, Causal):
        return Band(right=0)
    if isinstance(mask, Window):
        return Band(mask.left, mask.right) if mask.dilation == 1 else None
    if isinstance(mask, Padding):
        return Band(padding=mask)
    if not isinstance(mask, And):
        return None
    band = Band()
    for part in mask.masks:
        other = as_band(part)
        if other is None or (band.padding is not None and other.padding is not None):
            return None
        padding = band.padding if other.padding is None else other.padding
        band = Band(_narrower(band.left, other.left), _narrower(band.right, other.right), padding)
    return band


def band_tiles(
    band: Band,
    q0: int,
    q1: int,
    seqlen_q: int,
    seqlen_k: int,
    block_n: int,
    key_begin: int = 0,
    key_end: int | None = None,
) -> tuple[int, int, int, int]:
    """(first, full_first, full_end, end): query rows [q0, q1) visit tiles [first, end) of block_n keys.

    Tiles [full_first, full_end) among them are wholly visible and inside the keys; the others are partial.
    first <= full_first <= full_end <= end always; equal where nothing is visible.
    """
    keys = band.keys(q0, min(q1, seqlen_q), seqlen_q, seqlen_k, key_begin, key_end)
    first = keys.begin // block_n
    end = -(-keys.end // block_n) if keys.begin < keys.end else first
    full_first = min(max(-(-keys.full_begin // block_n), first), end)
    full_end = max(min(keys.full_end // block_n, end), full_first)
    return first, full_first, full_end, end


def _narrower(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
