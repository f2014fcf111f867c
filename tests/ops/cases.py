"""Attention problems shared by the tests of every implementation: how they are made, solved, and judged.

A `Case` names sizes, mask, features and strides (the lists of them are in `tables.py`). `check` solves it with one
implementation and holds it against the float64 oracle, and against what plain PyTorch makes of it in the same dtype.
The tolerances are argued in docs/design/exactness.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import hasten
from hasten.masks import Full, Mask

MOST, MEAN = 2.0, 1.1  # times PyTorch's own largest and mean error
FLOOR = 2.0**-26  # of a magnitude: where PyTorch happens to be exact, float32 statistics are not
LSE_FLOOR = 2.0**-24  # an lse went through base 2 and back: half a unit in the last place of float32
SUMS = {"dsinks", "dbias", "dslopes"}  # few numbers, each a sum over many rows: PyTorch's own error is luck there
TORCH_SEED = 1234  # before every attention, so that dropout draws the same cells


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention. `lengths`: (seqlen_q, seqlen_k) of packed sequences. The rest as in `hasten.attention`.

    `bias`: its dimensions as letters of bhqk, 1 where it broadcasts. `hides`: the bias has cells and a whole row of
    -inf. `alibi`: "h" or "bh". `upstream`: which outputs a gradient comes from. Layouts: see `laid_out`.
    """

    name: str
    batch: int = 1
    seqlen_q: int = 131
    seqlen_k: int | None = None
    num_heads: int = 2
    num_kv_heads: int | None = None
    head_dim: int = 16
    head_dim_v: int | None = None
    lengths: tuple[tuple[int, int], ...] | None = None
    slack: int = 0  # added to max_seqlen of packed sequences; None of them is that long
    mask: Callable[[Case, str], Mask] | None = None
    scale: float | None = None
    softcap: float | None = None
    has_sinks: bool = False
    bias: str | None = None
    bias_dtype: torch.dtype | None = None
    hides: bool = False
    alibi: str | None = None
    dropout_p: float = 0.0
    upstream: str = "out"
    layout: str = "contiguous"
    dout_layout: str = "contiguous"
    spread: float = 1.0  # standard deviation of q

    def __str__(self) -> str:
        return self.name

    @property
    def keys(self) -> int:
        return self.seqlen_q if self.seqlen_k is None else self.seqlen_k

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


@dataclass
class Problem:
    """The tensors of a case in one dtype. `terms`: sinks, bias, slopes as far as the case has them."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    terms: dict[str, Tensor]
    mask: Mask | None
    cu_seqlens: tuple[Tensor, Tensor] | None
    dout: Tensor
    dlse: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype, contiguous."""
        move = {name: getattr(self, name).detach().to(dtype).contiguous() for name in ("q", "k", "v", "dout", "dlse")}
        return replace(self, **move, terms={name: term.detach().to(dtype) for name, term in self.terms.items()})


