"""Decode problems shared by the tests of every implementation: caches full of traps, judged as in `cases.py`.

Everything a call must not look at is poisoned: unused pages and rows hold NaN, unused entries of the block table a
number that lies far outside the pool.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import hasten
from hasten.masks import Causal, Mask, Window
from hasten.ops.append import quantize
from hasten.ops.decode import decode_attention
from hasten.ops.kv import KV, ContiguousKV, PagedKV, RingKV
from tests.ops import cases
from tests.ops.cases import Case, Problem

FAR = 2**30  # a page that is not there


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """One call. `seqlen_q`: one number, or one for each sequence (packed). `stored`: 8-bit dtype of the cache."""

    name: str
    lengths: tuple[int, ...] = (70, 17)
    seqlen_q: int | tuple[int, ...] = 1
    group_size: int = 1
    num_kv_heads: int = 1
    head_dim: int = 16
    head_dim_v: int | None = None
    kind: str = "paged"
    page_size: int = 16
    spare: int = 0  # tokens of capacity beyond the longest sequence
    mask: Mask | None = None
    scale: float | None = None
    softcap: float | None = None
    has_sinks: bool = False
    alibi: str | None = None
    stored: torch.dtype | None = None
    shared_prefix: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def num_heads(self) -> int:
        return self.group_size * self.num_kv_heads

    @property
    def new(self) -> tuple[int, ...]:
        """New tokens of each sequence."""
        return self.seqlen_q if isinstance(self.seqlen_q, tuple) else (self.seqlen_q,) * len(self.lengths)

    @property
    def capacity(self) -> int:
        if self.kind == "ring":
            assert isinstance(self.mask, Window) and self.mask.left is not None
            return self.mask.left + max(self.new) + self.spare
        return max(1, -(-(max(self.lengths) + self.spare) // self.page_size)) * self.page_size


@dataclass
class DecodeProblem:
    """A case in one dtype: packed or dense q, the cache, and k and v of each sequence as the cache means them."""

    case: DecodeCase
    q: Tensor
    keys: KV
    k: list[Tensor]
    v: list[Tensor]
    terms: dict[str, Tensor]

    @property
    def cu_seqlens(self) -> Tensor | None:
        if not isinstance(self.case.seqlen_q, tuple):
            return None
        return torch.tensor([0, *self.case.new], device=self.q.device).cumsum(0).to(torch.int32)


def make(case: DecodeCase, dtype: torch.dtype, device: str = "cpu") -> DecodeProblem:
    """Random tensors of the case, the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = (sum(case.new),) if isinstance(case.seqlen_q, tuple) else (len(case.lengths), case.seqlen_q)
    q = random(*rows, case.num_heads, case.head_dim).to(device, dtype)
    prefix = [
        random(case.shared_prefix, case.num_kv_heads, d) for d in (case.head_dim, case.head_dim_v or case.head_dim)
    ]
    terms: dict[str, Tensor] = {}
    if case.has_sinks:
        terms["sinks"] = random(case.num_heads).to(device)
    if case.alibi is not None:
        shape = (case.num_heads,) if case.alibi == "h" else (len(case.lengths), case.num_heads)
        terms["slopes"] = 0.1 * random(*shape).abs().to(device)
    stores, seen = [], []
    for shared in prefix:
        tokens = [random(length, case.num_kv_heads, shared.shape[-1]) for length in case.lengths]
        for own in tokens:
            own[: case.shared_prefix] = shared[: own.shape[0]]
        scales = None
        if case.stored is not None:
            pairs = [quantize(own, case.stored) for own in tokens]
            tokens, scales = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            seen.append(
                [(own.double() * s.double()[..., None]).to(device) for own, s in zip(tokens, scales, strict=True)]
            )
        else:
            tokens = [own.to(dtype) for own in tokens]
            seen.append([own.to(device) for own in tokens])
        stores.append((tokens, scales))
    return DecodeProblem(case, q, _cache(case, stores, device), seen[0], seen[1], terms)


