"""Longformer self-attention (arXiv 2004.05150) over `hasten.attention`: a window, and global tokens.

`LongformerSelfAttention` is the layer for models of one's own; `attend` is what it computes, for any layer with the
same six projections, such as those of transformers (adapters/). Any length, any number of global tokens in each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import ArgumentError
from hasten.masks import Causal, Dense, Global, Mask, Window, from_longformer_window
from hasten.models.tokens import Tokens
from hasten.ops.attention import attention

PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True)
class Pattern:
    """What a layer's local queries see: `window` // 2 keys on each side, every `dilation`-th; only before if causal.

    window: as Hugging Face counts it, both sides together, even. dilation: one for all heads or one for each.
    """

    window: int
    dilation: int | tuple[int, ...] = 1
    is_causal: bool = False

    def mask(self) -> Window:
        """The band as a mask."""
        band = from_longformer_window(self.window)
        assert isinstance(band, Window)
        return Window(band.left, 0 if self.is_causal else band.right, self.dilation)


class LongformerSelfAttention(nn.Module):
    """Local and global attention in one layer, with the parameters of Hugging Face's under the same names.

    attention_window: keys that a local token sees beside its own, both sides together, an even number (a causal layer
    sees the half before it). dilation: of all heads, or a tuple with one for each. dropout: of probabilities, in
    training. Layers of one model may differ in all of these.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        attention_window: int,
        *,
        dilation: int | tuple[int, ...] = 1,
        is_causal: bool = False,
        dropout: float = 0.0,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ArgumentError("hidden_size", f"a multiple of {num_heads} heads", hidden_size, "change one of them")
        if isinstance(dilation, tuple) and len(dilation) != num_heads:
            expected = f"one value, or one for each of {num_heads} heads"
            raise ArgumentError("dilation", expected, repr(dilation), "1 means none")
        self.num_heads, self.dropout, self.implementation = num_heads, dropout, implementation
        self.pattern = Pattern(attention_window, dilation, is_causal)
        self.pattern.mask()  # an odd window is refused here
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.query_global, self.key_global, self.value_global = (nn.Linear(hidden_size, hidden_size) for _ in range(3))

    def forward(self, hidden_states: Tensor, tokens: Tokens | None = None) -> Tensor:
        """(batch, seqlen, hidden_size) -> the same; rows of padding are 0.

        tokens: `hasten.models.read_tokens(...)`, made once for all layers; None means that all are local.
        """
        dropout_p = self.dropout if self.training else 0.0
        return attend(self, hidden_states, tokens or Tokens(), self.pattern, dropout_p, self.implementation)


def attend(
    layer: Any, hidden_states: Tensor, tokens: Tokens, pattern: Pattern, dropout_p: float, implementation: str | None
) -> Tensor:
    """Longformer self-attention of a layer: (batch, seqlen, hidden_size) -> the same.

    layer: has `num_heads` and the projections query, key, value, query_global, key_global, value_global. Local
    queries see the real keys of their window and all global ones, in one softmax; global queries have projections
    of their own and see every real key. Padding gives 0. Without global tokens the global projections get gradients
    of 0, not None, so that data-parallel training finds them all.
    """
    call = _Call(layer, hidden_states, tokens, pattern, dropout_p, implementation)
    out = call.local()
    if tokens.is_real is not None:
        out = out.masked_fill(~tokens.is_real[:, :, None, None], 0.0)
    if tokens.is_global is None or (tokens.positions is not None and not tokens.room):
        out = out.flatten(2)
        if torch.is_grad_enabled() and layer.training:
            unused = (p for name in PROJECTIONS for p in getattr(layer, f"{name}_global").parameters())
            out = _untouched(out, *unused)
        return out
    return call.with_global(out).flatten(2)


