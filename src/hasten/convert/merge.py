"""Fewer key/value heads for one attention layer: which heads become one, and what that one is.

`mean`, `first` and `random` are the paper's (Ainslie 2023, 3.2.1). `aligned` turns the heads of a group towards each
other before the mean. `factored` chooses the shared head and what each query head makes of it by least squares.
Called by `gqa`; knows tensors and sizes, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hasten.convert import align
from hasten.convert.heads import Heads, Site

METHODS = ("mean", "first", "random", "aligned", "factored")
GROUPS = ("contiguous", "clustered", "uneven")

Members = list[list[int]]


def merge(
    site: Site,
    heads: Heads,
    num_kv_heads: int,
    *,
    method: str,
    groups: str,
    inputs: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> Heads:
    """One layer with `num_kv_heads` key/value heads.

    inputs: second moments of what q and what k and v read, (width + 1, width + 1) each, the bias's constant 1 last;
    None weighs all directions the same. groups: `contiguous` as the heads stand; `clustered`, equal sizes, by
    similarity; `uneven`, any sizes, by similarity. Query heads trade places where the layer allows it and groups are
    of one size; otherwise the result has a `kv_index`.
    """
    members = choose_groups(site, heads, num_kv_heads, groups, inputs)
    merged = _METHODS[method](site, heads, members, inputs, seed)
    if members == _contiguous(heads.k.shape[0], num_kv_heads):
        return merged
    if site.may_permute and len({len(group) for group in members}) == 1:
        return _in_order(site, merged, members)
    home = {head: group for group, heads_of in enumerate(members) for head in heads_of}
    return replace(merged, kv_index=tuple(home[i // site.group_size] for i in range(site.num_heads)))


def expand(heads: Heads, kv_index: Sequence[int]) -> Heads:
    """The same layer with a key/value head for every query head. kv_index: which one each reads."""
    index = torch.tensor(kv_index, device=heads.k.device)
    return replace(heads, k=heads.k[index], v=heads.v[index], kv_index=None)


def _contiguous(num_old: int, num_new: int) -> Members:
    return [list(part) for part in torch.arange(num_old).view(num_new, -1).tolist()]


def _in_order(site: Site, heads: Heads, members: Members) -> Heads:
    """Query heads sorted by the group they belong to."""
    readers = [
        head * site.group_size + reader for group in members for head in group for reader in range(site.group_size)
    ]
    return replace(heads, q=heads.q[readers], o=heads.o[:, readers])


# ---- which heads become one


def choose_groups(
    site: Site, heads: Heads, num_kv_heads: int, groups: str, inputs: tuple[Tensor, Tensor] | None
) -> Members:
    """Lists of key/value heads, one list for each head of the result."""
    count = heads.k.shape[0]
    if groups == "contiguous" or num_kv_heads in (1, count):
        return _contiguous(count, num_kv_heads)
    seen = None if inputs is None else inputs[1]
    close = align.similarity(site, align.moment(heads.k, seen), align.moment(heads.v, seen))
    return _uneven(close, num_kv_heads) if groups == "uneven" else _balanced(close, num_kv_heads)


def _uneven(close: Tensor, num_groups: int) -> Members:
    """Average linkage: join the two groups that are closest until `num_groups` are left."""
    members = [[head] for head in range(close.shape[0])]
    while len(members) > num_groups:
        pairs = [(i, j) for i in range(len(members)) for j in range(i)]
        i, j = max(pairs, key=lambda pair: float(close[members[pair[0]]][:, members[pair[1]]].mean()))
        members[j] = sorted(members[j] + members.pop(i))
    return sorted(members)


def _balanced(close: Tensor, num_groups: int) -> Members:
    """Groups of one size with the largest similarity inside that exchanging two heads at a time can reach."""
    members = _contiguous(close.shape[0], num_groups)
    table = close.tolist()

    def bond(head: int, group: list[int], without: int) -> float:
        return sum(table[head][other] for other in group if other not in (head, without))

    is_better = True
    while is_better:
        is_better = False
        for left in range(num_groups):
            for right in range(left):
                for i, a in enumerate(members[left]):
                    for j, b in enumerate(members[right]):
                        now = bond(a, members[left], a) + bond(b, members[right], b)
                        then = bond(a, members[right], b) + bond(b, members[left], a)
                        if then > now + 1e-9:
                            members[left][i], members[right][j] = b, a
                            is_better, a = True, b
    return sorted(sorted(group) for group in members)


# ---- what the one is


def _mean(site: Site, heads: Heads, members: Members, inputs: object, seed: int) -> Heads:
    k, v = (torch.stack([part[group].mean(0) for group in members]) for part in (heads.k, heads.v))
    return replace(heads, k=k, v=v)


def _first(site: Site, heads: Heads, members: Members, inputs: object, seed: int) -> Heads:
    chosen = [group[0] for group in members]
    return replace(heads, k=heads.k[chosen], v=heads.v[chosen])


def _random(site: Site, heads: Heads, members: Members, inputs: object, seed: int) -> Heads:
    """Heads drawn anew with the spread of the old weights; their bias is zero, as where models begin."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for part in (heads.k, heads.v):
        new = torch.randn(len(members), *part.shape[1:], generator=generator).to(part) * part[..., :-1].std()
        new[..., -1] = 0
        made.append(new)
    return replace(heads, k=made[0], v=made[1])


