"""The contract of `hasten.attention` for the implementations in plain PyTorch; portable/test_portable.py has Triton."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import hasten
from tests.ops import cases as judge
from tests.ops import promises, tables
from tests.ops.cases import Case, call, check, make, poisoned

GRIDS = {name: getattr(tables, name) for name in tables.GRIDS}
ALL = [case for grid in GRIDS.values() for case in grid] + tables.PACKED_LISTS
CORE = [*tables.EVERYTHING, *tables.PACKED, *tables.PACKED_LISTS, *tables.LAYOUTS, *tables.EMPTY]
cases = pytest.mark.parametrize("case", ALL, ids=str)
core_cases = pytest.mark.parametrize("case", CORE, ids=str)
plain = pytest.mark.parametrize("implementation", ["reference", "blockwise"])
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@cases
def test_blockwise_errs_no_more_than_pytorch(case: Case, dtype: torch.dtype) -> None:
    check(case, "blockwise", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@core_cases
@plain
def test_plain_implementations_on_a_gpu(implementation: str, case: Case, dtype: torch.dtype) -> None:
    check(case, implementation, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@cases
def test_reference_errs_no_more_than_pytorch(case: Case, dtype: torch.dtype) -> None:
    check(case, "reference", dtype)


@core_cases
def test_the_chosen_implementation_errs_no_more_than_pytorch(case: Case) -> None:
    check(case, None, torch.float32)


def test_the_check_can_fail() -> None:
    """A window one key wider, one hidden value, a gradient of the wrong sign: each is refused."""
    case = Case(name="c", mask=tables.fixed(hasten.Window(9, 0)))
    wider = Case(name="c", mask=tables.fixed(hasten.Window(10, 0)))
    for dtype in (torch.float32, torch.bfloat16):
        problem = make(case, dtype)
        got = judge.solve(problem, lambda own: call(own, "reference"))
        exact = judge.solve(problem.to(torch.float64), lambda own: call(own, "reference"))
        sizes = judge.magnitudes(problem, exact)
        pytorch = judge.solve(problem, judge.eager)
        pytorch["lse"] = judge.eager(problem.to(torch.float32))[1]
        judge.compare(got, exact, pytorch, sizes)
        other = judge.solve(make(wider, dtype), lambda own: call(own, "reference"))
        for name in exact:
            with pytest.raises(AssertionError, match=name):
                judge.compare({**got, name: other[name]}, exact, pytorch, sizes)
        with pytest.raises(AssertionError, match="dq"):
            judge.compare({**got, "dq": -got["dq"]}, exact, pytorch, sizes)


def test_poisoned_memory_is_nan() -> None:
    with poisoned():
        assert torch.empty(3).isnan().all() and torch.zeros(2).new_empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("seqlen_k", [64, 100])
def test_full_attention_is_that_of_pytorch(seqlen_k: int) -> None:
    q, k, v = (torch.randn(2, seqlen, 4, 32, dtype=torch.float64) for seqlen in (64, seqlen_k, seqlen_k))
    want = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(hasten.attention(q, k, v), want)


@plain
def test_query_heads_share_kv_heads_in_order(implementation: str) -> None:
    q, k, v = torch.randn(1, 9, 6, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    out = hasten.attention(q, k, v, implementation=implementation)
    for head in range(6):
        own = [t[:, :, head // 3, None] for t in (k, v)]
        alone = hasten.attention(q[:, :, head, None], *own, implementation=implementation)
        torch.testing.assert_close(out[:, :, head, None], alone)


@plain
def test_causal_aligns_bottom_right(implementation: str) -> None:
    values = torch.arange(4.0).view(1, 4, 1, 1)
    out = hasten.attention(
        torch.zeros(1, 2, 1, 1), torch.zeros(1, 4, 1, 1), values, hasten.Causal(), implementation=implementation
    )
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 1.5]))  # the means of 0 1 2 and of 0 1 2 3


@plain
def test_results_have_the_promised_shapes(implementation: str) -> None:
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 3)
    out = hasten.attention(q, k, v, implementation=implementation)
    assert isinstance(out, torch.Tensor) and out.shape == (2, 5, 4, 3)
    out, lse = hasten.attention(q, k, v, return_lse=True, implementation=implementation)
    assert out.shape == (2, 5, 4, 3) and lse.shape == (2, 4, 5) and lse.dtype == torch.float32
    half, lse = hasten.attention(q.half(), k.half(), v.half(), return_lse=True, implementation=implementation)
    assert half.dtype == torch.float16 and lse.dtype == torch.float32
    double, lse = hasten.attention(q.double(), k.double(), v.double(), return_lse=True, implementation=implementation)
    assert double.dtype == torch.float64 and lse.dtype == torch.float64


@plain
def test_float64_is_exact_to_its_own_rounding(implementation: str) -> None:
    q, k, v = (torch.randn(1, 70, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = hasten.attention(q, k, v, hasten.Causal(), implementation=implementation)
    want = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    dout = torch.randn_like(out)
    for got, exact in zip(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(want, (q, k, v), dout), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_the_packed_longest_lengths_may_be_left_out() -> None:
    case = next(case for case in tables.PACKED if case.name == "packed-crossed-causal")
    problem = make(case, torch.float32)
    cu_q, cu_k = problem.cu_seqlens
    want, _ = call(problem, "blockwise")
    got = hasten.attention(
        problem.q, problem.k, problem.v, problem.mask, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, implementation="blockwise"
    )
    assert torch.equal(got, want)
    wide = hasten.attention(
        problem.q,
        problem.k,
        problem.v,
        problem.mask,
        cu_seqlens_q=cu_q.long(),
        cu_seqlens_k=cu_k.long(),
        implementation="blockwise",
    )
    assert torch.equal(wide, want), "int64 lengths are taken too"


def test_integers_of_numpy_are_lengths_too() -> None:
    from hasten.ops.attention import prepare

    q, bounds = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    longest = torch.tensor(3).numpy()[()]
    call_ = prepare(q, q, q, None, None, None, None, None, 0.0, bounds, bounds, longest, longest).call
    assert type(longest) is not int and type(call_.max_seqlen_q) is int and call_.max_seqlen_k == 3


def test_no_mask_is_full() -> None:
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    assert torch.equal(hasten.attention(q, k, v), hasten.attention(q, k, v, hasten.Full()))


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert hasten.ALiBi.for_heads(8).slopes.tolist() == [2.0**-n for n in range(1, 9)]
    torch.testing.assert_close(hasten.ALiBi.for_heads(16).slopes, torch.tensor([2 ** (-n / 2) for n in range(1, 17)]))
    torch.testing.assert_close(hasten.ALiBi.for_heads(3).slopes, torch.tensor([2**-4, 2**-8, 2**-2]))


def test_arguments_after_the_mask_are_named() -> None:
    parameters = inspect.signature(hasten.attention).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == ["q", "k", "v", "mask"]


@devices
@pytest.mark.parametrize("fill", promises.FILLS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("band", promises.PADDED)
@plain
def test_hidden_keys_do_not_leak(implementation: str, band: str, side: str, fill: str, device: str) -> None:
    promises.hidden_keys_do_not_leak(
        promises.FILLS[fill], side, promises.PADDED[band], implementation, torch.float32, device
    )


@devices
@plain
def test_packed_neighbours_do_not_leak(implementation: str, device: str) -> None:
    promises.neighbours_do_not_leak(implementation, torch.float32, device)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", promises.EXTREMES)
@plain
def test_extremes_stay_finite(implementation: str, kind: str, dtype: torch.dtype, device: str) -> None:
    promises.extremes_stay_finite(kind, implementation, dtype, device)


@devices
@pytest.mark.parametrize("case", promises.REPEATED, ids=str)
@plain
def test_runs_repeat_bit_for_bit(implementation: str, case: Case, device: str) -> None:
    promises.runs_repeat(case, 5, implementation, torch.float32, device)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "row", "head"])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_offsets_are_wide(name: str, dim: int) -> None:
    promises.offsets_are_wide(name, dim, "blockwise", torch.float16, "cpu")
