"""The check before the clock: it equals the oracle, and it catches what must be caught."""

from __future__ import annotations

import pytest
import torch

from hasten.bench import check
from hasten.bench.problems import Pattern, Problem
from hasten.ops.attention import attention

CPU = torch.device("cpu")


def problem(text: str, dtype: torch.dtype = torch.float32, seqlen: int = 33) -> Problem:
    pattern = Pattern.parse(text)
    batch = 1 if pattern.mean_length else 2
    return Problem(batch=batch, seqlen=seqlen, num_heads=6, num_kv_heads=2, head_dim=16, pattern=pattern, dtype=dtype)


@pytest.mark.parametrize("text", ["causal", "full", "window:5,0", "longformer:4,3", "blocks:50", "documents:9"])
def test_the_expected_is_the_oracles(text, monkeypatch):
    monkeypatch.setattr(check, "_SCORES_AT_ONCE", 200)  # several runs of rows
    this = problem(text, seqlen=260 if text == "blocks:50" else 33)
    q, k, v, dout = (tensor.double() for tensor in this.tensors(CPU, 0))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = attention(*leaves, this.mask(CPU), implementation="reference")
    grads = torch.autograd.grad(out, leaves, dout)
    want = check.expected(this, *this.tensors(CPU, 0))
    for got, wanted in zip((out, *grads), want, strict=True):
        assert wanted.dtype == torch.float64
        assert check.error(check.our_part(this, got), wanted) < 1e-12


def test_a_lost_mask_a_shifted_mask_and_an_unwritten_row_are_caught():
    this = problem("causal", torch.bfloat16, seqlen=257)
    q, k, v, dout = this.tensors(CPU, 0)
    want = check.expected(this, q, k, v, dout)
    limit = check.LIMITS[this.dtype]

    def error_of(text: str) -> float:
        out = attention(q, k, v, Pattern.parse(text).mask(), implementation="reference")
        return check.error(check.our_part(this, out), want.out)

    assert error_of("causal") < limit / 2
    assert error_of("full") > 10 * limit
    assert error_of("window:300,1") > 10 * limit
    unwritten = want.out.clone()
    unwritten[100] = 0
    assert check.error(unwritten, want.out) > limit
    unwritten[100] = torch.nan
    assert check.error(unwritten, want.out) == float("inf")
    assert check.error(want.out[:-1], want.out) == float("inf")
