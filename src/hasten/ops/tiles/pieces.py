"""Long lines of tiles cut into pieces, so that no single one is the tail of a whole launch.

A row of tiles of Longformer's global tokens visits all keys, where the others visit a few tiles. Persistent kernels
take a piece as an item of its own and add up what the pieces found; short lines stay whole. Decided on the host, once
for a list and a number of processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: visits that are worth an item, beside what it costs to begin one and to add up the pieces
_FEWEST = 16
#: pieces of one line, and what a piece may be of the visits that a processor has on average
_MOST_PARTS = 63
_SHARE = 8
_PART, _SLOT = 6, 12  # where part and slot begin in `share`


@dataclass(frozen=True)
class Pieces:
    """Items of one table of lines, the longest first; all tables have the same.

    items int32 (num_items, 2): line, share. share is 0 for a whole line; else slot << 12 | part << 6 | parts, of a
    piece that has entries [n * part // parts, n * (part + 1) // parts) of n full ones, and as many of the partial ones.
    cut int32 (num_cut, 3): a line in pieces, the slot of its first, how many: their slots follow each other.
    """

    items: Tensor
    cut: Tensor
    num_slots: int


def cut_lines(
    visits: Sequence[int], total: int, num_tables: int, num_processors: int, device: torch.device
) -> Pieces | None:
    """Pieces for a launch of `total` visits over `num_tables` tables; None where no line is much longer than a piece.

    visits: of each line, in the table where they are most. None as well where lines are long in some tables only, and
    there are so many of them that what the pieces leave would take much memory.
    """
    most = max(_FEWEST, total // (_SHARE * num_processors))
    if max(visits, default=0) <= 2 * most:
        return None
    items, cut, slot = [], [], 0
    for line, count in enumerate(visits):
        parts = max(1, min(_MOST_PARTS, -(-count // most)))
        if parts > 1:
            cut.append((line, slot, parts))
        for part in range(parts):
            share = slot << _SLOT | part << _PART | parts
            items.append((-(-count // parts), line, share if parts > 1 else 0))
            slot += parts > 1
    if slot * num_tables > 2 * _SHARE * num_processors:
        return None
    items.sort(key=lambda item: -item[0])
    places = torch.tensor([item[1:] for item in items], dtype=torch.int32, device=device)
    return Pieces(places, torch.tensor(cut, dtype=torch.int32, device=device), slot)
