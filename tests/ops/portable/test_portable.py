"""The Triton kernels held to the contract: small grids in the interpreter, the whole of them on a GPU.

Points left out in the interpreter, with reasons: bfloat16, which the interpreter of triton 3.6 computes wrongly; of
float16 what float32 has already shown, because a minute there is a second on a GPU; most sequences of 1,000.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import UnsupportedError
from hasten.masks import Causal, Full, Window
from tests.ops import promises, tables
from tests.ops.cases import TORCH_SEED, Case, call, check, make

pytestmark = [
    # the interpreter of triton 3.6 on numpy 2, and what numpy says of infinities that are meant
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
ALL = [case for name in tables.GRIDS for case in getattr(tables, name)]
BIG_DIMS = {f"dim-{sizes}" for sizes in ("128-128", "160-160", "192-192", "256-256", "192-128", "64-256")}
SOME_FP16 = {
    "causal-129x129",
    "full-17x127",
    "8-on-2",
    "dim-72-72",
    "dim-40-72",
    "inputs-misaligned",
    "inputs-every_second",
    "window-70-20",
    "longformer",
    "blocks-24-per-head",
    "documents-per-row",
    "padding-causal-left",
    "dense-per-row",
    "softcap-alibi",
    "sinks-empty-rows",
    "bias-hqk",
    "bias-hides",
    "alibi-documents",
    "dropout-causal-gqa",
    "lse-documents",
    "everything-band",
    "everything-lists",
    "packed-crossed-causal",
    "packed-no-both",
    "packed-softcap-sinks",
}
HERE_FP16 = {
    "causal-127x127",
    "dim-40-72",
    "inputs-misaligned",
    "longformer",
    "dense-per-row",
    "softcap-alibi",
    "bias-hqk",
    "dropout-causal-gqa",
    "everything-lists",
    "packed-crossed-causal",
}
SOME_GPU = SOME_FP16 | {
    case.name for case in [*tables.DIMS, *tables.LENGTHS, *tables.HEADS, *tables.EMPTY, *tables.LONG]
}


def points() -> Iterable[object]:
    """(case, dtype, device): where each case runs, and in which dtypes."""
    for case in ALL:
        here = [torch.float32, torch.float16] if case.name in HERE_FP16 else [torch.float32]
        if case.name == "full-1000x777" or case.name in BIG_DIMS - {"dim-256-256", "dim-192-128"}:
            here = []
        there = [torch.bfloat16, torch.float16, torch.float32] if case.name in SOME_GPU else [torch.bfloat16]
        for device, dtypes, mark in (("cpu", here, pytest.mark.interpreter), ("cuda", there, pytest.mark.gpu)):
            for dtype in dtypes:
                yield pytest.param(case, dtype, device, id=f"{case.name}-{NAMES[dtype]}-{device}", marks=mark)


def here_and_there(*there: torch.dtype) -> pytest.MarkDecorator:
    """float32 in the interpreter, and some dtypes on a GPU."""
    mine = [pytest.param(torch.float32, "cpu", id="fp32-cpu", marks=pytest.mark.interpreter)]
    theirs = [pytest.param(dtype, "cuda", id=f"{NAMES[dtype]}-cuda", marks=pytest.mark.gpu) for dtype in there]
    return pytest.mark.parametrize(("dtype", "device"), [*mine, *theirs])


@pytest.mark.parametrize(("case", "dtype", "device"), list(points()))
def test_errs_no_more_than_pytorch(case: Case, dtype: torch.dtype, device: str) -> None:
    check(case, "portable", dtype, device)


@here_and_there(torch.bfloat16)
@pytest.mark.parametrize("fill", promises.FILLS)
@pytest.mark.parametrize(
    ("band", "side"), [("full", "right"), ("causal", "left"), ("causal", "right"), ("window", "left")]
)
def test_hidden_keys_do_not_leak(band: str, side: str, fill: str, dtype: torch.dtype, device: str) -> None:
    promises.hidden_keys_do_not_leak(promises.FILLS[fill], side, promises.PADDED[band], "portable", dtype, device)


@here_and_there(torch.bfloat16)
def test_packed_neighbours_do_not_leak(dtype: torch.dtype, device: str) -> None:
    promises.neighbours_do_not_leak("portable", dtype, device)


@here_and_there(torch.bfloat16, torch.float16, torch.float32)
@pytest.mark.parametrize("kind", promises.EXTREMES)
def test_extremes_stay_finite(kind: str, dtype: torch.dtype, device: str) -> None:
    promises.extremes_stay_finite(kind, "portable", dtype, device)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", promises.REPEATED[:2], ids=str)
def test_two_runs_are_equal(case: Case) -> None:
    promises.runs_repeat(replace(case, batch=1, seqlen_q=72, head_dim=16), 2, "portable", torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", promises.REPEATED, ids=str)
def test_a_hundred_launches_are_equal(case: Case, dtype: torch.dtype) -> None:
    promises.runs_repeat(case, 100, "portable", dtype, "cuda")


@pytest.mark.gpu
def test_a_hundred_launches_that_fill_the_gpu_are_equal() -> None:
    case = Case(
        name="many tiles", batch=4, seqlen_q=2048, num_heads=16, num_kv_heads=4, head_dim=128, mask=tables.CAUSAL
    )
    promises.runs_repeat(case, 100, "portable", torch.bfloat16, "cuda")


@here_and_there(torch.float32)
@pytest.mark.parametrize("mask", [tables.CAUSAL, tables.LONGFORMER], ids=["causal", "longformer"])
def test_another_length_after_the_first_is_right_too(mask: tables.Build, dtype: torch.dtype, device: str) -> None:
    """Compiled kernels and kept tile lists are reused only where they fit."""
    for seqlen_q, seqlen_k in [(80, 80), (81, 96), (96, 81), (80, 80), (128, 96)]:
        check(Case(name="sweep", seqlen_q=seqlen_q, seqlen_k=seqlen_k, mask=mask), "portable", dtype, device)


@pytest.mark.gpu
def test_a_sweep_of_lengths_compiles_few_kernels() -> None:
    """Triton specialises on 1 and on multiples of 16; beyond that a length is a number, not a program."""
    from triton.runtime.jit import JITFunction

    compiled: list[object] = []
    real = JITFunction._do_compile

    def count(self: object, *args: object, **options: object) -> object:
        compiled.append(self)
        return real(self, *args, **options)

    draw = random.Random(0)
    lengths = [draw.randrange(2, 600) for _ in range(60)]
    JITFunction._do_compile = count
    try:
        for seqlen in lengths:
            q, k, v = (torch.randn(2, seqlen, 2, 32, device="cuda", requires_grad=True) for _ in range(3))
            hasten.attention(q, k, v, Causal(), implementation="portable").sum().backward()
    finally:
        JITFunction._do_compile = real
    assert len(compiled) <= 4 * 4, f"{len(compiled)} kernels for {len(set(lengths))} lengths"


@here_and_there(torch.float16)
def test_a_mask_on_another_device_is_moved(dtype: torch.dtype, device: str) -> None:
    mask = hasten.Window(5, 5) | hasten.Global(torch.arange(70) % 30 == 0)
    check(Case(name="moved", seqlen_q=70, mask=tables.fixed(mask)), "portable", dtype, device)


@here_and_there(torch.bfloat16)
def test_dropout_is_the_same_in_every_tile_shape(dtype: torch.dtype, device: str) -> None:
    """The cells that go are those of the reference, whatever the head_dim makes of the tiles."""
    for head_dim in (16, 128):
        q, k = (torch.zeros(1, 100, 2, head_dim, dtype=dtype, device=device) for _ in range(2))
        v = torch.eye(100, dtype=dtype, device=device)[None, :, None].expand(1, 100, 2, 100)
        outs = []
        for implementation in ("portable", "reference"):
            torch.manual_seed(TORCH_SEED)
            outs.append(hasten.attention(q, k, v, dropout_p=0.4, implementation=implementation))
        assert torch.equal(outs[0] > 0, outs[1] > 0)
        assert 0.35 < (outs[0] == 0).float().mean() < 0.45


@pytest.mark.interpreter
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "row", "head"])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_offsets_are_wide(name: str, dim: int) -> None:
    promises.offsets_are_wide(name, dim, "portable", torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "row", "head"])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_offsets_are_wide_on_a_gpu(name: str, dim: int) -> None:
    promises.offsets_are_wide(name, dim, "portable", torch.bfloat16, "cuda")


def last_rows(tensors: Iterable[Tensor], dim: int, length: int) -> list[Tensor]:
    """float64 leaves of the last rows of each tensor."""
    return [t.narrow(dim, t.shape[dim] - length, length).double().detach().requires_grad_() for t in tensors]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_tensors_of_more_than_two_to_the_31_elements(is_packed: bool) -> None:
    """1,050,000 tokens of 16 heads of 128: every one of q, k, v, out, dout, dq, dk, dv has 2.15e9 elements."""
    seqlen, heads, dim, last = 1_050_000, 16, 128, 600
    shape = (seqlen, heads, dim) if is_packed else (1, seqlen, heads, dim)
    rows = 0 if is_packed else 1
    q, k, v, dout = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(4))
    assert q.numel() > 2**31
    options, mask = {}, Window(64, 0)
    if is_packed:
        bounds = torch.arange(0, seqlen + 1, 300, dtype=torch.int32, device="cuda")
        options = {f"cu_seqlens_{side}": bounds for side in "qk"} | {f"max_seqlen_{side}": 300 for side in "qk"}
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = hasten.attention(*leaves, mask, implementation="portable", **options)
    grads = torch.autograd.grad(out, leaves, dout)
    own = last_rows((q, k, v), rows, last)
    if is_packed:
        options |= {
            f"cu_seqlens_{side}": torch.tensor([0, 300, 600], dtype=torch.int32, device="cuda") for side in "qk"
        }
    want = hasten.attention(*own, mask, implementation="reference", **options)
    wants = torch.autograd.grad(want, own, dout.narrow(rows, seqlen - last, last).double())
    seen = 300  # rows so late that what they see, and who sees them, lies in the last 600
    for got, exact in zip((out, *grads), (want, *wants), strict=True):
        close(got.narrow(rows, seqlen - seen, seen), exact.detach().narrow(rows, last - seen, seen))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(8300, 1, 16, 128), (28800, 15, 16, 72), (70000, 2, 1, 16), (2, 3, 66000, 16)], ids=str
)
def test_more_programs_than_a_grid_dimension_holds(shape: tuple[int, ...]) -> None:
    """Sizes that broke others: a batch of 8,300 single tokens, 2^31 bytes at head_dim 72, over 65,535 of a kind."""
    q, k, v, dout = (torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(4))
    out = hasten.attention(q, k, v, Causal(), implementation="portable")
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for batch, heads in ((slice(0, 2), slice(0, 2)), (slice(-2, None), slice(-2, None))):
        own = [t[batch, :, heads].double().detach().requires_grad_() for t in (q, k, v)]
        want = hasten.attention(*own, Causal(), implementation="reference")
        wants = torch.autograd.grad(want, own, dout[batch, :, heads].double())
        for got, exact in zip((out, *grads), (want, *wants), strict=True):
            close(got[batch, :, heads], exact.detach())


@pytest.mark.gpu
def test_a_bias_of_more_than_two_to_the_31_elements() -> None:
    seqlen, heads = 12_000, 15
    q, k, v = (torch.randn(1, seqlen, heads, 16, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    bias = torch.empty(1, heads, seqlen, seqlen, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    assert bias.numel() > 2**31
    out = hasten.attention(q, k, v, bias=bias, implementation="portable")
    (dbias,) = torch.autograd.grad(out, bias, torch.ones_like(out))
    own = bias[:, -1:, -8:].double().detach().requires_grad_()
    want = hasten.attention(
        *(t[:, rows, -1:].double() for t, rows in ((q, slice(-8, None)), (k, slice(None)), (v, slice(None)))),
        bias=own,
        implementation="reference",
    )
    close(out[:, -8:, -1:], want.detach())
    (exact,) = torch.autograd.grad(want, own, torch.ones_like(want))
    torch.testing.assert_close(dbias[:, -1:, -8:].double(), exact, rtol=5e-2, atol=1e-5)


@pytest.mark.gpu
def test_a_long_sequence_in_one_head() -> None:
    """131,072 tokens: 2^34 cells, so that a cell's number in 32 bits would not do."""
    seqlen = 131_072
    q, k, v = (torch.randn(1, seqlen, 1, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))
    out = hasten.attention(q, k, v, Causal(), implementation="portable")
    want = hasten.attention(q[:, -16:].double(), k.double(), v.double(), Causal(), implementation="reference")
    torch.testing.assert_close(out[:, -16:].double(), want, rtol=1e-2, atol=1e-4)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert dq.isfinite().all() and dk.isfinite().all() and dv.isfinite().all()


