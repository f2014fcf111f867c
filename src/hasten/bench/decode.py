"""The decode suite: one token a sequence over a KV cache, ours beside PyTorch's own, as a share of the read bandwidth.

Each variant is checked, then captured in a CUDA graph that runs it over sets of caches larger than the last cache, as
a decode step would; a time is that of the graph over the number of calls in it. Without a GPU calls are timed alone.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hasten.bench import records, tables
from hasten.bench.records import Record
from hasten.bench.suites import parse_sizes
from hasten.bench.timing import Plan as TimingPlan
from hasten.bench.timing import Timing, Work, clock_for, measure
from hasten.errors import ArgumentError
from hasten.ops.decode import decode_attention
from hasten.ops.kv import KV, ContiguousKV, PagedKV

HEADS = {"mha": 32, "gqa": 8, "mqa": 1}
NUM_HEADS = 32
_COLD_BYTES = 256 << 20
_MOST_SETS = 200
_MOST_ERROR = 1e-2


@dataclass(frozen=True, kw_only=True)
class DecodeProblem:
    """Sequences of one length: `context` tokens each, the first `shared` of them common to all."""

    name: str
    batch: int
    context: int
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 16
    shared: int = 0
    num_heads: int = NUM_HEADS

    def __str__(self) -> str:
        shared = f" shared={self.shared}" if self.shared else ""
        return f"{self.name} ctx={self.context} B={self.batch} D={self.head_dim}{shared}"

    @property
    def num_kv_heads(self) -> int:
        """K/V heads of that name, of 32 query heads."""
        return HEADS[self.name]

    @property
    def kv_bytes(self) -> int:
        """Bytes of the distinct keys and values."""
        tokens = self.shared + self.batch * (self.context - self.shared)
        return 2 * tokens * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def fields(self) -> Record:
        """What a record says of it."""
        own = {"name": self.name, "batch": self.batch, "context": self.context, "shared": self.shared}
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        return {**own, **heads, "dtype": str(self.dtype).removeprefix("torch."), "page_size": self.page_size}


@dataclass(frozen=True)
class Inputs:
    """One set: q (batch, 1, num_heads, dim), pages in random order, k and v (batch, num_kv_heads, context, dim)."""

    q: Tensor
    paged: PagedKV
    k: Tensor | None
    v: Tensor | None


@dataclass(frozen=True)
class Variant:
    """A way to do it. `call` returns out (batch, num_heads, head_dim) in any shape; `needs_rows`: k and v in a row."""

    name: str
    call: Callable[[DecodeProblem, Inputs], Tensor]
    needs_rows: bool = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure. `plans`: forced plans of ours beside the shipped one, as UNITS,BLOCK_N,WARPS,STAGES."""

    problems: Sequence[DecodeProblem]
    device: torch.device
    peers: Sequence[str] = ("sdpa_cudnn", "sdpa_flash")
    plans: Sequence[str] = ()
    most_bytes: int | None = None
    timing: TimingPlan = field(default_factory=lambda: TimingPlan(budget_ms=30.0, rounds=3, rest_ms=5.0))
    commit: str | None = None


