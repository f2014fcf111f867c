"""A runner whose logits have the same bits whatever else is in the batch and however prompts are cut.

Kernels choose their order of sums by the shapes they are given, so all shapes are the same: tokens go through the model
in blocks of a fixed number of rows, and each attends as a sequence of its own. Used by engines with reproducible=True.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.cache.paged import PagedCache
from hasten.cache.pages import NULL_PAGE
from hasten.engine.batch import Piece, copies_of, pack, put
from hasten.engine.batch_runner import BatchRunner
from hasten.errors import ArgumentError

#: rows of a forward: few on a CPU, where each costs time, more on a GPU, where the weights are read once for all
ROWS = {"cpu": 16}
ROWS_OF_OTHERS = 64
# numbers that a CPU kernel takes at a time; what is left over is computed by other instructions
VECTOR = 64


class BlockRunner(BatchRunner):
    """Runs every token in a block of `num_rows`. Arguments as for BatchRunner, without captured steps.

    Raises ArgumentError for a model whose products depend on what else is in the batch: experts, layers of a size that
    kernels cannot cut evenly, and for pages of 8 bits on a CPU.
    """

    def __init__(self, model: Any, cache: PagedCache, *, step_threads: int | None = None) -> None:
        super().__init__(model, cache, step_threads=step_threads)
        self.num_rows = ROWS.get(self.device.type, ROWS_OF_OTHERS)
        if self.device.type == "cpu":
            self.step_threads = _threads(model, self.num_rows, step_threads or torch.get_num_threads())
        try:
            _check(model, cache, self.device)
        except ArgumentError:
            self.close()
            raise
        padding = cache.ledger().open()
        for table in padding.tables:
            table.pages, table.num_tokens = [NULL_PAGE], 1
        self._padding = Piece(ids=[0], start=0, holding=padding, rows=())

    def run(self, pieces: Sequence[Piece], chosen: Tensor | None = None) -> Tensor:
        """As BatchRunner's."""
        threads = torch.get_num_threads()
        if self.step_threads is not None:
            torch.set_num_threads(self.step_threads)
        try:
            with torch.inference_mode():
                self.cache.copy(copies_of(pieces, len(self.cache.kinds)))
                singles = list(_singles(pieces))
                blocks = [singles[at : at + self.num_rows] for at in range(0, len(singles), self.num_rows)]
                return torch.cat([self._block(block, chosen) for block in blocks])
        finally:
            torch.set_num_threads(threads)

    def _block(self, block: list[Piece], chosen: Tensor | None) -> Tensor:
        """Logits of the wanted rows of at most `num_rows` single tokens."""
        wanted = [row for row, piece in enumerate(block) if piece.rows]
        padded = [*block, *[self._padding] * (self.num_rows - len(block))]
        batch = pack(padded, self.cache, self.device, in_tiles=True)
        if batch.pending is not None:
            assert chosen is not None, "a token is pending, and none was chosen"
            sources, places = batch.pending
            batch.ids[0, places] = chosen[sources].clamp(min=0)
        # the head computes all rows or none: its product has a shape, too
        rows = put(range(self.num_rows if wanted else 0), torch.int64, self.device)
        options = {"logits_to_keep": rows} if self._takes_rows else {}
        logits = self._all_logits(batch.ids, batch.positions, batch.pages, **options)[0]
        return logits[put(wanted, torch.int64, self.device)]


def _singles(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The tokens of pieces, each a piece of its own; their copies are done."""
    for piece in pieces:
        rows, last = set(piece.rows), len(piece.ids) - 1
        for place, token in enumerate(piece.ids):
            own = (0,) if place in rows else ()
            pending = piece.pending if place == last else None
            yield replace(piece, ids=[token], start=piece.start + place, rows=own, copies=(), pending=pending)


def _check(model: Any, cache: PagedCache, device: torch.device) -> None:
    config = model.config.get_text_config(decoder=True)
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        got = f"{type(model).__name__}, whose experts get as many rows as the batch sends them"
        raise ArgumentError("reproducible", "a model without experts", got, "leave reproducible out")
    if device.type != "cpu":
        return
    if cache.is_quantized:
        raise ArgumentError("kv_dtype", "None for a reproducible engine on a CPU", str(cache.stored), "leave it out")
    odd = [f"{name} of {size}" for name, size in _sizes(model) if size * ROWS["cpu"] % VECTOR]
    if odd:
        expected = f"layers of a size that {VECTOR // ROWS['cpu']} divides, on a CPU"
        raise ArgumentError("reproducible", expected, odd[0], "leave reproducible out")


def _sizes(model: Any) -> list[tuple[str, int]]:
    """What the layers of a model give out, without its head."""
    head = model.get_output_embeddings()
    linear = [
        (name, layer)
        for name, layer in model.named_modules()
        if not isinstance(layer, nn.Embedding) and layer is not head and getattr(layer, "weight", None) is not None
    ]
    return [(name, size) for name, layer in linear if layer.weight.ndim == 2 for size in layer.weight.shape]


def _threads(model: Any, num_rows: int, most: int) -> int:
    """As many threads as cut every layer into whole vectors, at most so many: a power of two."""
    sizes = [size * num_rows for _, size in _sizes(model)]
    powers = [2**power for power in range(5) if 2**power <= most]
    return max(count for count in powers if count == 1 or all(size % (VECTOR * count) == 0 for size in sizes))


__all__ = ["ROWS", "BlockRunner"]