@pytest.mark.gpu
def test_head_dims_do_not_read_beyond_the_last_element() -> None:
    """The last row of the last head of a tensor that ends where its memory ends, in front of NaN."""
    for head_dim in (24, 72, 80):
        memory = torch.full((2 * 33 * 2 * head_dim + 4096,), torch.nan, dtype=torch.bfloat16, device="cuda")
        q, k, v = (memory.clone()[: 2 * 33 * 2 * head_dim].view(2, 33, 2, head_dim) for _ in range(3))
        for tensor in (q, k, v):
            tensor.copy_(torch.randn_like(tensor))
        out = hasten.attention(q, k, v, implementation="portable")
        close(out, hasten.attention(q.double(), k.double(), v.double(), implementation="reference"))


@here_and_there(torch.bfloat16)
def test_what_is_outside_the_envelope_is_refused(dtype: torch.dtype, device: str) -> None:
    wide = torch.zeros(1, 4, 1, 300, dtype=dtype, device=device)
    with pytest.raises(UnsupportedError, match=r"'portable'.*head_dim up to 256, got 300"):
        hasten.attention(wide, wide, wide, implementation="portable")
    with pytest.raises(UnsupportedError, match="float64"):
        hasten.attention(*(wide[..., :8].double() for _ in range(3)), implementation="portable")
    packed = wide[0, :, :, :8]
    bounds = torch.tensor([0, 4], dtype=torch.int32, device=device)
    with pytest.raises(UnsupportedError, match="Global"):
        hasten.attention(
            packed,
            packed,
            packed,
            hasten.Global((0,)),
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            implementation="portable",
        )


@pytest.mark.gpu
def test_it_is_the_first_choice_on_a_gpu() -> None:
    q = torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16, device="cuda")
    assert hasten.explain(q, q, q, Full()).implementation == "portable"
    wide = torch.zeros(1, 4, 1, 512, dtype=torch.bfloat16, device="cuda")
    explanation = hasten.explain(wide, wide, wide)
    assert explanation.implementation != "portable" and "512" in explanation.refused["portable"]


@here_and_there(torch.bfloat16)
def test_options_that_change_nothing_change_no_bit(dtype: torch.dtype, device: str) -> None:
    case = next(case for case in tables.MASKS if case.name == "longformer")
    problem = make(case, dtype, device)
    (out, lse), (same_out, same_lse) = call(problem, "portable"), call(problem, "portable", deterministic=True)
    assert torch.equal(out, same_out) and torch.equal(lse, same_lse)
