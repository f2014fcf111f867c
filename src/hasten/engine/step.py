"""The decode step of a model as a flat graph: one token and its position in, logits out, K and V in the cache.

`record` runs the model's own forward once, for a real token, and writes it down. The graph serves every length:
it holds no mask and no view of the cache, only calls of `attend` and `attend_encoder`, which see how far the
cache is filled when they run. Called by `runner`; knows no request and no sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from hasten.cache import EncoderDecoderKVCache, KVCache, KVLayer
from hasten.engine.attend import HALVES, attend, attend_encoder
from hasten.engine.layout import lay_out
from hasten.engine.recorder import NotRecordable, Recorder
from hasten.masks import Causal, Full, Mask, Window
from hasten.models import patterns
from hasten.models.accelerate import set_implementation
from hasten.models.masking import ModelMask

NAME = "hasten-step"


class RecordedStep:
    """The decode step of one model; call it with a token id and the cache it continues."""

    def __init__(self, graph: fx.GraphModule, token: Tensor, position: Tensor) -> None:
        self.graph, self._token, self._position = graph, token, position
        is_half = any(parameter.dtype in HALVES for parameter in graph.parameters())
        self._is_half_on_cpu = is_half and token.device.type == "cpu"

    def __call__(self, token: int, cache: KVCache | EncoderDecoderKVCache) -> Tensor:
        """Append one token to the cache; returns its logits (1, 1, vocab)."""
        self._token.fill_(token)
        self._position.fill_(cache.length)
        if not self._is_half_on_cpu:
            return self._run(cache)
        # PyTorch's own product of a half-precision matrix with one row is 2 to 3 times faster than oneDNN's
        onednn: Any = torch.backends.mkldnn
        before, onednn.enabled = onednn.enabled, False
        try:
            return self._run(cache)
        finally:
            onednn.enabled = before

    def _run(self, cache: KVCache | EncoderDecoderKVCache) -> Tensor:
        logits: Tensor = self.graph(self._token, self._position, *_parts(cache))
        return logits


def record(
    forward: Callable[..., Tensor],
    model: Any,
    token: int,
    cache: KVCache | EncoderDecoderKVCache,
    max_length: int,
    may_lay_out: bool,
) -> tuple[Tensor, RecordedStep]:
    """(logits of `token`, which is appended to the cache; the step for the tokens after it).

    forward(ids (1, 1), cache, attention_mask) calls the model. max_length: no cache given to the step will
    hold more tokens. may_lay_out: weights may be moved in memory (layout.py). The model is left as it was.

    Raises NotRecordable if the model does what a flat graph cannot repeat; the cache may then be filled in
    some layers.
    """
    previous = {part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)}
    if len(previous) > 1:
        raise NotRecordable(f"its parts attend by {', '.join(sorted(map(str, previous)))}")
    device = next(model.parameters()).device
    ids, position = torch.tensor([[token]], device=device), torch.tensor(cache.length, device=device)
    recorder = Recorder()
    recorder.input("token", ids)
    recorder.input("position", position)
    nodes = (recorder.input("cache"), recorder.input("encoder_cache"))
    watched = _watch(recorder, position, cache, nodes, max_length)
    set_implementation(model, NAME)
    try:
        with recorder:
            logits = forward(ids, watched, ModelMask(Causal()))
    finally:
        set_implementation(model, previous.pop())
    if any(layer.states is not None for layer in _own_layers(watched)):
        raise NotRecordable("a layer wrote to the cache and attended by another function")
    recorder.finish(logits)
    if may_lay_out:
        lay_out(recorder.graph, recorder.root)
    return logits, RecordedStep(fx.GraphModule(recorder.root, recorder.graph), ids, position)


def _parts(cache: KVCache | EncoderDecoderKVCache) -> tuple[KVCache, KVCache | None]:
    if isinstance(cache, EncoderDecoderKVCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return cache, None


def _watch(
    recorder: Recorder,
    position: Tensor,
    cache: KVCache | EncoderDecoderKVCache,
    nodes: tuple[fx.Node, fx.Node],
    max_length: int,
) -> Cache:
    """The cache as the model sees it while it is recorded: as long as can be, and filled as far as a tensor says."""
    own, cross = _parts(cache)
    layers: list[CacheLayerMixin] = []
    for index, store in enumerate(own.layers):
        shape = (*store.key_buffer.shape[:2], max_length)
        keys, values = (buffer.new_zeros(()).expand(*shape, buffer.shape[3]) for buffer in _buffers(store))
        layers.append(_OwnLayer(recorder, nodes[0], own, index, keys, values, position))
    if cross is None:
        return Cache(layers=layers)
    others: list[CacheLayerMixin] = [
        _EncoderLayer(recorder, nodes[1], cross, index, store.keys, store.values, position)
        for index, store in enumerate(cross.layers)
    ]
    watched = EncoderDecoderCache(Cache(layers=layers), Cache(layers=others))
    watched.is_updated = dict.fromkeys(range(len(others)), True)
    return watched


def _own_layers(watched: Cache) -> list[_OwnLayer]:
    own = watched.self_attention_cache if isinstance(watched, EncoderDecoderCache) else watched
    return [layer for layer in own.layers if isinstance(layer, _OwnLayer)]


def _buffers(store: KVLayer) -> tuple[Tensor, Tensor]:
    return store.key_buffer, store.value_buffer


class _WatchedLayer(CacheLayerMixin):
    """Stands for a KVLayer in the recorded run; its `keys` know it, and so tell the attention function of it."""

    is_compileable = False
    is_sliding = False

    def __init__(
        self,
        recorder: Recorder,
        node: fx.Node,
        cache: KVCache,
        index: int,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
    ) -> None:
        super().__init__()
        self.recorder, self.node, self.cache, self.index = recorder, node, cache, index
        self.keys, self.values, self._position = keys, values, position
        self.keys.layer = self  # type: ignore[attr-defined]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused where nothing new may come."""
        raise NotRecordable("the encoder's keys are computed again")

    def get_seq_length(self) -> Any:
        """The position, as a tensor, so that what the model makes of it is recorded."""
        return self._position

    def get_max_length(self) -> int:
        """How many tokens there can be."""
        return int(self.keys.shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As many keys as there can be, from the first."""
        return int(self.keys.shape[2]), 0


class _OwnLayer(_WatchedLayer):
    """Keys of the tokens so far; the new ones are kept until the attention, which writes them."""

    states: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the states of the new token; returns keys and values that stand for all."""
        self.states = (key_states, value_states)
        return self.keys, self.values

    def attend(self, query: Tensor, bias: Any, sinks: Any, scale: float, left: int | None, softcap: Any) -> Tensor:
        """Run `attend` and record the call."""
        if self.states is None:
            raise NotRecordable("a layer attends without a new key")
        states, self.states = self.states, None
        arguments = (self.node, self.index, query, *states, bias, sinks, scale, left, softcap)
        return self.recorder.call(attend, *arguments, live={0: self.cache})


class _EncoderLayer(_WatchedLayer):
    """Keys of the encoder's tokens, which do not change."""

    def attend(self, query: Tensor, bias: Any, sinks: Any, scale: float, left: int | None, softcap: Any) -> Tensor:
        """Run `attend_encoder` and record the call."""
        if left is not None:
            raise NotRecordable("a window over the encoder's keys")
        arguments = (self.node, self.index, query, bias, sinks, scale, softcap)
        return self.recorder.call(attend_encoder, *arguments, live={0: self.cache})


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers while a step is recorded."""
    layer = getattr(key, "layer", None)
    if not isinstance(layer, _OwnLayer | _EncoderLayer):
        raise NotRecordable(f"{type(module).__name__} attends to keys that it did not get from the cache")
    if isinstance(attention_mask, ModelMask):
        left = _left(attention_mask.mask)
    elif attention_mask is None:
        left = None if sliding_window is None else sliding_window - 1
    else:
        raise NotRecordable(f"{type(module).__name__} makes its own mask")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return layer.attend(query, position_bias, s_aux, scale, left, softcap), None


def _mask(*sizes: Any, mask_function: Any, kv_length: int, **options: Any) -> ModelMask:
    """The mask function of transformers while a step is recorded: what the last token sees, wherever it is."""
    pattern = patterns.read(mask_function)
    if pattern is None or pattern.starts is not None:
        raise NotRecordable("its mask is not a band")
    return ModelMask(pattern.band(kv_length))


def _left(mask: Mask) -> int | None:
    """How many tokens before its own the last token sees; None is all."""
    if isinstance(mask, Window) and mask.dilation == 1 and mask.right == 0:
        return mask.left
    if isinstance(mask, Causal | Full):
        return None
    raise NotRecordable(f"its mask is {mask}")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