def _cache(case: DecodeCase, stores: list[Any], device: str) -> KV:
    """The view that holds these tokens, poisoned wherever it does not."""
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    batch, capacity, size = len(case.lengths), case.capacity, case.page_size
    if case.kind != "paged":
        filled = [_filled(case, tokens, scales, (batch, capacity), None) for tokens, scales in stores]
        kind = RingKV if case.kind == "ring" else ContiguousKV
        (k, k_scales), (v, v_scales) = ([None if t is None else t.to(device) for t in pair] for pair in filled)
        return kind(k, v, lengths, k_scales, v_scales)
    max_pages = capacity // size
    order = torch.randperm(batch * max_pages + 3, generator=torch.Generator().manual_seed(1))
    table = order[: batch * max_pages].view(batch, max_pages).int()
    table[:, : case.shared_prefix // size] = table[0, : case.shared_prefix // size]
    filled = [_filled(case, tokens, scales, (batch * max_pages + 3, size), table) for tokens, scales in stores]
    for number, length in enumerate(case.lengths):
        table[number, -(-length // size) :] = FAR
        if isinstance(case.mask, Window) and case.mask.left is not None:
            table[number, : max(0, length - case.new[number] - case.mask.left) // size] = -FAR
    (k, k_scales), (v, v_scales) = ([None if t is None else t.to(device) for t in pair] for pair in filled)
    return PagedKV(k, v, table.to(device), lengths, k_scales, v_scales)


def _filled(
    case: DecodeCase, tokens: list[Tensor], scales: list[Tensor] | None, shape: tuple[int, int], table: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(storage, scales) with every token where it belongs and NaN elsewhere (127 in 8 bits, with a scale of NaN)."""
    poison = torch.nan if scales is None or tokens[0].dtype != torch.int8 else 127
    storage = torch.full((*shape, *tokens[0].shape[1:]), poison).to(tokens[0].dtype)
    kept = None if scales is None else torch.full((*shape, case.num_kv_heads), torch.nan)
    bits = storage if scales is None else storage.view(torch.int8)
    for number, own in enumerate(tokens):
        first = max(0, own.shape[0] - shape[1]) if case.kind == "ring" else 0
        places = torch.arange(first, own.shape[0])
        entries = torch.full_like(places, number) if table is None else table[number, places // shape[1]].long()
        where = (entries, places % shape[1])
        bits[where] = own[first:] if scales is None else own[first:].view(torch.int8)
        if kept is not None and scales is not None:
            kept[where] = scales[number][first:]
    return storage, kept


def run(problem: DecodeProblem, implementation: str | None, keys: KV | None = None) -> dict[str, Tensor]:
    """out and lse of the public function, over memory that holds NaN where nobody wrote."""
    case, cu_seqlens = problem.case, problem.cu_seqlens
    options: dict[str, Any] = {} if cu_seqlens is None else {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": max(case.new)}
    with cases.poisoned():
        out, lse = decode_attention(
            problem.q,
            problem.keys if keys is None else keys,
            case.mask,
            softmax_scale=case.scale,
            softcap=case.softcap,
            sinks=problem.terms.get("sinks"),
            bias=hasten.ALiBi(problem.terms["slopes"]) if "slopes" in problem.terms else None,
            shared_prefix=case.shared_prefix,
            return_lse=True,
            implementation=implementation,
            **options,
        )
    return {"out": out, "lse": lse}


def sequences(problem: DecodeProblem, dtype: torch.dtype) -> list[Problem]:
    """Each sequence with queries as a problem of `cases.py` in `dtype`, over the tokens put into the cache."""
    case, parts, start = problem.case, [], 0
    for number, (length, new) in enumerate(zip(case.lengths, case.new, strict=True)):
        own = problem.q[None, start : start + new] if problem.q.ndim == 3 else problem.q[number : number + 1]
        start += new
        if new == 0:
            continue
        one = Case(
            name=case.name,
            seqlen_q=new,
            seqlen_k=length,
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            head_dim_v=case.head_dim_v,
            scale=case.scale,
            softcap=case.softcap,
        )
        terms = {n: t[number : number + 1] if t.ndim == 2 else t for n, t in problem.terms.items()}
        own, k, v = own.to(dtype), problem.k[number][None].to(dtype), problem.v[number][None].to(dtype)
        parts.append(Problem(one, own, k, v, terms, case.mask or Causal(), None, own, own))
    return parts


def judge(problem: DecodeProblem, got: dict[str, Tensor]) -> None:
    """Assert the contract: errors at most twice those of PyTorch, zeros and -inf in rows that see nothing."""
    parts = sequences(problem, problem.q.dtype)
    exacts = [cases.call(part, "reference") for part in sequences(problem, torch.float64)]
    statistics = [cases.eager(part)[1] for part in sequences(problem, torch.float32)]
    exact = _joined(exacts)
    plain = _joined([(cases.eager(part)[0], lse) for part, lse in zip(parts, statistics, strict=True)])
    found = {"out": got["out"].flatten(0, -2), "lse": got["lse"].transpose(-1, -2).flatten()}
    assert got["lse"].dtype == torch.float32 or problem.q.dtype == torch.float64
    assert got["out"].dtype == problem.q.dtype and got["out"].is_contiguous()
    sizes: dict[str, float] = {"out": 0.0, "lse": 0.0}
    for part, want in zip(parts, exacts, strict=True):
        own = cases.magnitudes(replace(part, dout=part.q), {"out": want[0], "lse": want[1]})
        sizes = {name: max(sizes[name], own[name]) for name in sizes}
    cases.compare(found, exact, plain, sizes)
    empty = exact["lse"] == -torch.inf
    assert torch.equal(found["lse"] == -torch.inf, empty) and not found["out"][empty].any()


def _joined(results: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """out (rows * heads, dim) and lse (rows * heads,) of all sequences, rows in order."""
    outs = [out.flatten(0, -2) for out, _ in results]
    return {"out": torch.cat(outs), "lse": torch.cat([lse.transpose(1, 2).flatten() for _, lse in results])}


#: every feature once, small enough for an interpreter
CASES = [
    DecodeCase(name="lengths-0-1-17", lengths=(0, 1, 17, 63, 65)),
    DecodeCase(name="lengths-64-257", lengths=(64, 256, 257), page_size=64, group_size=4),
    DecodeCase(name="lengths-1000", lengths=(1000,), page_size=256, group_size=8, head_dim=32),
    DecodeCase(name="group-3", lengths=(40, 5), group_size=3, num_kv_heads=2, seqlen_q=2),
    DecodeCase(name="group-71", lengths=(40,), group_size=71),
    DecodeCase(name="queries-5", lengths=(70, 3, 0, 5), seqlen_q=5, group_size=2),
    DecodeCase(name="full-5", lengths=(70, 3), seqlen_q=5, mask=hasten.Full()),
    DecodeCase(name="packed", lengths=(70, 4, 0, 33), seqlen_q=(1, 4, 0, 5), group_size=2),
    DecodeCase(name="packed-chunk", lengths=(70, 40, 17), seqlen_q=(40, 1, 17), group_size=2),
    DecodeCase(name="capacity-beyond", lengths=(20, 33), spare=400),
    DecodeCase(name="pages-256", lengths=(20, 300), page_size=256),
    DecodeCase(name="pages-32", lengths=(20, 70), page_size=32, head_dim=40, head_dim_v=72),
    DecodeCase(name="window-30", lengths=(20, 31, 200), mask=Window(30, 0), group_size=2),
    DecodeCase(name="window-30-queries-3", lengths=(2, 33, 200), mask=Window(30, 0), seqlen_q=3),
    DecodeCase(name="window-0", lengths=(1, 200), mask=Window(0, 0)),
    DecodeCase(name="window-ahead", lengths=(70,), mask=Window(5, 1), seqlen_q=4),
    DecodeCase(name="contiguous", lengths=(0, 17, 130), kind="contiguous", group_size=2, num_kv_heads=2),
    DecodeCase(name="contiguous-even", lengths=(65, 65), kind="contiguous", seqlen_q=2),
    DecodeCase(name="ring", lengths=(5, 41, 300), kind="ring", mask=Window(40, 0), group_size=2),
    DecodeCase(name="ring-queries-3", lengths=(3, 45, 301), kind="ring", mask=Window(40, 0), seqlen_q=3, spare=7),
    DecodeCase(name="softcap", lengths=(70, 0), softcap=5.0, scale=1.0, seqlen_q=2),
    DecodeCase(name="sinks", lengths=(70, 0, 300), has_sinks=True, group_size=2),
    DecodeCase(name="alibi", lengths=(70, 20), alibi="h", seqlen_q=2, group_size=2),
    DecodeCase(name="alibi-per-row", lengths=(70, 20), alibi="bh", seqlen_q=2, group_size=2),
    DecodeCase(name="scale-negative", lengths=(70,), scale=-0.3),
    DecodeCase(name="everything", lengths=(70, 8), seqlen_q=3, group_size=2, num_kv_heads=2, softcap=5.0,
               has_sinks=True, alibi="bh", mask=Window(50, 0)),
    DecodeCase(name="prefix", lengths=(70, 48, 64, 0), shared_prefix=48, group_size=2),
    DecodeCase(name="prefix-queries-2", lengths=(70, 90), shared_prefix=64, seqlen_q=2, has_sinks=True, alibi="bh"),
    DecodeCase(name="prefix-300", lengths=(290, 310), shared_prefix=288, group_size=2),
    DecodeCase(name="prefix-window", lengths=(70, 90), shared_prefix=64, mask=Window(20, 0)),
]  # fmt: skip
QUANTIZED = [
    DecodeCase(name="int8", lengths=(70, 0, 300), group_size=2, num_kv_heads=2, stored=torch.int8, head_dim=32),
    DecodeCase(name="fp8", lengths=(70, 17), group_size=2, stored=torch.float8_e4m3fn, head_dim=32),
    DecodeCase(name="int8-ring", lengths=(20, 100), kind="ring", mask=Window(40, 0), stored=torch.int8, seqlen_q=2),
    DecodeCase(name="fp8-contiguous", lengths=(20, 100), kind="contiguous", stored=torch.float8_e4m3fn, has_sinks=True),
]