def _aligned(site: Site, heads: Heads, members: Members, inputs: tuple[Tensor, Tensor] | None, seed: int) -> Heads:
    """Turn the heads of each group towards each other, which changes nothing, then take the mean."""
    seen = None if inputs is None else inputs[1]
    keys, values = align.moment(heads.k, seen), align.moment(heads.v, seen)
    for group in members:
        key_turns = align.turns(site, keys, group, is_key=True)
        heads = align.turn(site, heads, group, key_turns, align.turns(site, values, group, is_key=False))
    return _mean(site, heads, members, inputs, seed)


def _factored(site: Site, heads: Heads, members: Members, inputs: tuple[Tensor, Tensor] | None, seed: int) -> Heads:
    """The shared head and the maps to each reader with the least squared error of scores and of outputs.

    Values: o_i v_j is a matrix of rank head_dim; the best shared right factor of all readers is a truncated SVD.
    Keys the same with q_i in the place of o_i where keys may be mixed freely; with rotary embedding each pair of
    channels is a complex number, a reader may scale it by a complex factor, and the best shared one is an SVD of
    rank one. Keys behind a norm are aligned instead.
    """
    if site.layout.has_norm:
        heads = replace(_aligned(site, heads, members, inputs, seed), v=heads.v, o=heads.o)
        return _factor(site, heads, members, inputs, parts="v")
    return _factor(site, heads, members, inputs, parts="kv")


def _factor(site: Site, heads: Heads, members: Members, inputs: tuple[Tensor, Tensor] | None, *, parts: str) -> Heads:
    seen_q, seen_kv = (None, None) if inputs is None else inputs
    q, o = heads.q.double().clone(), heads.o.double().clone()
    keys, values = align.moment(heads.k, seen_kv), align.moment(heads.v, seen_kv)
    new_k, new_v = [], []
    for group in members:
        readers = [range(head * site.group_size, (head + 1) * site.group_size) for head in group]
        weights = torch.stack([torch.einsum("whd,whe->de", o[:, list(r)], o[:, list(r)]) for r in readers])
        shared, back = _best_subspace(values[group][:, group], weights)
        new_v.append(_combine(shared, heads.v[group].double()))
        for r, away in zip(readers, back, strict=True):
            o[:, list(r)] = o[:, list(r)] @ away
        if "k" not in parts:
            continue
        weights = torch.stack([_reader_moment(q[list(r)], seen_q) for r in readers])
        shared, back = _key_factors(site, keys[group][:, group], weights)
        new_k.append(_combine(shared, heads.k[group].double()))
        for r, away in zip(readers, back, strict=True):
            q[list(r)] = away.mT @ q[list(r)]
    k = torch.stack(new_k).to(heads.k) if new_k else heads.k
    return Heads(q.to(heads.q), k, torch.stack(new_v).to(heads.v), o.to(heads.o))