def make(case: Case, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Random tensors of the case, the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(0)
    dim_v = case.head_dim_v or case.head_dim
    rows_q, rows_k = (case.batch, case.seqlen_q), (case.batch, case.keys)
    cu_seqlens = None
    if case.lengths is not None:
        cu_seqlens = tuple(_cumulative([pair[side] for pair in case.lengths], device) for side in (0, 1))
        rows_q, rows_k = ((sum(pair[side] for pair in case.lengths),) for side in (0, 1))

    def random(*shape: int, as_dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, as_dtype)

    q = laid_out(case.spread * random(*rows_q, case.num_heads, case.head_dim), case.layout)
    k = laid_out(random(*rows_k, case.kv_heads, case.head_dim), case.layout)
    v = laid_out(random(*rows_k, case.kv_heads, dim_v), case.layout)
    dout = laid_out(random(*rows_q, case.num_heads, dim_v), case.dout_layout)
    dlse = random(
        *((case.num_heads, *rows_q) if case.lengths else (case.batch, case.num_heads, case.seqlen_q)),
        as_dtype=torch.float32,
    )
    terms: dict[str, Tensor] = {}
    if case.has_sinks:
        terms["sinks"] = random(case.num_heads, as_dtype=torch.float32)
    if case.bias is not None:
        sizes = {"b": case.batch, "h": case.num_heads, "q": case.seqlen_q, "k": case.keys, "1": 1}
        bias = random(*(sizes[letter] for letter in case.bias), as_dtype=case.bias_dtype or dtype)
        if case.hides:
            bias = bias.masked_fill(bias > 1.2, -torch.inf)
            bias[..., min(3, bias.shape[-2] - 1), :] = -torch.inf
        terms["bias"] = bias
    if case.alibi is not None:
        shape = (case.num_heads,) if case.alibi == "h" else (case.batch, case.num_heads)
        terms["slopes"] = 0.1 * random(*shape, as_dtype=torch.float32).abs()
    mask = None if case.mask is None else case.mask(case, device)
    return Problem(case, q, k, v, terms, mask, cu_seqlens, dout, dlse)


def _cumulative(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """`values` (..., rows, heads, dim) behind other strides, with NaN in every gap between them."""
    heads, dim = values.shape[-2:]
    if layout == "heads_first":  # (batch, heads, rows, dim) in memory
        return values.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced_heads":  # a slice of a fused projection
        return torch.cat([values * torch.nan, values, values * torch.nan], dim=-2)[..., heads : 2 * heads, :]
    if layout == "sliced_dim":  # odd strides
        return torch.cat([values, values[..., :1] * torch.nan], dim=-1)[..., :dim]
    if layout == "misaligned":  # one element past an aligned address
        flat = torch.cat([torch.full_like(values.flatten()[:1], torch.nan), values.flatten()])
        return flat[1:].view(values.shape)
    if layout == "every_second":  # last stride 2
        return torch.stack([values, values * torch.nan], dim=-1).flatten(-2)[..., ::2]
    if layout == "dim_first":  # last stride is the largest but one
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded_heads":
        return values[..., :1, :].expand(values.shape)
    if layout == "expanded_batch":
        return values[:1].expand(values.shape)
    if layout == "ones":  # what sum().backward() sends
        return values.new_ones(()).expand(values.shape)
    assert layout == "contiguous", layout
    return values


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about cuBLAS and scatters, which matter to nobody here
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def call(problem: Problem, implementation: str | None, **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of `hasten.attention`."""
    case, terms = problem.case, problem.terms
    bias = hasten.ALiBi(terms["slopes"]) if "slopes" in terms else terms.get("bias")
    if problem.cu_seqlens is not None and case.lengths is not None:
        options["cu_seqlens_q"], options["cu_seqlens_k"] = problem.cu_seqlens
        longest = (max((pair[side] for pair in case.lengths), default=0) for side in (0, 1))
        options["max_seqlen_q"], options["max_seqlen_k"] = (length + case.slack for length in longest)
    torch.manual_seed(TORCH_SEED)
    out, lse = hasten.attention(
        problem.q,
        problem.k,
        problem.v,
        problem.mask,
        softmax_scale=case.scale,
        softcap=case.softcap,
        sinks=terms.get("sinks"),
        bias=bias,
        dropout_p=case.dropout_p,
        return_lse=True,
        implementation=implementation,
        **options,
    )
    return out, lse


def solve(problem: Problem, forward: Callable[[Problem], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """out, lse and the gradients of every input, by name."""
    leaves = {"q": problem.q, "k": problem.k, "v": problem.v, **problem.terms}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    own = {name: leaves[name] for name in ("q", "k", "v")}
    out, lse = forward(replace(problem, **own, terms={name: leaves[name] for name in problem.terms}))
    sent = {"out": ((out, problem.dout),), "lse": ((lse, problem.dlse),)}
    sent["both"] = sent["out"] + sent["lse"]
    outputs, upstream = zip(*sent[problem.case.upstream], strict=True)
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    found = {
        f"d{name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return {"out": out.detach(), "lse": lse.detach(), **found}


def eager(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) by PyTorch's own operators, every step in the dtype of q."""
    case, terms, q = problem.case, problem.terms, problem.q
    kept = _kept(problem)
    if problem.cu_seqlens is None:
        return _eager(problem, q, problem.k, problem.v, kept)
    (starts_q, starts_k), parts = (cu.tolist() for cu in problem.cu_seqlens), []
    for number in range(len(starts_q) - 1):
        rows, cols = slice(*starts_q[number : number + 2]), slice(*starts_k[number : number + 2])
        own = replace(
            problem, terms={n: t[number : number + 1] if n == "slopes" and t.ndim == 2 else t for n, t in terms.items()}
        )
        seen = None if kept is None else kept[None, rows, :, : cols.stop - cols.start].transpose(1, 2)
        parts.append(_eager(own, q[None, rows], problem.k[None, cols], problem.v[None, cols], seen))
    if not parts:
        return q.new_empty(0, case.num_heads, problem.v.shape[-1]), q.new_empty(case.num_heads, 0)
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=-1)


def _eager(problem: Problem, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    case, terms, group_size = problem.case, problem.terms, q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group_size, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if case.scale is None else case.scale)
    batch, num_heads, seqlen_q, seqlen_k = scores.shape
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    keep = (problem.mask or Full()).keep(seqlen_q, seqlen_k, batch=batch, num_heads=num_heads, device=q.device)
    if "bias" in terms:
        bias = terms["bias"].to(q.dtype)
        keep = keep & (bias > -torch.inf)
        scores = scores + bias.masked_fill(bias == -torch.inf, 0)
    if "slopes" in terms:
        position = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
        distance = (position - torch.arange(seqlen_k, device=q.device)).abs()
        scores = scores - terms["slopes"].to(q.dtype).reshape(-1, num_heads, 1, 1) * distance
    scores = scores.masked_fill(~keep, -torch.inf)
    if "sinks" in terms:
        scores = torch.cat(
            [scores, terms["sinks"].to(q.dtype)[None, :, None, None].expand(batch, -1, seqlen_q, 1)], dim=-1
        )
    seen = (scores > -torch.inf).any(dim=-1, keepdim=True)
    finite = scores.masked_fill(~seen, 0)
    lse = torch.logsumexp(finite, dim=-1).masked_fill(~seen[..., 0], -torch.inf)
    probs = (torch.softmax(finite, dim=-1) * seen)[..., :seqlen_k]
    if kept is not None:
        probs = probs * kept / (1 - case.dropout_p)
    return (probs @ v).transpose(1, 2), lse


def _kept(problem: Problem) -> Tensor | None:
    """bool (batch, num_heads, seqlen_q, seqlen_k): the cells that dropout keeps; packed (total_q, num_heads, longest).

    Read off an attention of equal probabilities over the rows of an identity.
    """
    if problem.case.dropout_p == 0:
        return None
    q, k, cu_seqlens = problem.q.detach().double(), problem.k.detach().double(), problem.cu_seqlens
    eye = torch.eye(k.shape[-3], dtype=q.dtype, device=q.device)
    if cu_seqlens is not None:
        own = [torch.arange(length, device=q.device) for length in cu_seqlens[1].diff().tolist()]
        eye = eye[torch.cat(own)][:, : max(len(ids) for ids in own)]
    identity = eye[:, None, :].expand(*k.shape[:-1], eye.shape[-1])
    out, _ = call(replace(problem, q=0 * q, k=0 * k, v=identity, terms={}, mask=None), "reference")
    return out > 0 if cu_seqlens is not None else out.transpose(1, 2) > 0


def magnitudes(problem: Problem, exact: dict[str, Tensor]) -> dict[str, float]:
    """For each result, the size of the terms that are summed to make it: its float32 rounding is a share of that."""
    case = problem.case
    largest = {
        name: float(getattr(problem, name).abs().max()) if getattr(problem, name).numel() else 0.0
        for name in ("q", "k", "v", "dout")
    }
    scale = case.head_dim**-0.5 if case.scale is None else abs(case.scale)
    score = scale * largest["q"] * largest["k"] * case.head_dim**0.5
    dscore = largest["dout"] * largest["v"] * (case.head_dim_v or case.head_dim) ** 0.5 / (1 - case.dropout_p)
    bound = {"out": largest["v"], "lse": 1.0, "dq": scale * dscore * largest["k"], "dk": scale * dscore * largest["q"]}
    bound |= {"dv": largest["dout"], "dsinks": dscore, "dbias": dscore, "dslopes": dscore * case.keys}
    return {name: (1 + score) * max(bound[name], _largest(exact[name])) for name in exact}


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def compare(
    got: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor], sizes: dict[str, float]
) -> None:
    """Assert that each result errs at most twice as much as plain PyTorch, and 1.1 times in the mean."""
    for name, want in exact.items():
        have = got[name]
        assert have.shape == want.shape, f"{name}: shape {tuple(have.shape)}, not {tuple(want.shape)}"
        assert torch.equal(have.isfinite(), want.isfinite()), (
            f"{name}: {int((~have.isfinite()).sum())} not finite, {int((~want.isfinite()).sum())} expected"
        )
        if not want.numel():
            continue
        error, pytorch = (torch.where(want.isfinite(), t.double() - want, 0.0).abs() for t in (have, plain[name]))
        own_floor = LSE_FLOOR if name == "lse" else FLOOR
        floor = sizes[name] * max(own_floor, torch.finfo(got["out"].dtype).eps / 512 if name in SUMS else 0.0)
        most, mean = MOST * pytorch.max() + floor, MEAN * pytorch.mean() + floor / 2
        assert error.max() <= most, f"{name}: largest error {error.max():.3e}, at most {most:.3e} allowed"
        assert error.mean() <= mean, f"{name}: mean error {error.mean():.3e}, at most {mean:.3e} allowed"


def check(case: Case, implementation: str | None, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Solve the case and assert every promise of the contract that can be asserted of any case."""
    problem = make(case, dtype, device)
    with poisoned():
        got = solve(problem, lambda own: call(own, implementation))
    exact = solve(problem.to(torch.float64), lambda own: call(own, "reference"))
    plain = solve(problem, eager)
    plain["lse"] = eager(problem.to(torch.float32))[1]  # statistics are float32 whatever the dtype
    assert got["out"].dtype == dtype and got["lse"].dtype == torch.float32 and got["out"].is_contiguous()
    compare(got, exact, plain, magnitudes(problem, exact))
    empty = exact["lse"] == -torch.inf
    assert torch.equal(got["lse"] == -torch.inf, empty)
    blind = empty.transpose(-1, -2)
    assert not got["out"][blind].any() and not got["dq"][blind].any(), "a row that sees nothing gives exactly 0"
    return got
