"""What attention promises beyond small errors: nothing leaks, extremes stay finite, offsets are wide, runs repeat.

Each function takes an implementation, a dtype and a device and asserts one promise. Called by the tests of the public
function and of the portable kernels, so that every implementation is held to the same words.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import hasten
from hasten.masks import Causal, Mask, Padding, Window
from tests.ops import tables
from tests.ops.cases import Case, Problem, call, make, poisoned, solve

FILLS = {"nan": float("nan"), "inf": float("inf")}
PADDED: dict[str, Mask | None] = {"full": None, "causal": Causal(), "window": Window(20, 3)}
REPEATED = [
    Case(
        name="causal-gqa",
        batch=2,
        seqlen_q=193,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mask=tables.CAUSAL,
        upstream="both",
    ),
    Case(name="longformer", batch=2, seqlen_q=193, head_dim=64, mask=tables.LONGFORMER),
    Case(name="packed", lengths=tables.CROSSED, head_dim=64, mask=tables.fixed(Window(30, 0))),
    Case(name="bias-shared", batch=2, seqlen_q=130, bias="qk", mask=tables.CAUSAL),
    Case(name="sinks-alibi-dropout", seqlen_q=130, has_sinks=True, alibi="h", dropout_p=0.2),
]


def run(problem: Problem, implementation: str | None) -> dict[str, Tensor]:
    """The problem solved over memory that holds NaN where nobody wrote."""
    with poisoned():
        return solve(problem, lambda own: call(own, implementation))


def hidden_keys_do_not_leak(
    fill: float, side: str, band: Mask | None, implementation: str, dtype: torch.dtype, device: str
) -> None:
    """Whatever stands in keys and values that padding hides changes no bit, and its gradient is exactly 0."""
    lengths = torch.tensor([70, 33], dtype=torch.int32, device=device)
    mask = Padding(lengths, side) if band is None else band & Padding(lengths, side)
    case = Case(
        name="hidden", batch=2, seqlen_q=100, num_heads=2, num_kv_heads=1, mask=lambda *_: mask, upstream="both"
    )
    clean = make(case, dtype, device)
    where = torch.arange(100, device=device)
    hidden = where >= lengths[:, None] if side == "right" else where < 100 - lengths[:, None]
    k, v = clean.k.clone(), clean.v.clone()
    k[hidden], v[hidden] = fill, fill
    want, got = run(clean, implementation), run(replace(clean, k=k, v=v), implementation)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert not got["dk"][hidden].any() and not got["dv"][hidden].any()


def neighbours_do_not_leak(implementation: str, dtype: torch.dtype, device: str) -> None:
    """A packed sequence of NaN leaves the sequences before and after it alone, bit for bit."""
    case = Case(name="neighbours", lengths=((17, 20), (70, 66), (33, 40)), mask=tables.CAUSAL, upstream="both")
    clean = make(case, dtype, device)
    dirty = {name: getattr(clean, name).clone() for name in ("q", "k", "v")}
    for name, rows in (("q", slice(17, 87)), ("k", slice(20, 86)), ("v", slice(20, 86))):
        dirty[name][rows] = torch.nan
    want, got = run(clean, implementation), run(replace(clean, **dirty), implementation)
    for name, rows in (("out", slice(17, 87)), ("dq", slice(17, 87)), ("dk", slice(20, 86)), ("dv", slice(20, 86))):
        assert torch.equal(got[name][: rows.start], want[name][: rows.start]), name
        assert torch.equal(got[name][rows.stop :], want[name][rows.stop :]), name
    assert torch.equal(got["lse"][:, :17], want["lse"][:, :17]) and torch.equal(got["lse"][:, 87:], want["lse"][:, 87:])


def extremes_stay_finite(kind: str, implementation: str, dtype: torch.dtype, device: str) -> None:
    """Scores of +-1e4 and biases of the smallest finite number give the softmax they have, and finite gradients."""
    problem = extreme(kind, dtype, device)
    got, want = run(problem, implementation), solve(problem.to(torch.float64), lambda own: call(own, "reference"))
    rounding = max(torch.finfo(dtype).eps, 1e4 * torch.finfo(torch.float32).eps)  # of a score is 1e4 of float32's
    for name, exact in want.items():
        assert torch.equal(got[name].isfinite(), exact.isfinite()), name
        scale = float(exact[exact.isfinite()].abs().max().clamp(min=1.0)) if exact.isfinite().any() else 1.0
        # delta = dout . out has the rounding of out, in every FlashAttention: dq gets it times a key, dk times a query
        factor = {"dq": problem.k, "dk": problem.q}.get(name)
        scale = scale if factor is None else max(scale, float(factor.abs().max()))
        torch.testing.assert_close(
            got[name].double(),
            exact,
            rtol=0.0,
            atol=8 * rounding * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


EXTREMES = [
    "all-1e4",
    "all-minus-1e4",
    "one-stands-out",
    "both-signs",
    "softcap",
    "bias-smallest",
    "bias-row-smallest",
    "bias-minus-200",
]


def extreme(kind: str, dtype: torch.dtype, device: str) -> Problem:
    """q.k is an exact integer in every dtype, so that what is tested is the softmax and not the rounding of scores."""
    is_low = kind == "bias-minus-200"
    mask, seqlen = (tables.CAUSAL, 192) if is_low else (None, 70)
    softcap = 50.0 if kind == "softcap" else None
    problem = make(Case(name=kind, seqlen_q=seqlen, mask=mask, scale=1.0, softcap=softcap), dtype, device)
    q, k = torch.zeros_like(problem.q), torch.zeros_like(problem.k)
    if not kind.startswith("bias"):
        q[..., 0] = 128.0
        k[..., 0] = {"all-1e4": 80.0, "all-minus-1e4": -80.0, "one-stands-out": -80.0}.get(kind, 0.0)
        if kind == "one-stands-out":
            k[:, 33, :, 0] = 80.0
        if kind in ("both-signs", "softcap"):
            k[:, ::2, :, 0], k[:, 1::2, :, 0] = 80.0, -80.0
        return replace(problem, q=q, k=k)
    smallest = torch.finfo(torch.float16 if dtype == torch.float16 else torch.float32).min
    bias = torch.zeros(seqlen, seqlen, dtype=torch.float32, device=device)
    if is_low:
        bias -= 200.0  # lse < -88.7, where exp(-lse) is no float32
    else:
        bias[:, 40:] = smallest  # what transformers adds to hide keys
    if kind == "bias-row-smallest":
        bias[5] = (
            smallest  # a row of padding: the mean of all values, but no float32 lse can tell 70 equal keys from one,
        )
        problem.dout[:, 5] = 0.0  # so that a gradient is promised only for a loss that leaves it out
    return replace(problem, terms={"bias": bias})


def runs_repeat(case: Case, times: int, implementation: str, dtype: torch.dtype, device: str) -> None:
    """The same inputs give the same bits, forward and backward."""
    problem = make(case, dtype, device)
    first = solve(problem, lambda own: call(own, implementation, deterministic=True))
    for number in range(1, times):
        again = solve(problem, lambda own: call(own, implementation, deterministic=True))
        for name, want in first.items():
            assert torch.equal(again[name], want), f"{name} differs in run {number}"


def offsets_are_wide(name: str, dim: int, implementation: str, dtype: torch.dtype, device: str) -> None:
    """A tensor whose third row, head or batch entry lies 2^31 elements after the first is read rightly.

    The stride itself fits 32 bits, its product with an index does not.
    """
    sizes = [1, 5, 1, 16]
    sizes[dim] = 3
    values = {n: torch.randn(sizes, device=device).to(dtype) for n in ("q", "k", "v", "dout")}
    want = _solve_plain(values, implementation)
    strides = [16 * 5 * 3, 16 * 3, 16, 1]
    strides[dim] = 2**30
    memory = torch.empty(2**31 + 1024, dtype=dtype, device=device)  # of which the few pages below are touched
    far = memory.as_strided(sizes, strides)
    far.copy_(values[name])
    got = _solve_plain({**values, name: far}, implementation)
    for have, exact in zip(got, want, strict=True):
        assert torch.equal(have, exact)


def _solve_plain(values: dict[str, Tensor], implementation: str) -> tuple[Tensor, ...]:
    leaves = [values[name].detach().requires_grad_() for name in ("q", "k", "v")]
    out = hasten.attention(*leaves, Causal(), implementation=implementation)
    return (out.detach(), *torch.autograd.grad(out, leaves, values["dout"]))