def _reader_moment(q: Tensor, inputs: Tensor | None) -> Tensor:
    """(readers, head_dim, width + 1) -> (head_dim, head_dim): sum of E[q q^T]."""
    seen = q if inputs is None else q @ inputs.double()
    return (seen @ q.mT).sum(0)


def _combine(shared: Tensor, old: Tensor) -> Tensor:
    """The shared head out of the old ones: (members, head_dim, head_dim), (members, head_dim, width + 1)."""
    return (shared @ old).sum(0)


def _best_subspace(cross: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(shared, back), each (members, size, size): head' = sum_j shared_j head_j, head_j ≈ back_j head'.

    cross: (members, members, size, size), E[head_i head_j^T]. weights: (members, size, size), how much the readers of
    a head make of each direction. Minimises the sum of |weights_j^(1/2) (head_j - back_j head')|².
    """
    count, size = weights.shape[:2]
    root, inverse = _roots(weights)
    stacked = (root[:, None] @ cross @ root[None]).transpose(1, 2).reshape(count * size, count * size)
    _, vectors = torch.linalg.eigh(stacked)
    best = vectors[:, -size:].unflatten(0, (count, size))  # (members, size, size)
    return _scaled(best.mT @ root, inverse @ best, cross)


def _roots(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of positive matrices and their inverses; directions nobody reads stay finite."""
    values, vectors = torch.linalg.eigh(weights)
    values = torch.maximum(values, 1e-9 * values.amax(-1, keepdim=True).amax(-2, keepdim=True)).clamp(min=1e-30).sqrt()
    return vectors * values[..., None, :] @ vectors.mT, vectors / values[..., None, :] @ vectors.mT


def _scaled(shared: Tensor, back: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """The same factors with the shared head as large as the old ones were, so that training finds familiar scales."""
    power = torch.einsum("iab,ijbc,jac->", shared, cross, shared)
    wanted = cross.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).sum() / cross.shape[0]
    scale = (wanted / power.clamp(min=1e-30)).sqrt()
    return shared * scale, back / scale


def _key_factors(site: Site, cross: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As `_best_subspace`, for keys: rotary pairs by complex factors, the other channels freely."""
    size, rotary = site.head_dim, site.rotary_dim
    shared = torch.zeros_like(weights)
    back = torch.zeros_like(weights)
    if rotary:
        block = slice(0, rotary)
        shared[:, block, block], back[:, block, block] = _best_pairs(cross[..., block, block], weights[:, block, block])
    if rotary < size:
        block = slice(rotary, size)
        shared[:, block, block], back[:, block, block] = _best_subspace(
            cross[..., block, block], weights[:, block, block]
        )
    return shared, back


def _best_pairs(cross: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Complex rank one for every pair of channels, written as real matrices."""
    half = cross.shape[-1] // 2
    correlation = align.pair_correlation(cross).permute(2, 0, 1)  # (half, members, members)
    power = weights.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, half)).sum(-2).T  # (half, members)
    root = torch.maximum(power, 1e-9 * power.amax()).clamp(min=1e-30).sqrt()
    _, vectors = torch.linalg.eigh(root[:, :, None] * correlation * root[:, None, :])
    best = vectors[..., -1]  # (half, members) complex: root_j head_j ≈ best_j * (sum of conj(best) root head)
    into, back = (best.conj() * root).T, (best / root).T  # (members, half)
    power_of_new = torch.einsum("mp,pmn,np->p", into, correlation, into.conj()).real
    wanted = correlation.diagonal(dim1=1, dim2=2).real.mean(1)
    scale = (wanted / power_of_new.clamp(min=1e-30)).sqrt()
    return _as_real(into * scale), _as_real(back / scale)


def _as_real(factors: Tensor) -> Tensor:
    """(members, half) complex -> (members, 2 half, 2 half): multiplication of the pairs, as a matrix."""
    real, imaginary = torch.diag_embed(factors.real), torch.diag_embed(factors.imag)
    return torch.cat([torch.cat([real, -imaginary], dim=-1), torch.cat([imaginary, real], dim=-1)], dim=-2)


_METHODS: dict[str, Callable[..., Heads]] = {
    "mean": _mean,
    "first": _first,
    "random": _random,
    "aligned": _aligned,
    "factored": _factored,
}
