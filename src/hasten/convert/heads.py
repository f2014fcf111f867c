"""Where the heads of an architecture lie in its weights: queries, keys, values and output, head by head.

One `Layout` an architecture, as data; `read` takes an attention layer apart into `Heads`, `write` puts it together
again, whatever the packing. Knows nothing of how heads are merged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hasten.errors import ArgumentError

SEPARATE, CONCATENATED, GROUPED = "separate", "concatenated", "grouped"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one architecture keeps its heads.

    sites: pattern of the paths of its attention layers; the first group is the layer. projections: the names of
    q, k and v, or of the one that holds them all. order: `separate`; `concatenated` (all q, all k, all v); `grouped`
    (for each k/v head: its q heads, k, v). is_transposed: weights are (in, out), as in Conv1D. is_rotary: q and k are
    rotated, the first half of the rotary channels against the second. has_norm: q and k are normalised per head, each
    channel with its own gain. has_shared_bias: one table of position biases, by head, serves the self-attention of
    all layers. num_heads: the name of their number in the configuration.
    """

    sites: str
    projections: tuple[str, ...]
    out: str
    order: str = SEPARATE
    is_transposed: bool = False
    is_rotary: bool = True
    has_norm: bool = False
    has_shared_bias: bool = False
    num_heads: str = "num_attention_heads"


_QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA = Layout(sites=r"\blayers\.(\d+)\.self_attn$", projections=_QKV, out="o_proj")
_NORMED = Layout(sites=_LLAMA.sites, projections=_QKV, out="o_proj", has_norm=True)
_PHI3 = Layout(sites=_LLAMA.sites, projections=("qkv_proj",), out="o_proj", order=CONCATENATED)
_GPT2 = Layout(
    sites=r"\bh\.(\d+)\.attn$",
    projections=("c_attn",),
    out="c_proj",
    order=CONCATENATED,
    is_transposed=True,
    is_rotary=False,
)
_BIGCODE = Layout(sites=_GPT2.sites, projections=("c_attn",), out="c_proj", order=CONCATENATED, is_rotary=False)
_NEOX = Layout(sites=r"\blayers\.(\d+)\.attention$", projections=("query_key_value",), out="dense", order=GROUPED)
_FALCON = Layout(sites=r"\bh\.(\d+)\.self_attention$", projections=("query_key_value",), out="dense", order=GROUPED)
_T5 = Layout(
    sites=r"\bdecoder\.block\.(\d+)\.layer\.(?:0\.SelfAttention|1\.EncDecAttention)$",
    projections=("q", "k", "v"),
    out="o",
    is_rotary=False,
    has_shared_bias=True,
)
_BART = Layout(
    sites=r"\bdecoder\.layers\.(\d+)\.(?:self_attn|encoder_attn)$",
    projections=_QKV,
    out="out_proj",
    is_rotary=False,
    num_heads="decoder_attention_heads",
)

#: model_type -> layout; a carried class (`<model_type>_gqa`) has the layout of its base unless it is listed, because
#: groups of different sizes cannot be interleaved
LAYOUTS: Mapping[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _NORMED,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _NORMED,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "gpt_bigcode": _BIGCODE,
    "gpt_neox": _NEOX,
    "falcon": _FALCON,
    "t5": _T5,
    "bart": _BART,
    "gpt_neox_gqa": replace(_NEOX, order=CONCATENATED),
    "falcon_gqa": replace(_FALCON, order=CONCATENATED),
}
CARRIED_SUFFIX = "_gqa"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One attention layer: `path` in the model, `layer` it belongs to, its sizes, and how its keys may be turned.

    rotary_dim: how many channels of a head, from the first, rotate with the position (0: none).
    may_permute: its query heads may trade places, because nothing outside q, k, v and o knows them by number.
    """

    path: str
    layer: int
    is_cross: bool
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    may_permute: bool
    layout: Layout

    @property
    def group_size(self) -> int:
        """Query heads for each key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Heads:
    """The projections of one attention layer, head by head, float32; the last column of q, k and v is the bias.

    q: (num_heads, head_dim, width + 1). k, v: (num_kv_heads, head_dim, width_kv + 1). o: (width, num_heads, head_dim).
    kv_index: the key/value head of each query head where groups are uneven or not contiguous; None where query head
    i reads head i // group_size.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    kv_index: tuple[int, ...] | None = None


def layout_of(config: Any) -> Layout:
    """The layout of a configuration's architecture; raises ArgumentError for one that is not known."""
    name = str(config.model_type)
    layout = LAYOUTS.get(name) or LAYOUTS.get(name.removesuffix(CARRIED_SUFFIX))
    if layout is None:
        known = ", ".join(one for one in LAYOUTS if not one.endswith(CARRIED_SUFFIX))
        hint = "the places of the heads of others are not written down in hasten.convert.heads"
        raise ArgumentError("model", f"one of {known}", name, hint)
    return layout


