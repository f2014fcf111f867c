"""How heads can be turned without changing the model, and which turn brings the heads of a group closest together.

A key head may be turned by R if its query heads are turned by R too: q·k stays. With rotary embedding R must commute
with the rotation by position: 2x2 rotations, one angle for each pair of channels (i, i + rotary_dim / 2). With a norm
and a gain between projection and score only the sign of each pair is free. A value head may be turned by any
orthogonal R if the output projection is turned back. Works on second moments, so that calibration text weighs what
really occurs; without text, all directions of the input weigh the same. Called by `merge`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hasten.convert.heads import Heads, Site

ROUNDS = 20


def moment(weights: Tensor, inputs: Tensor | None) -> Tensor:
    """Cross moments of heads: (heads, head_dim, width + 1) -> (heads, heads, head_dim, head_dim), float64.

    inputs: second moment of the layer's input, (width + 1, width + 1), the constant 1 of the bias last; None for the
    identity. Entry [i, j] is E[head_i(x) head_j(x)^T].
    """
    flat = weights.double().flatten(0, 1)
    seen = flat if inputs is None else flat @ inputs.double()
    size = weights.shape[1]
    return (seen @ flat.T).unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2)


def key_turn(site: Site, cross: Tensor) -> Tensor:
    """The allowed R with the largest trace(R @ cross), (..., head_dim, head_dim) each; turns a key towards another.

    cross: E[key target^T].
    """
    size, rotary = site.head_dim, site.rotary_dim
    if site.layout.has_norm:
        return torch.diag_embed(_pair_signs(cross, rotary))
    turn = torch.zeros_like(cross)
    if rotary:
        turn[..., :rotary, :rotary] = _pair_rotations(cross[..., :rotary, :rotary])
    if rotary < size:
        turn[..., rotary:, rotary:] = value_turn(cross[..., rotary:, rotary:])
    return turn


def value_turn(cross: Tensor) -> Tensor:
    """The orthogonal R with the largest trace(R @ cross): Procrustes. (..., size, size) each."""
    left, _, right = torch.linalg.svd(cross)
    return right.mT @ left.mT


def pair_correlation(cross: Tensor) -> Tensor:
    """Complex correlation of each rotary pair: (..., rotary_dim, rotary_dim) -> (..., rotary_dim / 2).

    A pair (a, b) is the number a + ib; entry p is E[key_p conj(target_p)].
    """
    half = cross.shape[-1] // 2
    parts = cross.unflatten(-1, (2, half)).unflatten(-3, (2, half))  # (..., 2, half, 2, half)
    aa, ab, ba, bb = (parts.select(-4, i).select(-2, j).diagonal(dim1=-2, dim2=-1) for i in (0, 1) for j in (0, 1))
    return torch.complex(aa + bb, ba - ab)


def _pair_rotations(cross: Tensor) -> Tensor:
    correlation = pair_correlation(cross)
    angle = -torch.angle(correlation)
    cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
    return torch.cat([torch.cat([cos, -sin], dim=-1), torch.cat([sin, cos], dim=-1)], dim=-2)


def _pair_signs(cross: Tensor, rotary: int) -> Tensor:
    """(..., head_dim) of ±1: one sign for a rotary pair, one for every other channel."""
    gain = cross.diagonal(dim1=-2, dim2=-1).clone()
    half = rotary // 2
    pairs = gain[..., :half] + gain[..., half:rotary]
    gain[..., :rotary] = torch.cat([pairs, pairs], dim=-1)
    return torch.where(gain < 0, -1.0, 1.0).to(cross)


def similarity(site: Site, keys: Tensor, values: Tensor) -> Tensor:
    """How close each two heads come after the best turn: (num_kv_heads, num_kv_heads), 2 for the same head.

    keys, values: `moment` of them. The sum of two correlations, one of keys and one of values.
    """
    total = torch.zeros(keys.shape[:2], dtype=keys.dtype, device=keys.device)
    for cross, turn in ((keys, key_turn(site, keys)), (values, value_turn(values))):
        power = cross.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).sum(-1).clamp(min=1e-30).sqrt()
        total += (turn * cross.mT).sum((-2, -1)) / (power[:, None] * power[None, :])
    return total


def turns(site: Site, moments: Tensor, members: list[int], *, is_key: bool) -> Tensor:
    """The turns that bring the heads of a group closest to their mean: (members, head_dim, head_dim).

    Generalised Procrustes: each head in turn is aligned with the mean of the others, which can only come closer.
    """
    inner = moments[members][:, members]  # (members, members, head_dim, head_dim)
    count = len(members)
    found = torch.eye(site.head_dim, dtype=moments.dtype, device=moments.device).repeat(count, 1, 1)
    for _ in range(ROUNDS):
        before = found.clone()
        for head in range(1, count):
            others = [other for other in range(count) if other != head]
            cross = (inner[head, others] @ found[others].mT).sum(0)  # E[head (sum of the others)^T]
            found[head] = key_turn(site, cross) if is_key else value_turn(cross)
        if (found - before).abs().max() < 1e-9:
            break
    return found


def turn(site: Site, heads: Heads, members: list[int], key_turns: Tensor, value_turns: Tensor) -> Heads:
    """The same layer with the key and value heads of `members` turned, and what reads them turned along."""
    q, k, v, o = (part.clone() for part in (heads.q, heads.k, heads.v, heads.o))
    for head, key, value in zip(members, key_turns.to(q), value_turns.to(q), strict=True):
        readers = slice(head * site.group_size, (head + 1) * site.group_size)
        k[head], q[readers] = key @ k[head], key @ q[readers]
        v[head], o[:, readers] = value @ v[head], o[:, readers] @ value.T
    return replace(heads, q=q, k=k, v=v, o=o)
