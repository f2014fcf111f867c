"""Rows of packed documents in an order that a seed decides, and batches of them made ahead of the device.

The place in the data is one integer: how many rows were taken. Everything else follows from it, so a run resumes at
exactly the row it stopped at. Called by the loop; reads `train.tokens`, knows no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.errors import ArgumentError
from hasten.train.loss import IGNORED
from hasten.train.tokens import Tokens

_AHEAD = 3  # batches made before they are needed
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Batch:
    """Rows for the model: ids, positions and labels, int64 (rows, seqlen), and how many labels count.

    positions begin at 0 with every document: that is how a transformers model is told where documents begin, and
    no token sees another document. labels are the next tokens; -100 where the next one begins a document.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    num_labels: int

    def to(self, device: torch.device) -> Batch:
        """The same on a device; from pinned memory the host does not wait."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("ids", "positions", "labels")}
        return replace(self, **moved)


class Rows:
    """All rows, epoch after epoch: documents shuffled and laid end to end, cut to `seqlen`, and the cuts shuffled.

    Row r is row `r % rows_per_epoch` of epoch `r // rows_per_epoch`. A row holds one token more than seqlen, the last
    label. What is left at the end of an epoch, less than a row, is not seen in it. shuffle=False keeps the order.
    """

    def __init__(self, tokens: Tokens, seqlen: int, seed: int, *, shuffle: bool = True) -> None:
        self.tokens, self.seqlen, self.seed, self.shuffle = tokens, seqlen, seed, shuffle
        self.rows_per_epoch = (tokens.num_tokens - 1) // seqlen
        if self.rows_per_epoch < 1:
            got = f"{tokens.num_tokens} in all"
            raise ArgumentError("data", f"more than {seqlen} tokens", got, "give more text or a smaller --seqlen")
        self._epoch = -1
        self._order = self._ends = self._cuts = np.zeros(0, dtype=np.int64)

    def row(self, index: int) -> tuple[Array, Array]:
        """(ids int64 (seqlen + 1,), begins bool (seqlen + 1,)): tokens of a row, and which of them begin a document."""
        epoch, number = divmod(index, self.rows_per_epoch)
        self._turn_to(epoch)
        first = int(self._cuts[number]) * self.seqlen
        ids = np.empty(self.seqlen + 1, dtype=np.int64)
        begins = np.zeros(self.seqlen + 1, dtype=bool)
        place = int(np.searchsorted(self._ends, first, side="right"))
        filled = 0
        while filled < ids.size:
            array, start, length = self.tokens.table[self._order[place]]
            skipped = first + filled - (int(self._ends[place]) - int(length))
            count = min(int(length) - skipped, ids.size - filled)
            begin = int(start) + skipped
            ids[filled : filled + count] = self.tokens.arrays[array][begin : begin + count]
            begins[filled] = skipped == 0
            filled, place = filled + count, place + 1
        return ids, begins

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows at `indices` as a batch, on the CPU."""
        rows = [self.row(index) for index in indices]
        ids, begins = (np.stack(parts) for parts in zip(*rows, strict=True))
        labels = np.where(begins[:, 1:], IGNORED, ids[:, 1:])
        at = np.arange(self.seqlen)
        starts = np.where(begins[:, :-1], at, 0)
        positions = at - np.maximum.accumulate(starts, axis=1)
        inputs, places, targets = (torch.from_numpy(np.array(one)) for one in (ids[:, :-1], positions, labels))
        return Batch(inputs, places, targets, int((labels != IGNORED).sum()))

    def _turn_to(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        count = len(self.tokens.table)
        shuffled = (
            _permutation(self.seed, 2 * epoch, count),
            _permutation(self.seed, 2 * epoch + 1, self.rows_per_epoch),
        )
        self._order, self._cuts = shuffled if self.shuffle else (np.arange(count), np.arange(self.rows_per_epoch))
        self._ends = self.tokens.table[self._order, 2].cumsum()
        self._epoch = epoch


def _permutation(seed: int, stream: int, count: int) -> Array:
    """A permutation of 0 … count - 1, the same on every machine and with every numpy: sorted by a hash (splitmix64)."""
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(stream))
        return np.argsort(_mix(np.arange(count, dtype=np.uint64) + key), kind="stable")


def _mix(values: Any) -> Any:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which rows a process takes in which step: `batch` rows a step, `micro_batch` at a time, over `world` processes.

    In each micro-step the processes take neighbouring runs of rows; a step uses the same rows with any split.
    """

    batch: int
    micro_batch: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.micro_batch * self.world):
            got = f"{self.batch} rows in parts of {self.micro_batch} on {self.world} processes"
            raise ArgumentError("batch", "a multiple of micro-batch times processes", got, "change --micro-batch")

    @property
    def micro_steps(self) -> int:
        """Micro-batches of one process in a step."""
        return self.batch // (self.micro_batch * self.world)

    def indices(self, rows_taken: int, micro_step: int) -> range:
        """The rows of a micro-batch of a step that begins when `rows_taken` rows are behind."""
        begin = rows_taken + (micro_step * self.world + self.rank) * self.micro_batch
        return range(begin, begin + self.micro_batch)


def batches(
    rows: Rows, plan: Plan, rows_taken: int, steps: int, device: torch.device
) -> Generator[list[Batch], None, None]:
    """The micro-batches of each of `steps` steps, made by a thread some batches ahead, on `device`."""

    def make(indices: range) -> Batch:
        made = rows.batch(indices)
        if device.type != "cuda":
            return made
        pinned = {name: getattr(made, name).pin_memory() for name in ("ids", "positions", "labels")}
        return replace(made, **pinned)

    wanted = (
        plan.indices(rows_taken + number * plan.batch, micro)
        for number in range(steps)
        for micro in range(plan.micro_steps)
    )
    pending: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(1, "hasten-data") as pool:
        try:
            for _ in range(steps):
                step: list[Batch] = []
                while len(step) < plan.micro_steps:
                    while len(pending) < _AHEAD and (indices := next(wanted, None)) is not None:
                        pending.append(pool.submit(make, indices))
                    step.append(pending.popleft().result().to(device))
                yield step
        finally:
            for one in pending:
                one.cancel()