def sites(model: Any) -> list[Site]:
    """The attention layers whose keys and values are cached while decoding, in the order of the model.

    Those of an encoder are left out: they run once, in parallel (Ainslie 2023, 2.2). Raises ArgumentError for an
    architecture that is not known or a model without such layers.
    """
    config, layout = model.config, layout_of(model.config)
    if getattr(config, "add_cross_attention", False):
        hint = "convert the model without cross-attention"
        raise ArgumentError("model", f"{config.model_type} without cross-attention", "add_cross_attention=True", hint)
    if config.model_type == "gpt_bigcode" and not config.multi_query:
        hint = "its heads are interleaved in another way, which is not written down in hasten.convert.heads"
        raise ArgumentError("model", "a gpt_bigcode with multi_query=True", "multi_query=False", hint)
    found = [(name, re.search(layout.sites, name)) for name, _ in model.named_modules()]
    listed = [_site(model, layout, name, int(match[1])) for name, match in found if match]
    if not listed:
        got = f"{type(model).__name__}, which has none"
        raise ArgumentError("model", "a model with a decoder, whose K and V are cached", got, "give the whole model")
    return listed


def _site(model: Any, layout: Layout, path: str, layer: int) -> Site:
    config, attention = model.config, model.get_submodule(path)
    num_heads = getattr(config, layout.num_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    rows = [_num_rows(attention.get_submodule(name), layout) for name in layout.projections]
    num_kv_heads = rows[1] // head_dim if len(rows) == 3 else (rows[0] // head_dim - num_heads) // 2
    is_cross = path.endswith(("EncDecAttention", "encoder_attn"))
    has_alibi = bool(getattr(config, "alibi", False))
    return Site(
        path=path,
        layer=layer,
        is_cross=is_cross,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=_rotary_dim(config, head_dim) if layout.is_rotary and not has_alibi else 0,
        may_permute=not has_alibi and (is_cross or not layout.has_shared_bias),
        layout=layout,
    )


def _num_rows(linear: Any, layout: Layout) -> int:
    return int(linear.weight.shape[1 if layout.is_transposed else 0])


def _rotary_dim(config: Any, head_dim: int) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def read(site: Site, state: Mapping[str, Tensor]) -> Heads:
    """Take one attention layer apart. state: the model's state dict."""
    layout, size = site.layout, site.head_dim
    rows = [_rows(site, name, state) for name in layout.projections]
    num_q, num_kv = site.num_heads, site.num_kv_heads
    if layout.order == GROUPED:
        grouped = rows[0].unflatten(0, (num_kv, site.group_size + 2, size))  # (kv heads, q heads + 2, …)
        q, k, v = grouped[:, :-2].flatten(0, 1), grouped[:, -2], grouped[:, -1]
    else:
        whole = rows if layout.order == SEPARATE else list(rows[0].split([num_q * size, num_kv * size, num_kv * size]))
        q, k, v = (part.unflatten(0, (-1, size)) for part in whole)
    out = state[f"{site.path}.{layout.out}.weight"].float()
    out = out.T if layout.is_transposed else out  # (width, num_heads * head_dim)
    return Heads(q, k, v, out.unflatten(1, (num_q, size)))


def _rows(site: Site, name: str, state: Mapping[str, Tensor]) -> Tensor:
    """(rows, width + 1) float32: the weight of a projection, then its bias or zeros."""
    weight = state[f"{site.path}.{name}.weight"].float()
    weight = weight.T if site.layout.is_transposed else weight
    bias = state.get(f"{site.path}.{name}.bias")
    column = torch.zeros_like(weight[:, :1]) if bias is None else bias.float()[:, None]
    return torch.cat([weight, column], dim=1)


def write(site: Site, heads: Heads, state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The tensors of an attention layer that `heads` describes, packed by `layout`.

    state: the state dict that the layer was read from; it says which projections have a bias, and the dtypes.
    """
    if layout.order == SEPARATE:
        rows = [part.flatten(0, 1) for part in (heads.q, heads.k, heads.v)]
    elif layout.order == CONCATENATED:
        rows = [torch.cat([heads.q, heads.k, heads.v]).flatten(0, 1)]
    else:
        grouped = heads.q.unflatten(0, (heads.k.shape[0], -1))  # (num_kv_heads, group_size, head_dim, width + 1)
        rows = [torch.cat([grouped, heads.k[:, None], heads.v[:, None]], dim=1).flatten(0, 2)]
    made: dict[str, Tensor] = {}
    for name, part in zip(layout.projections, rows, strict=True):
        _put(made, state, f"{site.path}.{name}.weight", part[:, :-1].T if layout.is_transposed else part[:, :-1])
        if f"{site.path}.{name}.bias" in state:
            _put(made, state, f"{site.path}.{name}.bias", part[:, -1])
    out = heads.o.flatten(1, 2)
    _put(made, state, f"{site.path}.{layout.out}.weight", out.T if layout.is_transposed else out)
    return made


def _put(made: dict[str, Tensor], state: Mapping[str, Tensor], name: str, value: Tensor) -> None:
    made[name] = value.to(state[name].dtype).contiguous()
