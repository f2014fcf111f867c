"""Prompt caches without an engine: for a transformers model that is called by itself, or by its own `generate`.

Pieces become the cache that `generate` takes as `past_key_values`, and such a cache becomes pieces. They are those of
an engine with pages of 16 tokens. Called by prompt_cache.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hasten.cache.fingerprint import fingerprint
from hasten.cache.kept import shared_end
from hasten.cache.paged import Kind, kinds_of, layers_of
from hasten.cache.pieces import PIECE_TOKENS, Piece, root_of
from hasten.cache.static import KVCache
from hasten.cache.tiers import Tiers
from hasten.errors import ArgumentError, ArgumentTypeError

PAGE_SIZE = 16  # an engine's, if nothing is said


class Library:
    """Prefixes of one model, in `tiers`. Raises ArgumentError for a model that keeps something else than K and V."""

    def __init__(self, model: Any, tokenizer: Any, tiers: Tiers) -> None:
        self.model, self.tokenizer, self.tiers = model, tokenizer, tiers
        self.layers = layers_of(model)
        self.fingerprint = fingerprint(model, tokenizer, self.layers, PAGE_SIZE, model.dtype, model.dtype)

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a text, of ids, or of a tensor (n,) or (1, n)."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ArgumentError(
                    "prompt", "token ids, since there is no tokenizer", "a text", "give load a tokenizer"
                )
            return [int(one) for one in self.tokenizer(prompt)["input_ids"]]
        if isinstance(prompt, Tensor):
            if prompt.ndim not in (1, 2) or (prompt.ndim == 2 and prompt.shape[0] != 1):
                raise ArgumentError("prompt", "one prompt: (n,) or (1, n)", tuple(prompt.shape), "fork once for each")
            return [int(one) for one in prompt.flatten().tolist()]
        if not isinstance(prompt, Sequence):
            raise ArgumentTypeError("prompt", "a text or token ids", type(prompt).__name__, "see hasten.PromptCache")
        return [int(one) for one in prompt]

    def fork(self, ids: Sequence[int], salt: str | None) -> DynamicCache:
        """A cache of one's own with the longest known prefix, at most all but the last token."""
        root, limit = root_of(self.fingerprint, salt), len(ids) - 1
        some = self.tiers.load(self.tiers.find(root, ids, limit).keys)
        end = _usable(some, shared_end(ids, limit, some), kinds_of(self.layers))
        past = DynamicCache(config=self.model.config)
        if end:
            _fill(past, some, end, self.layers, self.model.device)
        return past

    @torch.inference_mode()
    def compute(self, ids: Sequence[int], salt: str | None) -> None:
        """Keep K and V of these tokens, of which those are computed that are not known.

        All are, where layers have a window: what is known may lack what was before it.
        """
        has_window = any(layer.window is not None for layer in self.layers)
        past = KVCache(max(1, len(ids))) if has_window else self.fork(ids, salt)
        new = torch.tensor([list(ids[past.get_seq_length() :])], device=self.model.device)
        self.model(input_ids=new, past_key_values=past, use_cache=True)
        self.add(ids, past, salt)

    def add(self, ids: Sequence[int], past: Any, salt: str | None) -> None:
        """Keep K and V that a cache has of exactly these tokens; refuses one that has let go of some."""
        if past.get_seq_length() != len(ids):
            hint = "give the tokens that went through the model: the last new one did not"
            raise ArgumentError("tokens", f"{past.get_seq_length()}, as many as the cache holds", len(ids), hint)
        num_kept = min(layer.keys.shape[2] for layer in past.layers) if len(ids) else 0
        if num_kept < len(ids):
            got = f"one that has {num_kept} of {len(ids)} tokens in layers with a window"
            raise ArgumentError("past", "a cache of all tokens", got, "pin the prefix instead, which computes it")
        parent = root_of(self.fingerprint, salt)
        for start in range(0, len(ids), PIECE_TOKENS):
            piece = _piece(parent, ids, start, past, self.layers)
            if not self.tiers.knows(piece.key, piece.num_pages):
                self.tiers.put(piece)
            parent = piece.key


def _usable(some: Sequence[Piece], end: int, kinds: Sequence[Kind]) -> int:
    """The most of the first `end` tokens of which layers with a window have all that the next token sees."""
    there = [
        {piece.start // PAGE_SIZE + one for piece in some for one in piece.places[kind]} for kind in range(len(kinds))
    ]
    while end > 0:
        last = -(-end // PAGE_SIZE)
        firsts = [0 if kind.window is None else max(0, end - kind.window) // PAGE_SIZE for kind in kinds]
        if all(set(range(first, last)) <= pages for first, pages in zip(firsts, there, strict=True)):
            break
        end = (last - 1) * PAGE_SIZE
    return end


def _fill(past: DynamicCache, some: Sequence[Piece], end: int, layers: Sequence[Kind], device: torch.device) -> None:
    kinds, num_pages = kinds_of(layers), -(-end // PAGE_SIZE)
    buffers: list[list[Tensor]] = []
    for kind in range(len(kinds)):
        pair = [one.new_zeros((num_pages, *one.shape[1:])) for one in some[0].pages[kind]]
        for piece in some:
            targets = [piece.start // PAGE_SIZE + one for one in piece.places[kind]]
            count = sum(target < num_pages for target in targets)
            for buffer, pages in zip(pair, piece.pages[kind], strict=True):
                buffer[targets[:count]] = pages[:count]
        buffers.append([buffer.to(device) for buffer in pair])
    seen = [0] * len(kinds)
    for index, layer in enumerate(layers):
        kind = kinds.index(layer)
        k, v = (buffer[:, seen[kind]].flatten(0, 1)[:end].transpose(0, 1)[None] for buffer in buffers[kind])
        past.update(k.contiguous(), v.contiguous(), index)
        seen[kind] += 1


def _piece(parent: str, ids: Sequence[int], start: int, past: Any, layers: Sequence[Kind]) -> Piece:
    end = min(start + PIECE_TOKENS, len(ids))
    places, pages = [], []
    for kind in kinds_of(layers):
        own = [past.layers[index] for index, layer in enumerate(layers) if layer == kind]
        count = -(-(end - start) // PAGE_SIZE)
        places.append(tuple(range(count)))
        pair = []
        for states in ([layer.keys for layer in own], [layer.values for layer in own]):
            rows = torch.stack([one[0, :, start:end].transpose(0, 1) for one in states])
            padded = rows.new_zeros((len(states), count * PAGE_SIZE, *rows.shape[2:]))
            padded[:, : rows.shape[1]] = rows
            pair.append(padded.unflatten(1, (count, PAGE_SIZE)).transpose(0, 1).cpu().contiguous())
        pages.append(tuple(pair))
    return Piece(parent, start, tuple(ids[start:end]), tuple(places), tuple(pages))


__all__ = ["Library"]