@dataclass(frozen=True)
class _Call:
    """One forward of one layer. Heads are a dimension: (batch, tokens, num_heads, head_dim)."""

    layer: Any
    hidden_states: Tensor
    tokens: Tokens
    pattern: Pattern
    dropout_p: float
    implementation: str | None

    def project(self, name: str, hidden_states: Tensor) -> Tensor:
        projected: Tensor = getattr(self.layer, name)(hidden_states)
        return projected.unflatten(2, (self.layer.num_heads, -1))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, bias: Tensor | None = None) -> Tensor:
        """One call with the options of this layer."""
        out = attention(q, k, v, mask, bias=bias, dropout_p=self.dropout_p, implementation=self.implementation)
        assert isinstance(out, Tensor)
        return out

    def local(self) -> Tensor:
        """All queries as if they were local; what global ones and padding get means nothing."""
        tokens, band = self.tokens, self.pattern.mask()
        q, k, v = (self.project(name, self.hidden_states) for name in PROJECTIONS)
        if tokens.near is not None:
            return self._local_fixed(q, k, v, band, tokens.near)
        mask: Mask = band if tokens.columns is None else band | tokens.columns
        if self.pattern.is_causal and tokens.columns is not None:
            mask = mask & Causal()
        return self.attention(q, k, v, mask if tokens.keys is None else mask & tokens.keys)

    def _local_fixed(self, q: Tensor, k: Tensor, v: Tensor, band: Mask, near: Tensor) -> Tensor:
        """Global keys once more in front, where all see them, and hidden at their own places: no mask has values."""
        room = self.tokens.room
        if room and self.pattern.is_causal:
            hint = "leave global_capacity out, or set it to 0"
            raise ArgumentError("global_capacity", "0 in a causal layer", room, hint)
        if room:
            k, v = (torch.cat([_take(t, self.tokens), t], dim=1) for t in (k, v))
            band = band | Global(tuple(range(room)), queries=False)
        return self.attention(q, k, v, band, near)

    def with_global(self, out: Tensor) -> Tensor:
        """`out` with the rows of global queries, which are computed here, put in their places."""
        tokens, x = self.tokens, self.hidden_states
        k, v = self.project("key_global", x), self.project("value_global", x)
        causal = self.pattern.is_causal
        if (
            tokens.positions is None or tokens.holds is None
        ):  # any token may be global: rows of tiles without one are skipped
            assert tokens.is_global is not None
            mask: Mask = Global(tokens.is_global, keys=False)
            mask = mask & Causal() if causal else mask
            rows = self.attention(self.project("query_global", x), k, v, _and(mask, tokens.keys))
            return torch.where(tokens.is_global[:, :, None, None], rows, out)
        q = self.project("query_global", _take(x, tokens))
        before = None
        if causal:
            before = Dense((torch.arange(x.shape[1], device=x.device) <= tokens.positions[:, :, None])[:, None])
        rows = self.attention(q, k, v, _and(before, tokens.keys), tokens.far)
        index = _index(out, tokens.positions)
        rows = torch.where(tokens.holds[:, :, None, None], rows, out.gather(1, index))
        return out.scatter(1, index, rows)


def _and(one: Mask | None, other: Mask | None) -> Mask | None:
    return one if other is None else other if one is None else one & other


def _index(rows: Tensor, positions: Tensor) -> Tensor:
    """positions (batch, room) as an index of `rows` (batch, seqlen, ...) for gather and scatter."""
    shape = *positions.shape, *(1 for _ in rows.shape[2:])
    return positions.view(shape).expand(*positions.shape, *rows.shape[2:])


def _take(rows: Tensor, tokens: Tokens) -> Tensor:
    """(batch, seqlen, ...) -> (batch, room, ...): the rows at `tokens.positions`."""
    assert tokens.positions is not None
    return rows.gather(1, _index(rows, tokens.positions))


class _Untouched(torch.autograd.Function):
    """The first input as it is; parameters that took no part in it get gradients of 0."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return dout, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


_untouched: Any = _Untouched.apply