def grid(
    names: str,
    batches: str,
    contexts: str,
    head_dim: int = 128,
    shared: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> list[DecodeProblem]:
    """Every combination, such as ("mha,gqa,mqa", "1,16,128", "1024,8192,65536"); `shared` tokens come on top."""
    unknown = [name for name in names.split(",") if name not in HEADS]
    if unknown:
        raise ArgumentError("heads", f"some of {', '.join(HEADS)}", repr(unknown[0]), "separate by commas")
    sizes = parse_sizes("batch", batches), parse_sizes("context", contexts)
    return [
        DecodeProblem(name=name, batch=batch, context=context + shared, head_dim=head_dim, shared=shared, dtype=dtype)
        for name in names.split(",")
        for context in sizes[1]
        for batch in sizes[0]
    ]


def run(options: Options, emit: Callable[[list[Record]], None], tell: Callable[[str], None]) -> None:
    """Measure all problems; `emit` gets the records of each when it is done, `tell` a line of progress."""
    place = records.environment(options.device, options.commit)
    read_gbps = measure_read(options.device)
    place["read_gbps"] = float(f"{read_gbps:.4g}")
    tell(f"{place['device']}: reads {read_gbps:.0f} GB/s")
    most = options.most_bytes or _room(options.device)
    for number, problem in enumerate(options.problems, 1):
        if problem.kv_bytes > most:
            tell(f"[{number}/{len(options.problems)}] {problem}: left out, {problem.kv_bytes >> 30} GiB")
            continue
        made = [{"kind": "decode", **place, **record} for record in measure_problem(problem, options, read_gbps)]
        emit(made)
        told = ", ".join(f"{record['implementation']} {_told(record)}" for record in made)
        tell(f"[{number}/{len(options.problems)}] {problem}: {told}")
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()


def _room(device: torch.device) -> int:
    """Bytes of keys and values that fit twice, in pages and in rows."""
    if device.type != "cuda":
        return 1 << 30
    return int(torch.cuda.get_device_properties(device).total_memory * 0.42)


def measure_read(device: torch.device) -> float:
    """GB/s of reading alone, the best of some calls: the ceiling of decoding."""
    size, dtype = (1 << 30, torch.int32) if device.type == "cuda" else (1 << 24, torch.float32)
    source = torch.ones(size, dtype=dtype, device=device)
    call: Callable[[int], object] = lambda number: source.sum()  # noqa: E731 - the plain way, replaced on a GPU
    if device.type == "cuda":
        from hasten.ops.portable.read import read  # triton is there with a GPU

        call = lambda number: read(source)  # noqa: E731
    call(0)
    timing = measure(clock_for(device), {"read": Work(call)}, TimingPlan(budget_ms=40.0, rounds=2, rest_ms=5.0))["read"]
    return source.nbytes / min(timing.times_ms) / 1e6


def measure_problem(problem: DecodeProblem, options: Options, read_gbps: float) -> list[Record]:
    """Records of one problem without the place, one for each variant, measured or not."""
    variants = [*ours(problem, options), *(peer(name) for name in options.peers)]
    needs_rows = any(variant.needs_rows for variant in variants)
    count = min(_MOST_SETS, max(1, math.ceil(_COLD_BYTES / problem.kv_bytes))) if options.device.type == "cuda" else 1
    sets = [inputs(problem, options.device, number, needs_rows) for number in range(count)]
    want = expected(problem, sets[0])
    made: dict[str, Record] = {}
    works: dict[str, Work] = {}
    for variant in variants:
        made[variant.name] = {**problem.fields(), "implementation": variant.name}
        try:
            with torch.no_grad():
                got = variant.call(problem, sets[0]).reshape(want.shape).double()
                error = float((got - want).norm() / want.norm())
                is_right = error <= _MOST_ERROR
                made[variant.name] |= {"status": "ok" if is_right else "wrong", "error": float(f"{error:.3g}")}
                if is_right:
                    works[variant.name] = _work(problem, variant, sets)
        except Exception as error:  # noqa: BLE001 - whatever a peer breaks with is a result of the comparison
            made[variant.name] |= {"status": "failed", "reason": " ".join(str(error).split())[:200]}
    calls = len(sets) if options.device.type == "cuda" else 1
    timings = measure(clock_for(options.device), works, options.timing)
    timings = {name: Timing(tuple(t / calls for t in timing.times_ms), None) for name, timing in timings.items()}
    peers = [timings[name].median_ms for name in options.peers if name in timings]
    for name, timing in timings.items():
        seconds = timing.median_ms / 1e3
        gbps = problem.kv_bytes / seconds / 1e9
        made[name] |= {**timing.fields(), "us": float(f"{seconds * 1e6:.4g}"), "gbps": float(f"{gbps:.4g}")}
        made[name] |= {"share_of_read": round(gbps / read_gbps, 4)}
        made[name] |= {"vs_best_peer": round(min(peers) / timing.median_ms, 4) if peers else None}
    return list(made.values())


def _work(problem: DecodeProblem, variant: Variant, sets: Sequence[Inputs]) -> Work:
    """The variant over every set: as one CUDA graph, or call by call on a CPU."""
    if sets[0].q.device.type != "cuda":
        return Work(lambda number: variant.call(problem, sets[number % len(sets)]), torch.no_grad)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        variant.call(problem, sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in sets:
            variant.call(problem, each)
    return Work(lambda number: graph.replay())


def inputs(problem: DecodeProblem, device: torch.device, seed: int, needs_rows: bool) -> Inputs:
    """One set: random numbers, pages permuted, the same keys in pages and in a row."""
    torch.manual_seed(seed)
    batch, kv_heads, size, dim = problem.batch, problem.num_kv_heads, problem.page_size, problem.head_dim
    shared_pages, max_pages = problem.shared // size, -(-problem.context // size)
    num_pages = shared_pages + batch * (max_pages - shared_pages)
    order = torch.randperm(num_pages, device=device).int()
    table = order[shared_pages:].view(batch, max_pages - shared_pages)
    table = torch.cat([order[:shared_pages].expand(batch, -1), table], dim=1).contiguous()
    pages = [torch.randn(num_pages, size, kv_heads, dim, device=device, dtype=problem.dtype) for _ in range(2)]
    lengths = torch.full((batch,), problem.context, dtype=torch.int32, device=device)
    q = torch.randn(batch, 1, problem.num_heads, dim, device=device, dtype=problem.dtype)
    rows: list[Tensor | None] = [None, None]
    if needs_rows:
        rows = [_in_a_row(each, table, problem.context) for each in pages]
    return Inputs(q, PagedKV(pages[0], pages[1], table, lengths), rows[0], rows[1])


def _in_a_row(pages: Tensor, table: Tensor, context: int) -> Tensor:
    """(batch, num_kv_heads, context, head_dim), filled sequence by sequence: there may be no room for two copies."""
    batch = table.shape[0]
    rows = pages.new_empty(batch, pages.shape[2], context, pages.shape[3])
    for number in range(batch):
        rows[number] = pages[table[number].long()].flatten(0, 1)[:context].transpose(0, 1)
    return rows


def expected(problem: DecodeProblem, given: Inputs) -> Tensor:
    """The last sequence's output by definition, float64 (num_heads, head_dim), in float32 products."""
    paged = given.paged
    table = paged.block_table[-1].long()
    k, v = (pages[table].flatten(0, 1)[: problem.context].float() for pages in (paged.keys, paged.values))
    q = given.q[-1, 0].float().view(problem.num_kv_heads, -1, problem.head_dim)
    scores = torch.einsum("hgd,nhd->hgn", q, k) * problem.head_dim**-0.5
    return torch.einsum("hgn,nhd->hgd", torch.softmax(scores, -1), v).flatten(0, 1).double()


def ours(problem: DecodeProblem, options: Options) -> list[Variant]:
    """The public function over pages and, without a shared prefix, over rows; then the forced plans."""

    def last(out: Any) -> Tensor:
        return out[-1]

    def call(problem: DecodeProblem, given: Inputs) -> Tensor:
        return last(decode_attention(given.q, given.paged, shared_prefix=problem.shared))

    def call_rows(problem: DecodeProblem, given: Inputs) -> Tensor:
        return last(decode_attention(given.q, rows_view(given)))

    made = [Variant("hasten_paged", call)]
    if not problem.shared:
        made.append(Variant("hasten_rows", call_rows, needs_rows=True))
    for text in options.plans:
        made.append(Variant(f"hasten_paged:{text}", partial(_forced, text)))
    return made


def rows_view(given: Inputs) -> KV:
    """The cache of `given` stored (batch, num_kv_heads, context, head_dim)."""
    assert given.k is not None and given.v is not None
    return ContiguousKV(given.k.transpose(1, 2), given.v.transpose(1, 2), given.paged.cache_seqlens)


def _forced(text: str, problem: DecodeProblem, given: Inputs) -> Tensor:
    """Ours by a plan UNITS,BLOCK_N,WARPS,STAGES."""
    from hasten.ops.decode_call import DecodeCall
    from hasten.ops.portable import decode_launch

    units, block_n, num_warps, num_stages = (int(word) for word in text.split(","))
    call = DecodeCall(softmax_scale=problem.head_dim**-0.5, max_seqlen_q=1, right=0, shared_prefix=problem.shared)
    plan = decode_launch.plan_for(given.q, given.paged, call)
    plan = replace(plan, units=units, tile=decode_launch.Tile(block_n, num_warps, num_stages))
    return decode_launch.forward(given.q, given.paged, call, plan)[0][-1]


def peer(name: str) -> Variant:
    """PyTorch's attention by one of its back ends; heads of a group as rows, so that no key is read twice."""
    backends = {
        "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa_flash": SDPBackend.FLASH_ATTENTION,
        "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa_math": SDPBackend.MATH,
    }
    if name not in backends:
        raise ArgumentError("peers", f"some of {', '.join(backends)}", repr(name), "separate by commas")

    def call(problem: DecodeProblem, given: Inputs) -> Tensor:
        assert given.k is not None and given.v is not None
        q = given.q.view(problem.batch, problem.num_kv_heads, -1, problem.head_dim)
        with sdpa_kernel(backends[name]):
            return scaled_dot_product_attention(q, given.k, given.v)[-1]

    return Variant(name, call, needs_rows=True)


def table(some: Sequence[Record]) -> str:
    """The records as one Markdown table: microseconds (share of the read bandwidth)."""
    return tables.markdown("", some, _case, _told)


def _case(record: Record) -> str:
    shared = f" shared={record['shared']}" if record["shared"] else ""
    return f"{record['name']} ctx={record['context']} B={record['batch']}{shared}"


def _told(record: Record) -> str:
    return f"{record['us']:.4g} us ({record['share_of_read']:.0%})" if "us" in record else str(record["status"])
