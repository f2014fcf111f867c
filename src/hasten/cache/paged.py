"""K and V in pages: the tensors of the pools, and the `transformers.Cache` under whose name models see them.

Which page belongs to whom is the ledger's business (ledger.py); which of them a forward reads and writes is in its
`Tables`. Called by the engine's runner; knows no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from hasten.cache.ledger import Ledger
from hasten.cache.pages import Copy
from hasten.cache.static import KVCache
from hasten.errors import ArgumentError
from hasten.ops.kv import PAGE_SIZES, QUANTIZED, PagedKV

# how many keys masks are made for: a sequence in pages has no length that is known when the mask is made
ENDLESS = 2**31 - 1


@dataclass(frozen=True)
class Kind:
    """What layers that share their page tables have in common.

    window: how many tokens before its own a token sees, None for all. Shapes are those of K and V of one token.
    """

    window: int | None
    num_kv_heads: int
    head_dim: int
    head_dim_v: int


@dataclass(frozen=True, eq=False)
class Tables:
    """Where the sequences of one forward lie in the pages of one kind of layer.

    block_table: int32 (batch, max_pages). rows: int64 (total,), the place of each new token in the first layer's pages,
    counted over the whole pool (`PagedLayer.write`); on a CPU only.
    """

    block_table: Tensor
    rows: Tensor | None = None


class PagedLayer(CacheLayerMixin):
    """K and V of one layer: key_pages and value_pages (1 + num_pages, page_size, num_kv_heads, head_dim).

    pools: K and V of all layers of its kind, (1 + num_pages, layers, page_size, num_kv_heads, head_dim), in which this
    is layer `place`: what one page holds of all of them lies together, to be moved at once. With 8-bit K and V also
    their scales, float32 (1 + num_pages, layers, page_size, num_kv_heads).

    `update` gives the new states back as they are: the attention function writes them, for it knows the tables.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self, kind: int, pools: Sequence[Tensor], place: int) -> None:
        super().__init__()
        self.kind, self.place = kind, place
        self.pools = (pools[0], pools[1])
        self.key_pages, self.value_pages, *self.scales = (pool[:, place] for pool in pools)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The states of the new tokens, unchanged."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """0: sequences have lengths of their own, and positions are given to the model."""
        return 0

    def get_max_length(self) -> int:
        """-1: no length of its own."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As many keys as there could be, from the first."""
        return ENDLESS, 0

    def write(self, rows: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        """Put K and V (total, num_kv_heads, head_dim) of new tokens into the rows that `Tables` give, on a CPU."""
        rows = rows + self.place * self.key_pages.shape[1]
        for pool, states in zip(self.pools, (key_states, value_states), strict=True):
            # one copy of rows in flat memory: 10 times faster than an index of pages and one of places
            pool.flatten(0, 2).index_copy_(0, rows, states)

    def gather(self, pages: Tensor, buffers: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """K and V of pages int64 (count,), each (count, page_size, num_kv_heads, head_dim), in `buffers` if given."""
        places = pages * self.pools[0].shape[1] + self.place
        keys, values = (pool.flatten(0, 1) for pool in self.pools)
        if buffers is None:
            return keys.index_select(0, places), values.index_select(0, places)
        for pool, buffer in zip((keys, values), buffers, strict=True):
            torch.index_select(pool, 0, places, out=buffer)
        return buffers

    def view(self, tables: Tables, cache_seqlens: Tensor) -> PagedKV:
        """What attention reads."""
        return PagedKV(self.key_pages, self.value_pages, tables.block_table, cache_seqlens, *self.scales)


class PagedCache(Cache):
    """Pools of pages for every layer of a model. Given to its forward as `past_key_values`.

    layers: the kind of each layer. num_pages: for each of `kinds`, beside the null page. dtype: of K and V as the model
    has them; stored: as they are kept, int8 or float8_e4m3fn with a scale for each token and head, None for `dtype`.
    Raises ArgumentError that says what would fit if the memory is not there.
    """

    def __init__(
        self,
        layers: Sequence[Kind],
        num_pages: Sequence[int],
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        stored: torch.dtype | None = None,
    ) -> None:
        if page_size not in PAGE_SIZES:
            raise ArgumentError("page_size", f"one of {PAGE_SIZES}", page_size, "32 is a good one")
        self.kinds = kinds_of(layers)
        self.page_size, self.dtype, self.num_pages = page_size, dtype, tuple(num_pages)
        self.stored = dtype if stored is None else stored
        self.pools: list[list[Tensor]] = []  # for each kind K, V and, of 8 bits, their scales, as in `PagedLayer`
        for kind, count in zip(self.kinds, num_pages, strict=True):
            sizes = (1 + count, list(layers).count(kind), page_size, kind.num_kv_heads)
            shapes: list[tuple[tuple[int, ...], torch.dtype]]
            shapes = [((*sizes, dim), self.stored) for dim in (kind.head_dim, kind.head_dim_v)]
            shapes += [(sizes, torch.float32)] * (2 if self.is_quantized else 0)
            self.pools.append([_allocate(shape, one, device) for shape, one in shapes])
        views: list[CacheLayerMixin] = []
        seen = [0] * len(self.kinds)
        for layer in layers:
            number = self.kinds.index(layer)
            views.append(PagedLayer(number, self.pools[number], seen[number]))
            seen[number] += 1
        super().__init__(layers=views)

    def ledger(self) -> Ledger:
        """An accountant for these pools, all pages free."""
        return Ledger([kind.window for kind in self.kinds], self.num_pages, self.page_size)

    @property
    def is_quantized(self) -> bool:
        """True if K and V are kept in 8 bits, with scales."""
        return self.stored in QUANTIZED

    def copy(self, copies: Sequence[Sequence[Copy]]) -> None:
        """Copy pages, by kind, in every layer: all are read before one is written."""
        for pools, wanted in zip(self.pools, copies, strict=True):
            if wanted:
                places = torch.tensor(wanted, pin_memory=pools[0].is_cuda)  # so that nothing waits for the device
                sources, targets = places.to(pools[0].device, non_blocking=True).unbind(1)
                for pool in pools:
                    flat = pool.view(torch.uint8) if pool.dtype in QUANTIZED else pool
                    flat[targets] = flat[sources]

    def read_pages(self, kind: int, pages: Sequence[int]) -> list[Tensor]:
        """What pages of a kind hold, a copy on the host of each of its `pools`, (pages, layers, page_size, ...)."""
        places = torch.tensor(pages, dtype=torch.int64, device=self.pools[kind][0].device)
        return [_bytes_of(pool).index_select(0, places).cpu().view(pool.dtype) for pool in self.pools[kind]]

    def write_pages(self, kind: int, pages: Sequence[int], contents: Sequence[Tensor]) -> None:
        """Put into pages what `read_pages` gave."""
        places = torch.tensor(pages, dtype=torch.int64, device=self.pools[kind][0].device)
        for pool, content in zip(self.pools[kind], contents, strict=True):
            _bytes_of(pool).index_copy_(0, places, _bytes_of(content).to(pool.device))

    @property
    def page_nbytes(self) -> tuple[int, ...]:
        """Bytes of one page, over all layers of a kind, by kind."""
        return tuple(sum(pool[0].nbytes for pool in pools) for pools in self.pools)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.nbytes for pools in self.pools for pool in pools)


def _bytes_of(pool: Tensor) -> Tensor:
    """A view of which rows can be copied: there is no such copy of 8-bit floats."""
    return pool.view(torch.uint8) if pool.dtype in QUANTIZED else pool


def _allocate(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    try:
        # zeros, not empty: what was never written holds no NaN, and costs nothing on a CPU until it is
        return torch.zeros(sizes, dtype=dtype, device=device)
    except RuntimeError as error:  # torch's out-of-memory errors, of a CPU and of a GPU
        if "memory" not in str(error):
            raise
        got = f"{sizes[0] - 1} pages, whose K or V alone takes {prod(sizes) * dtype.itemsize / 2**30:,.1f} GiB"
        hint = f"{free_bytes(device) / 2**30:,.1f} GiB are free: give fewer pages or memory_bytes"
        raise ArgumentError("num_pages", "pages that fit in memory", got, hint) from error


def kinds_of(layers: Sequence[Kind]) -> tuple[Kind, ...]:
    """The different kinds, in the order of their first layers."""
    return tuple(dict.fromkeys(layers))


def page_bytes(layers: Sequence[Kind], kind: Kind, page_size: int, dtype: torch.dtype) -> int:
    """What one page of a kind takes, over all its layers, with K and V kept in `dtype`."""
    scales = 2 * 4 if dtype in QUANTIZED else 0
    per_token = kind.num_kv_heads * ((kind.head_dim + kind.head_dim_v) * dtype.itemsize + scales)
    return list(layers).count(kind) * page_size * per_token


def free_bytes(device: torch.device | str) -> int:
    """Memory that a cache could take on a device; of a CPU, all of the machine's that is free."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo", encoding="ascii") as file:
        facts = dict(line.split(":", 1) for line in file)
    return int(facts["MemAvailable"].split()[0]) * 1024


@torch.inference_mode()
def layers_of(model: Any) -> list[Kind]:
    """The kind of every layer of a decoder, found in its configuration and by giving it one token.

    Raises ArgumentError for a model that keeps something else than K and V of past tokens.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        hint = "use hasten.engine.generate, one request at a time"
        raise ArgumentError("model", "a decoder-only model", f"{name}, an encoder-decoder", hint)
    hint = "use transformers' own generate"
    planned = DynamicCache(config=config).layers
    strange = {type(one).__name__ for one in planned} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if strange or "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        got = f"{name} with {', '.join(sorted(strange)) or 'chunked attention'}"
        raise ArgumentError("model", "layers that keep K and V, of all tokens or of a window", got, hint)
    probe = KVCache(1)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=probe, use_cache=True)
    if not probe.layers or probe.length != 1:
        raise ArgumentError("model", "a model that uses the cache it is given", name, hint)
    found = []
    for index, layer in enumerate(probe.layers):
        window = getattr(planned[index], "sliding_window", None) if index < len(planned) else None
        _, num_kv_heads, _, head_dim = layer.key_buffer.shape
        kind = Kind(None if window is None else window - 1, num_kv_heads, head_dim, layer.value_buffer.shape[3])
        found.append(kind)
    return found


__all__ = ["Kind", "PagedCache", "PagedLayer", "Tables", "free_bytes", "kinds_of", "layers_of", "page_bytes"]
