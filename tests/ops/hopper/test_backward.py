"""The Hopper backward held to the contract on a GPU, behind the forward of the portable kernels.

So that a fault is seen where it is: one of the Hopper forward does not hide one here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

import hasten
from hasten.masks import Causal, Global, Mask, Padding, Window
from hasten.ops import portable
from hasten.ops.call import Gradients
from hasten.ops.hopper import backward_launch, refuses
from tests.ops import promises, tables
from tests.ops.cases import Case, call, check, make, solve

pytestmark = pytest.mark.gpu

CASES = [case for name in tables.GRIDS for case in getattr(tables, name)]
TILES = [
    Case(
        name=f"{kind}-{seqlen_q}x{seqlen_k}-{head_dim}",
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        num_heads=4,
        num_kv_heads=2,
        mask=mask,
    )
    for head_dim in (64, 128, 256)
    for seqlen_q, seqlen_k in ((64, 128), (65, 129), (333, 333), (700, 191), (191, 700))
    for kind, mask in (
        ("full", tables.FULL),
        ("causal", tables.CAUSAL),
        ("window", tables.fixed(hasten.Window(70, 20))),
    )
]
BOTH_WAYS = pytest.mark.parametrize("served", [False, True], ids=["any-order", "deterministic"], indirect=True)
DETERMINISTIC = pytest.mark.parametrize("served", [True], ids=["deterministic"], indirect=True)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """Hopper's backward in the place of portable's wherever it has the features; how often it was called.

    The parameter says whether it is deterministic, whatever the call says: tests poison memory, which asks for it.
    """
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    count: list[int] = []
    real = portable.backward

    def backward(dout: Tensor, dlse: Tensor | None, *saved: Any) -> Gradients:
        *tensors, call = saved
        if refuses(*tensors[:3], call) is not None:
            return real(dout, dlse, *saved)
        count.append(1)
        return backward_launch.backward(dout, dlse, *tensors, replace(call, deterministic=request.param))

    monkeypatch.setattr(portable, "backward", backward)
    yield count


@BOTH_WAYS
@pytest.mark.parametrize("case", [*CASES, *TILES], ids=str)
def test_errs_no_more_than_pytorch(case: Case, served: list[int]) -> None:
    check(case, "portable", torch.bfloat16, "cuda")
    assert served or case not in TILES


@pytest.mark.parametrize("served", [False], ids=["any-order"], indirect=True)
@pytest.mark.parametrize("case", [*tables.DIMS, *tables.HEADS, *tables.PACKED], ids=str)
def test_errs_no_more_than_pytorch_in_float16(case: Case, served: list[int]) -> None:
    check(case, "portable", torch.float16, "cuda")


@DETERMINISTIC
@pytest.mark.parametrize("fill", promises.FILLS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("band", promises.PADDED)
def test_hidden_keys_do_not_leak(band: str, side: str, fill: str, served: list[int]) -> None:
    mask = promises.PADDED[band]
    promises.hidden_keys_do_not_leak(promises.FILLS[fill], side, mask, "portable", torch.bfloat16, "cuda")
    assert served


@DETERMINISTIC
@pytest.mark.parametrize("mask", [tables.LONGFORMER, tables.blocks(64, "bh")], ids=["longformer", "blocks-per-head"])
@pytest.mark.parametrize("head_dim", [16, 128, 256])
@pytest.mark.parametrize("fill", promises.FILLS)
def test_keys_that_a_list_hides_do_not_leak(fill: str, head_dim: int, mask: tables.Build, served: list[int]) -> None:
    """Keys from 60 on of the second sequence are seen by no row: some in a tile that is visited, some in none."""
    padding = Padding(torch.tensor([300, 60], dtype=torch.int32, device="cuda"))
    case = Case(name="holes", batch=2, seqlen_q=300, num_heads=4, num_kv_heads=2, head_dim=head_dim, upstream="both",
                mask=lambda *_: mask(*_) & padding)  # fmt: skip
    clean = make(case, torch.bfloat16, "cuda")
    k, v = clean.k.clone(), clean.v.clone()
    k[1, 60:], v[1, 60:] = promises.FILLS[fill], promises.FILLS[fill]
    want, got = promises.run(clean, "portable"), promises.run(replace(clean, k=k, v=v), "portable")
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert not got["dk"][1, 60:].any() and not got["dv"][1, 60:].any()
    assert len(served) == 2


@DETERMINISTIC
def test_packed_neighbours_do_not_leak(served: list[int]) -> None:
    promises.neighbours_do_not_leak("portable", torch.bfloat16, "cuda")
    assert served


@BOTH_WAYS
@pytest.mark.parametrize("kind", promises.EXTREMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_extremes_stay_finite(kind: str, dtype: torch.dtype, served: list[int]) -> None:
    promises.extremes_stay_finite(kind, "portable", dtype, "cuda")


@BOTH_WAYS
@pytest.mark.parametrize("mask", [tables.CAUSAL, tables.FULL, tables.LONGFORMER], ids=["causal", "full", "longformer"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_hundred_launches_agree(
    head_dim: int, mask: tables.Build, served: list[int], request: pytest.FixtureRequest
) -> None:
    """More tiles than programs. dk and dv bit for bit; dq too if deterministic, else up to the order of its sums."""
    case = Case(name="many", batch=2, seqlen_q=2048, num_heads=16, num_kv_heads=4, head_dim=head_dim, mask=mask)
    problem = make(case, torch.bfloat16, "cuda")
    leaves = [tensor.detach().requires_grad_() for tensor in (problem.q, problem.k, problem.v)]
    out = hasten.attention(*leaves, problem.mask, implementation="portable")
    first = torch.autograd.grad(out, leaves, problem.dout, retain_graph=True)
    is_deterministic = "deterministic" in request.node.callspec.id
    for _ in range(100):
        dq, dk, dv = torch.autograd.grad(out, leaves, problem.dout, retain_graph=True)
        assert torch.equal(dk, first[1]) and torch.equal(dv, first[2])
        if is_deterministic:
            assert torch.equal(dq, first[0])
        else:
            torch.testing.assert_close(dq, first[0], rtol=1e-2, atol=1e-3)
    assert len(served) == 101


@BOTH_WAYS
@pytest.mark.parametrize("mask", [Window(100, 100) | Global((0, 1, 5000)), Window(9, 9) | Global((8199,))], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_columns_are_cut_into_pieces(
    head_dim: int, mask: Mask, served: list[int], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Errors as a share of the result, of all keys and of those in pieces; a deterministic call has none."""
    added: list[int] = []
    real = backward_launch.plan_add
    monkeypatch.setattr(backward_launch, "plan_add", lambda *sizes: added.append(1) or real(*sizes))
    case = Case(name="long", batch=2, seqlen_q=8200, num_heads=4, num_kv_heads=2, head_dim=head_dim, upstream="both",
                mask=tables.fixed(mask))  # fmt: skip
    problem = make(case, torch.bfloat16, "cuda")
    want = solve(problem.to(torch.float32), lambda own: call(own, "portable"))
    assert not served
    first = promises.run(problem, "portable")
    for name, exact in want.items():
        for keys in (slice(None), slice(0, 64), slice(8192, None)) if name in ("dk", "dv") else (slice(None),):
            assert (first[name][:, keys].float() - exact[:, keys]).norm() <= 1e-2 * exact[:, keys].norm(), (name, keys)
    for _ in range(20):
        again = promises.run(problem, "portable")
        assert torch.equal(again["dk"], first["dk"]) and torch.equal(again["dv"], first["dv"])
    is_deterministic = "deterministic" in request.node.callspec.id
    assert len(served) == 21 and len(added) == (0 if is_deterministic else 21)


@DETERMINISTIC
def test_an_output_gradient_that_tma_cannot_read_is_copied(served: list[int]) -> None:
    q, k, v = (torch.randn(1, 100, 2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))
    out = hasten.attention(q, k, v, Causal(), implementation="portable")
    want = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    got = torch.autograd.grad(out.sum(), (q, k, v))
    assert len(served) == 2
    for have, exact in zip(got, want, strict=True):
        assert torch.equal(have, exact)
