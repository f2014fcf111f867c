"""The oracle against the definition in loops, against PyTorch, and against finite differences, twice."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hasten
from hasten.masks import Causal, Documents, Full, Global, Mask, Padding, Window
from tests.ops import tables
from tests.ops.cases import Case, Problem, call, eager, make, solve

SMALL = {"seqlen_q": 4, "seqlen_k": 5, "head_dim": 2, "num_heads": 2}
FEATURES = [
    Case(name="plain", **SMALL),
    Case(name="causal", mask=tables.CAUSAL, **SMALL),
    Case(name="empty-rows", mask=tables.CAUSAL, **SMALL | {"seqlen_q": 5, "seqlen_k": 3}),
    Case(name="window", mask=tables.fixed(Window(1, 1)), **SMALL),
    Case(name="longformer", mask=tables.fixed(Window(1, 0) | Global((0,))), **SMALL),
    Case(name="padding", batch=2, mask=tables.padding(3, 0), **SMALL),
    Case(name="dense", mask=lambda *_: Documents(torch.tensor([0, 2, 5])), **SMALL),
    Case(name="gqa", num_kv_heads=1, **SMALL),
    Case(name="dim-v", head_dim_v=3, **SMALL),
    Case(name="softcap", softcap=1.5, mask=tables.CAUSAL, **SMALL),
    Case(name="sinks", has_sinks=True, mask=tables.CAUSAL, **SMALL | {"seqlen_q": 5, "seqlen_k": 3}),
    Case(name="bias", bias="hqk", **SMALL),
    Case(name="bias-hides", bias="bhqk", hides=True, **SMALL),
    Case(name="alibi", alibi="h", softcap=2.0, **SMALL),
    Case(name="dropout", dropout_p=0.3, **SMALL),
    Case(name="scale", scale=-0.7, **SMALL),
    Case(name="packed", lengths=((2, 3), (0, 2), (3, 1)), mask=tables.CAUSAL, head_dim=2),
    Case(
        name="everything",
        num_kv_heads=1,
        mask=tables.CAUSAL,
        softcap=1.5,
        has_sinks=True,
        bias="1q1",
        dropout_p=0.2,
        head_dim_v=3,
        **SMALL,
    ),
]
features = pytest.mark.parametrize("case", FEATURES, ids=str)


def by_definition(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) of a dense problem in Python's own numbers, cell by cell. No dropout."""
    case, terms = problem.case, problem.terms
    batch, seqlen_q, num_heads, head_dim = problem.q.shape
    seqlen_k = problem.k.shape[1]
    scale = head_dim**-0.5 if case.scale is None else case.scale
    keep = (problem.mask or Full()).keep(seqlen_q, seqlen_k, batch=batch, num_heads=num_heads).tolist()
    bias = terms["bias"].expand(batch, num_heads, seqlen_q, seqlen_k).tolist() if "bias" in terms else None
    slopes = terms["slopes"].expand(batch, num_heads).tolist() if "slopes" in terms else None
    q, k, v = problem.q.tolist(), problem.k.tolist(), problem.v.tolist()
    out = torch.zeros(batch, seqlen_q, num_heads, problem.v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, num_heads, seqlen_q), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(num_heads):
            own = h * problem.k.shape[2] // num_heads
            for i in range(seqlen_q):
                weights: dict[int, float] = {}
                for j in range(seqlen_k):
                    score = scale * math.fsum(x * y for x, y in zip(q[b][i][h], k[b][j][own], strict=True))
                    score = case.softcap * math.tanh(score / case.softcap) if case.softcap else score
                    score += bias[b][h][i][j] if bias else 0.0
                    score -= slopes[b][h] * abs(i + seqlen_k - seqlen_q - j) if slopes else 0.0
                    if keep[b][h][i][j] and score > -math.inf:
                        weights[j] = math.exp(score)
                total = math.fsum(weights.values()) + (math.exp(float(terms["sinks"][h])) if "sinks" in terms else 0.0)
                if total:
                    lse[b, h, i] = math.log(total)
                for j, weight in weights.items():
                    out[b, i, h] += weight / total * torch.tensor(v[b][j][own], dtype=torch.float64)
    return out, lse


@pytest.mark.parametrize("case", [case for case in FEATURES if not case.dropout_p and not case.lengths], ids=str)
def test_it_is_the_definition(case: Case) -> None:
    problem = make(replace(case, dropout_p=0.0), torch.float64)
    for got, want in zip(call(problem, "reference"), by_definition(problem), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "case", [case for name in tables.GRIDS for case in getattr(tables, name) if name not in ("LONG", "DIMS")], ids=str
)
def test_it_is_eager_pytorch_in_float64(case: Case) -> None:
    """The baseline of every tolerance, written apart from the oracle, says the same: values and gradients."""
    problem = make(case, torch.float32).to(torch.float64)
    got, want = (solve(problem, forward) for forward in (lambda own: call(own, "reference"), eager))
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def outputs(case: Case) -> tuple[object, tuple[Tensor, ...]]:
    """A function of the leaves that returns out and the finite part of lse, and the leaves in float64."""
    problem = make(case, torch.float32).to(torch.float64)
    leaves = {"q": problem.q, "k": problem.k, "v": problem.v, **problem.terms}
    if "bias" in leaves and case.hides:
        del leaves["bias"]  # finite differences of -inf

    def forward(*values: Tensor) -> tuple[Tensor, Tensor]:
        own = dict(zip(leaves, values, strict=True))
        terms = {name: own.get(name, term) for name, term in problem.terms.items()}
        out, lse = call(replace(problem, q=own["q"], k=own["k"], v=own["v"], terms=terms), "reference")
        return out, torch.where(lse > -torch.inf, lse, 0.0)

    return forward, tuple(leaf.requires_grad_() for leaf in leaves.values())


@features
def test_gradients_are_finite_differences(case: Case) -> None:
    forward, leaves = outputs(case)
    assert torch.autograd.gradcheck(forward, leaves)


@features
def test_second_gradients_are_finite_differences(case: Case) -> None:
    forward, leaves = outputs(case)
    assert torch.autograd.gradgradcheck(forward, leaves)


@pytest.mark.parametrize("mask", [Full(), Causal(), Padding(torch.tensor([3]))], ids=["full", "causal", "padding"])
def test_rows_that_see_nothing_are_zero_with_gradients_zero(mask: Mask) -> None:
    q, k, v = (torch.randn(1, seqlen, 1, 2, dtype=torch.float64, requires_grad=True) for seqlen in (5, 3, 3))
    hidden = torch.zeros(5, 3, dtype=torch.float64)
    hidden[4] = -torch.inf
    out, lse = hasten.attention(q, k, v, mask, bias=hidden, return_lse=True, implementation="reference")
    blind = lse[0, 0] == -torch.inf
    assert blind.tolist() == ([True, True, False, False, True] if isinstance(mask, Causal) else [False] * 4 + [True])
    assert not out[0, blind].any()
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse)))
    assert not dq[0, blind].any() and dk.isfinite().all() and dv.isfinite().all()


def test_a_score_of_any_size_keeps_probabilities_that_sum_to_one() -> None:
    ones = torch.ones(1, 50, 1, 1)
    for size in (1e4, -1e4, 1e30, torch.finfo(torch.float32).min):
        out = hasten.attention(0 * ones, ones, ones, bias=torch.full((1, 50), size), implementation="reference")
        torch.testing.assert_close(out, ones)
