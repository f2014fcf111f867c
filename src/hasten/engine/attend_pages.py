"""The attention and mask functions of transformers for packed sequences whose K and V lie in pages.

A forward of the runner (batch_runner.py) gives its `Pages` to the model as a keyword; layers hand it on to `forward`
here, which writes the new K and V and attends. Without it, both functions are those of "hasten", so a model that
an engine serves still does everything else. Knows no request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from hasten.cache.paged import ENDLESS, PagedCache, PagedLayer, Tables
from hasten.engine import attend_cpu, attend_tiles
from hasten.engine.attend_cpu import DecodePlan
from hasten.engine.attend_tiles import TilePlan
from hasten.errors import ArgumentError
from hasten.masks import Mask, Window
from hasten.models import interface, masking, patterns
from hasten.models.masking import ModelMask
from hasten.ops.append import append_kv
from hasten.ops.decode import decode_attention
from hasten.ops.kv import PagedKV

NAME = "hasten-pages"
KEYWORD = "hasten_pages"


@dataclass(frozen=True, eq=False)
class Part:
    """Sequences [begin, end) of a forward that attend in one call, and their packed tokens [first, last).

    num_pages: columns of the page tables that they need. cu_seqlens_q: int32 (end - begin + 1,), where each sequence
    begins among these tokens, and the most tokens of one; None where each has one, which are then split over keys.
    """

    begin: int
    end: int
    first: int
    last: int
    num_pages: int
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int = 1


@dataclass(frozen=True, eq=False)
class Pages:
    """Where the sequences of one forward lie.

    tables: one for each kind of layer of the cache. cache_seqlens: int32 (batch,), the tokens of this forward with
    them. cu_seqlens_q: int32 (batch + 1,), where each sequence begins among the packed tokens. lengths: on the host,
    (new tokens, all tokens) of each sequence. plans: for each kind, what the first sequences see that have one new
    token, on a CPU only.
    """

    cache: PagedCache
    tables: tuple[Tables, ...]
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor | None
    lengths: tuple[tuple[int, int], ...]
    plans: tuple[DecodePlan | TilePlan | None, ...]
    parts: tuple[Part, ...]


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Write K and V of packed tokens into their pages and attend, causally, each sequence to its own.

    query (1, num_heads, total, head_dim), key and value (1, num_kv_heads, total, head_dim). Returns
    (out (1, total, num_heads, head_dim), None).
    """
    pages: Pages | None = others.pop(KEYWORD, None)
    if pages is None:
        others |= {"position_bias": position_bias, "softcap": softcap, "s_aux": s_aux}
        return interface.forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    if position_bias is not None or not isinstance(attention_mask, ModelMask):
        got = f"{type(module).__name__} with {'a bias' if position_bias is not None else 'a mask of its own'}"
        raise ArgumentError("model", "attention over a causal band", got, "use hasten.engine.generate for this model")
    layer = pages.cache.layers[module.layer_idx]
    mask, tables = attention_mask.mask, pages.tables[layer.kind]
    _check_window(mask, pages.cache.kinds[layer.kind].window, module)
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": s_aux}
    if tables.rows is not None:
        layer.write(tables.rows, k, v)
        out = _on_cpu(q, layer, tables, mask, pages, options)
    else:
        out = _on_device(q, k, v, layer.view(tables, pages.cache_seqlens), mask, pages, options)
    return out[None], None


def make_mask(
    *, kv_length: int, mask_function: patterns.MaskFunction = causal_mask_function, **options: Any
) -> ModelMask | Tensor:
    """The band that the mask function says, whatever the lengths; for other caches, the mask of "hasten"."""
    if kv_length != ENDLESS:
        return masking.make_mask(kv_length=kv_length, mask_function=mask_function, **options)
    if torch.compiler.is_compiling():
        pattern = masking.traced(mask_function, options.get("local_size"), False, None, options)
    else:
        pattern = patterns.read(mask_function)
    if pattern is None or pattern.starts is not None or pattern.right != 0:
        hint = "use hasten.engine.generate for this model"
        raise ArgumentError("model", "masks that are causal bands", "a mask function of its own", hint)
    return ModelMask(pattern.band(ENDLESS))


def _check_window(mask: Mask, window: int | None, module: nn.Module) -> None:
    """The mask must not reach what the cache gives back."""
    left = mask.left if isinstance(mask, Window) else None
    if window is not None and (left is None or left > window):
        expected = f"layer {module.layer_idx} to see {window} tokens before its own, as its configuration says"
        raise ArgumentError("model", expected, repr(mask), "use hasten.engine.generate for this model")


def _on_cpu(q: Tensor, layer: PagedLayer, tables: Tables, mask: Mask, pages: Pages, options: dict[str, Any]) -> Tensor:
    """Attention of packed q (total, num_heads, head_dim); returns the same shape."""
    plan = pages.plans[layer.kind]
    if isinstance(plan, TilePlan):
        return attend_tiles.decode(q, layer, plan, **options)
    num_single = 0 if plan is None else plan.batch
    outs = attend_cpu.extend(q[num_single:], layer, tables, pages.lengths[num_single:], num_single, mask, **options)
    if plan is not None:
        outs.insert(0, attend_cpu.decode(q[:num_single], layer, plan, **options))
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _on_device(
    q: Tensor, k: Tensor, v: Tensor, view: PagedKV, mask: Mask, pages: Pages, options: dict[str, Any]
) -> Tensor:
    """Write k and v, and attend; q and what is returned as in `_on_cpu`. Nothing waits for the device."""
    options["softmax_scale"] = options.pop("scale")
    if pages.cu_seqlens_q is None:
        append_kv(k[:, None], v[:, None], view)
    else:
        append_kv(k, v, view, cu_seqlens_q=pages.cu_seqlens_q)
    outs = [_part(q[part.first : part.last], view, mask, part, options) for part in pages.parts]
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _part(q: Tensor, view: PagedKV, mask: Mask, part: Part, options: dict[str, Any]) -> Tensor:
    """Attention of the packed tokens of a part; returns the shape of q."""
    rows = slice(part.begin, part.end)
    own = replace(view, block_table=view.block_table[rows, : part.num_pages], cache_seqlens=view.cache_seqlens[rows])
    if part.cu_seqlens_q is None:
        out = decode_attention(q[:, None], own, mask, **options)
        assert isinstance(out, Tensor)
        return out[:, 0]
    packed: dict[str, Any] = {"cu_seqlens_q": part.cu_seqlens_q, "max_seqlen_q": part.max_seqlen_q}
    out = decode_attention(q, own, mask, **options, **packed)
    assert isinstance(out, Tensor)
    return out


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, make_mask)

__all__ = ["KEYWORD", "NAME", "Pages", "Part", "forward", "make_mask"]
