"""merge: attention over split keys is attention over all of them, with gradients, in both layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import ArgumentError
from hasten.masks import Causal, Window
from tests.ops.cases import laid_out, poisoned

pytestmark = [
    # the interpreter of triton 3.6 on numpy 2, and what numpy says of infinities that are meant
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

F64 = torch.float64


def inputs(seqlen_q: int, seqlen_k: int, dtype: torch.dtype = F64, heads: int = 4) -> list[Tensor]:
    sizes = ((seqlen_q, heads), (seqlen_k, heads // 2), (seqlen_k, heads // 2))
    return [torch.randn(2, seqlen, own, 8, dtype=dtype, requires_grad=True) for seqlen, own in sizes]


def split(q: Tensor, k: Tensor, v: Tensor, cuts: list[int], **options: object) -> list[tuple[Tensor, Tensor]]:
    parts = zip(k.split(cuts, dim=1), v.split(cuts, dim=1), strict=True)
    return [hasten.attention(q, own_k, own_v, return_lse=True, **options) for own_k, own_v in parts]


@pytest.mark.parametrize("cuts", [[10], [3, 7], [1, 1, 8], [5, 0, 5], [0, 10]], ids=str)
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_split_keys_make_the_whole(cuts: list[int], implementation: str) -> None:
    leaves = inputs(6, sum(cuts))
    want = hasten.attention(*leaves, return_lse=True, implementation="reference")
    got = hasten.merge(split(*leaves, cuts, implementation=implementation))
    dout, dlse = torch.randn_like(want[0]), torch.randn_like(want[1])
    for have, exact in zip(got, want, strict=True):
        torch.testing.assert_close(have, exact, rtol=1e-10, atol=1e-12)
    wants, gots = (torch.autograd.grad(pair, leaves, (dout, dlse)) for pair in (want, got))
    for have, exact in zip(gots, wants, strict=True):
        torch.testing.assert_close(have, exact, rtol=1e-9, atol=1e-11)


def test_causal_keys_in_parts_with_rows_that_see_nothing() -> None:
    """The first part ends before some queries begin to see, the second is hidden from the early ones."""
    leaves = inputs(12, 12)
    q, k, v = leaves
    want = hasten.attention(q, k, v, Causal(), return_lse=True, implementation="reference")
    keep = Causal().keep(12)
    parts = []
    for rows in (slice(0, 5), slice(5, 12)):
        hidden = torch.zeros(12, rows.stop - rows.start, dtype=F64).masked_fill(~keep[0, 0, :, rows], -torch.inf)
        parts.append(hasten.attention(q, k[:, rows], v[:, rows], bias=hidden, return_lse=True))
    assert (parts[1][1][..., :5] == -torch.inf).all()
    got = hasten.merge(parts)
    for have, exact in zip(got, want, strict=True):
        torch.testing.assert_close(have, exact, rtol=1e-10, atol=1e-12)
    wants, gots = (torch.autograd.grad(pair, leaves, [torch.ones_like(t) for t in pair]) for pair in (want, got))
    for have, exact in zip(gots, wants, strict=True):
        torch.testing.assert_close(have, exact, rtol=1e-9, atol=1e-11)


def test_parts_that_saw_nothing_add_nothing() -> None:
    q, k, v = inputs(6, 6)
    for before, after in ((0, 1), (1, 0), (1, 1)):
        part = hasten.attention(q, k, v, return_lse=True)
        nothing = (torch.zeros_like(part[0]), torch.full_like(part[1], -torch.inf))
        out, lse = hasten.merge([nothing] * before + [part] + [nothing] * after)
        torch.testing.assert_close(out, part[0])
        torch.testing.assert_close(lse, part[1])
        grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
        assert all(grad.isfinite().all() for grad in grads)


def test_only_nothing_is_nothing_with_gradients_zero() -> None:
    outs = [torch.zeros(1, 3, 2, 4, requires_grad=True) for _ in range(2)]
    lses = [torch.full((1, 2, 3), -torch.inf, requires_grad=True) for _ in range(2)]
    out, lse = hasten.merge(list(zip(outs, lses, strict=True)))
    assert not out.any() and (lse == -torch.inf).all()
    grads = torch.autograd.grad((out, lse), (*outs, *lses), (torch.ones_like(out), torch.ones_like(lse)))
    assert not any(grad.any() for grad in grads)


def test_one_part_is_itself() -> None:
    q, k, v = inputs(6, 6, torch.float32)
    part = hasten.attention(q, k, v, Window(1, 1), return_lse=True)
    for have, want in zip(hasten.merge([part]), part, strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_halves_are_summed_in_float32_and_keep_their_dtype(dtype: torch.dtype) -> None:
    q, k, v = inputs(16, 64, torch.float32)
    halves = [t.detach().to(dtype) for t in (q, k, v)]
    exact = hasten.attention(*(t.double() for t in halves), implementation="reference")
    out, lse = hasten.merge(split(*halves, [8] * 8))
    assert out.dtype == dtype and lse.dtype == torch.float32
    whole = (hasten.attention(*halves) - exact).abs()
    error = (out - exact).abs()
    assert error.max() <= 2 * whole.max() + 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_packed_parts() -> None:
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    q, k, v = (torch.randn(9, heads, 8, dtype=F64, requires_grad=True) for heads in (4, 2, 2))
    packed = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 5, "max_seqlen_k": 5, "return_lse": True}
    want = hasten.attention(q, k, v, **packed)
    first, second = [0, 1, 4, 5], [2, 3, 6, 7, 8]  # keys of each sequence, in two parts
    parts = []
    for own, ends in ((first, [0, 2, 2, 4]), (second, [0, 2, 2, 5])):
        packed["cu_seqlens_k"] = torch.tensor(ends, dtype=torch.int32)
        parts.append(hasten.attention(q, k[own], v[own], **packed))
    got = hasten.merge(parts)
    for have, exact in zip(got, want, strict=True):
        torch.testing.assert_close(have, exact, rtol=1e-10, atol=1e-12)
    wants, gots = (torch.autograd.grad(pair, (q, k, v), [torch.ones_like(t) for t in pair]) for pair in (want, got))
    for have, exact in zip(gots, wants, strict=True):
        torch.testing.assert_close(have, exact, rtol=1e-9, atol=1e-11)


def test_gradients_are_finite_differences_twice() -> None:
    outs = [torch.randn(1, 2, 2, 3, dtype=F64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 2, dtype=F64, requires_grad=True) for _ in range(3)]

    def merge(*flat: Tensor) -> tuple[Tensor, Tensor]:
        return hasten.merge(list(zip(flat[:3], flat[3:], strict=True)))

    assert torch.autograd.gradcheck(merge, (*outs, *lses))
    assert torch.autograd.gradgradcheck(merge, (*outs, *lses))


def test_scores_of_any_size_do_not_overflow() -> None:
    out = torch.ones(1, 1, 1, 1)
    merged, lse = hasten.merge([(out, torch.full((1, 1, 1), 1e4)), (3 * out, torch.full((1, 1, 1), 1e4))])
    assert merged.item() == 2.0 and lse.item() == pytest.approx(1e4 + 0.6931, rel=1e-6)
    merged, lse = hasten.merge([(out, torch.full((1, 1, 1), -1e4)), (3 * out, torch.full((1, 1, 1), 1e4))])
    assert merged.item() == 3.0 and lse.item() == 1e4


@pytest.mark.parametrize(
    ("shapes", "argument"),
    [
        ([((1, 3, 2, 4), (1, 3, 2))], "parts[0]"),
        ([((1, 3, 2, 4), (1, 2, 3)), ((1, 3, 2, 5), (1, 2, 3))], "parts[1]"),
        ([((1, 3, 2, 4), (1, 2, 3)), ((1, 3, 2, 4), (2, 3))], "parts[1]"),
        ([((3, 2, 4), (3, 2))], "parts[0]"),
    ],
    ids=str,
)
def test_parts_of_unequal_shape_are_refused(shapes: list[tuple[tuple[int, ...], ...]], argument: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        hasten.merge([(torch.zeros(out), torch.zeros(lse)) for out, lse in shapes])
    assert refused.value.argument == argument


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(ArgumentError, match="parts: expected at least one"):
        hasten.merge([])


EVERYWHERE = pytest.mark.parametrize(
    ("dtype", "device"),
    [
        pytest.param(torch.float32, "cpu", id="plain"),
        pytest.param(torch.float32, "cpu", id="interpreted", marks=pytest.mark.interpreter),
        *(
            pytest.param(dtype, "cuda", id=name, marks=pytest.mark.gpu)
            for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
        ),
    ],
)


@EVERYWHERE
@pytest.mark.parametrize("layout", ["contiguous", "heads_first", "sliced_heads", "every_second", "misaligned"])
@pytest.mark.parametrize("shape", [(2, 37, 3, 24), (70, 2, 40), (1, 1, 1, 256)], ids=str)
def test_random_parts_err_by_rounding_only(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str
) -> None:
    """Any parts, -inf among them and large numbers too, against float64: in kernels as in PyTorch."""
    rows = (*shape[:-3], shape[-2], shape[-3])
    outs = [laid_out(torch.randn(shape, device=device).to(dtype), layout).requires_grad_() for _ in range(3)]
    lses = [
        torch.randn(rows, device=device).masked_fill(torch.rand(rows, device=device) < 0.4, -torch.inf)
        for _ in range(3)
    ]
    lses = [(lse + torch.randint(2, rows, device=device) * 4096.0).requires_grad_() for lse in lses]
    with poisoned():
        got = hasten.merge(list(zip(outs, lses, strict=True)))
        dout, dlse = (torch.randn_like(tensor) for tensor in got)
        grads = torch.autograd.grad(got, (*outs, *lses), (dout, dlse))
    exact = [tensor.detach().double().requires_grad_() for tensor in (*outs, *lses)]
    want = hasten.merge(list(zip(exact[:3], exact[3:], strict=True)))
    wants = torch.autograd.grad(want, exact, (dout.double(), dlse.double()))
    eps = max(torch.finfo(dtype).eps, 4096 * torch.finfo(torch.float32).eps)
    for have, right in zip((*got, *grads), (*want, *wants), strict=True):
        assert have.dtype in (dtype, torch.float32)
        torch.testing.assert_close(have.double(), right, rtol=4 * eps, atol=16 * eps)
    assert torch.equal(got[1] == -torch.inf, want[1] == -torch.inf)


@EVERYWHERE
def test_many_parts(dtype: torch.dtype, device: str) -> None:
    """As many as a split over keys may make."""
    outs = [torch.randn(1, 5, 2, 16, device=device).to(dtype) for _ in range(33)]
    lses = [torch.randn(1, 2, 5, device=device) for _ in range(33)]
    out, lse = hasten.merge(list(zip(outs, lses, strict=True)))
    want, want_lse = hasten.merge([(o.double(), s.double()) for o, s in zip(outs, lses, strict=True)])
    torch.testing.assert_close(out.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@EVERYWHERE
def test_empty_parts(dtype: torch.dtype, device: str) -> None:
    for shape, rows in (((0, 3, 2, 8), (0, 2, 3)), ((2, 0, 2, 8), (2, 2, 0)), ((0, 2, 8), (2, 0))):
        part = (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(rows, device=device))
        out, lse = hasten.merge([part, part])
        assert out.shape == shape and lse.shape == rows
