"""Decode steps that are captured: one token of each sequence, batches padded to a few sizes, inputs in fixed places.

Called by the runner (batch_runner.py) for batches in which every sequence has one token. Python then costs a copy of
the inputs and a replay, whatever the model is. Knows no request and no sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hasten.cache.paged import PagedCache, Tables
from hasten.engine.attend_pages import Pages, Part
from hasten.engine.batch import Piece
from hasten.engine.graphs import Capture, Run, reason_of

#: logits (1, total, vocab) of ids and positions int64 (1, total), with K and V where `Pages` say
Forward = Callable[[Tensor, Tensor, Pages], Tensor]
SMALL = (1, 2, 4)
STEP = 8  # between larger sizes
CAPACITY = 2048  # tokens that the narrowest tables hold; wider ones hold 4, 16, ... times as many
ALIGNED = 16  # numbers of 4 bytes: kernels are compiled for pointers that are
NO_SOURCE = -1  # in the place of a token to come from the device: it came from the host


class DecodeSteps:
    """The decode steps of one model, captured when a size is first met.

    forward: the model. most: sequences of the largest batch. context: the most tokens of a sequence, None for no limit.
    capture: makes a replay of a function (graphs.py). A model that cannot be captured is computed as before: `refusal`
    then says why.
    """

    def __init__(
        self,
        forward: Forward,
        cache: PagedCache,
        device: torch.device,
        most: int,
        context: int | None,
        capture: Capture,
    ) -> None:
        self._forward, self._cache, self._device, self._capture = forward, cache, device, capture
        self.most, self._context = most, context
        self._steps: dict[tuple[int, int], tuple[Inputs, Run]] = {}
        self._pages = [PageRows() for _ in cache.kinds]
        self._chosen = torch.zeros(most, dtype=torch.int64, device=device)
        self._logits: Tensor | None = None
        self.num_graphs = self.num_replays = 0  # sizes that have been captured, and steps by them
        self.refusal: str | None = None

    def close(self) -> None:
        """Give the memory of what is captured back; what comes next is captured anew."""
        self._steps.clear()
        self._logits = None

    def takes(self, pieces: Sequence[Piece], chosen: Tensor | None) -> bool:
        """True if these are one token of each sequence, whose logits are wanted, and captured steps serve them."""
        is_small = self.refusal is None and 0 < len(pieces) <= self.most
        is_small = is_small and (chosen is None or len(chosen) <= self.most)
        return is_small and all(len(piece.ids) == 1 and list(piece.rows) == [0] for piece in pieces)

    def run(self, pieces: Sequence[Piece], chosen: Tensor | None) -> Tensor:
        """Logits (len(pieces), vocab), in memory that the next call overwrites; arguments as of `BatchRunner.run`."""
        key = (size_of(len(pieces), self.most), self._width(pieces))
        known = self._steps.get(key)
        inputs = Inputs(*key, len(self._cache.kinds), self._device) if known is None else known[0]
        self._fill(inputs, pieces, chosen)
        if known is None:
            logits = self._forward(*inputs.of(self._cache, self._chosen))[0]  # compiles what is to be compiled
            replay = self._captured(inputs, logits)
            if replay is None:
                return logits[: len(pieces)]
            known = self._steps[key] = (inputs, replay)
            self.num_graphs += 1
        known[1]()
        self.num_replays += 1
        assert self._logits is not None
        return self._logits[: len(pieces)]

    def _captured(self, inputs: Inputs, logits: Tensor) -> Run | None:
        """What replays the step that has just given `logits`, or None, and the refusal."""
        if self._logits is None:
            self._logits = logits.new_empty(self.most, logits.shape[-1])
        target = self._logits[: inputs.size]

        def run() -> None:
            target.copy_(self._forward(*inputs.of(self._cache, self._chosen))[0])

        try:
            return self._capture(run)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
            self.refusal = reason_of(error)
            logging.getLogger("hasten").warning("engine: decode steps are no CUDA graphs, since %s", self.refusal)
            return None

    def _fill(self, inputs: Inputs, pieces: Sequence[Piece], chosen: Tensor | None) -> None:
        """Put the inputs where the step reads them; nothing waits for the device."""
        columns = (
            [piece.ids[0] for piece in pieces],
            [piece.start for piece in pieces],
            [piece.start + 1 for piece in pieces],
            [NO_SOURCE if piece.pending is None else piece.pending for piece in pieces],
        )
        tables = [
            rows.fill([piece.holding.tables[kind].pages for piece in pieces], inputs.size, inputs.width)
            for kind, rows in enumerate(self._pages)
        ]
        inputs.put(columns, tables)
        if any(piece.pending is not None for piece in pieces):
            assert chosen is not None, "a token is pending, and none was chosen"
            self._chosen[: len(chosen)].copy_(chosen)

    def _width(self, pieces: Sequence[Piece]) -> int:
        """Columns of the page tables: enough for the longest sequence, and few different numbers of them."""
        longest = max(piece.start + 1 for piece in pieces)
        capacity = CAPACITY
        while capacity < longest:
            capacity *= 4
        if self._context is not None:
            capacity = max(min(capacity, self._context), longest)
        return -(-capacity // self._cache.page_size)


class Inputs:
    """The inputs of one captured step, in one piece of memory that is filled by one copy.

    size: rows, of which the last may be padding: token 0 at position 0 of a sequence without tokens, which neither
    reads nor writes K and V. width: columns of the page tables, of which there is one a kind of layer.
    """

    def __init__(self, size: int, width: int, num_kinds: int, device: torch.device) -> None:
        self.size, self.width = size, width
        self._lengths = [size] * 4 + [size * width] * num_kinds
        self._starts = [0]
        for length in self._lengths:
            self._starts.append(self._starts[-1] + -(-length // ALIGNED) * ALIGNED)
        self._memory = torch.zeros(self._starts[-1], dtype=torch.int32, device=device)

    def _parts(self, memory: Tensor) -> list[Tensor]:
        return [memory[start : start + length] for start, length in zip(self._starts, self._lengths, strict=False)]

    def put(self, columns: Sequence[Sequence[int]], tables: Sequence[Tensor]) -> None:
        """Fill the memory: (ids, positions, lengths, sources) of the rows that are no padding, and tables for all."""
        # new each time: the copy of the last step may be on its way from its own
        host = torch.zeros(len(self._memory), dtype=torch.int32, pin_memory=self._memory.is_cuda)
        parts = self._parts(host)
        parts[3].fill_(NO_SOURCE)
        for part, column in zip(parts, columns, strict=False):
            part[: len(column)] = torch.tensor(column, dtype=torch.int32)
        for part, table in zip(parts[4:], tables, strict=True):
            part.view(self.size, self.width).copy_(table)
        self._memory.copy_(host, non_blocking=True)

    def of(self, cache: PagedCache, chosen: Tensor) -> tuple[Tensor, Tensor, Pages]:
        """What the model is given, computed from the memory alone: ids and positions int64 (1, size), and the pages.

        chosen: int64 (any,), the tokens that the step before has chosen, of which the sources of rows count.
        """
        ids, positions, lengths, sources, *tables = self._parts(self._memory)
        taken = chosen[sources.clamp(min=0).long()].clamp(min=0)  # what is below 0 is no token, and nobody's
        pages = Pages(
            cache=cache,
            tables=tuple(Tables(table.view(self.size, self.width)) for table in tables),
            cache_seqlens=lengths,
            cu_seqlens_q=None,
            lengths=(),
            plans=(),
            parts=(Part(0, self.size, 0, self.size, self.width),),
        )
        return torch.where(sources == NO_SOURCE, ids.long(), taken)[None], positions.long()[None], pages


class PageRows:
    """The page tables of one kind of layer on the host, written only where pages have changed since the last step."""

    def __init__(self) -> None:
        self._known: list[list[int]] = []
        self._matrix = torch.zeros(0, 0, dtype=torch.int32)

    def fill(self, rows: Sequence[Sequence[int]], size: int, width: int) -> Tensor:
        """int32 (size, width): the pages of each row, and the null page 0 everywhere else."""
        most, widest = self._matrix.shape
        if size > most or width > widest:
            self._matrix = torch.zeros(max(size, most), max(width, widest), dtype=torch.int32)
            self._known = [[] for _ in range(len(self._matrix))]
        for index, pages in enumerate([*rows, *[()] * (len(self._matrix) - len(rows))]):
            known, pages = self._known[index], list(pages)
            if known != pages:
                self._matrix[index, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
                self._matrix[index, len(pages) : len(known)] = 0
                self._known[index] = pages
        return self._matrix[:size, :width]


def size_of(count: int, most: int) -> int:
    """Rows of the batch that `count` sequences are padded to: 1, 2, 4, 8, 16, 24, ... and `most` itself."""
    for size in SMALL:
        if count <= size <= most:
            return size
    return min(-(-count // STEP) * STEP, most)


__all__ = ["CAPACITY", "DecodeSteps", "Forward", "Inputs", "PageRows", "size_of"]
