"""The Hopper forward held to the contract on a GPU, before the backward of the portable kernels; then both of Hopper.

So that a fault of either is seen where it is. What is left out: float32, which is outside the envelope.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

import hasten
from hasten.errors import UnsupportedError
from hasten.masks import Causal, Full, Global, Padding, Window
from hasten.ops import attention as public
from hasten.ops import choose, hopper, portable
from hasten.ops.call import Call
from hasten.ops.hopper import launch
from tests.ops import promises, tables
from tests.ops.cases import Case, call, check, make, poisoned, solve

pytestmark = pytest.mark.gpu

CASES = [case for name in tables.GRIDS for case in getattr(tables, name)]
MASKS = {
    "full": tables.FULL,
    "causal": tables.CAUSAL,
    "window": tables.fixed(Window(70, 20)),
    "longformer": tables.LONGFORMER,
    "blocks": tables.blocks(64, "bh"),
}
TILES = [
    Case(name=f"{kind}-{seqlen_q}x{seqlen_k}-{head_dim}", batch=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k,
         head_dim=head_dim, num_heads=4, num_kv_heads=2, mask=mask)
    for head_dim in (64, 128, 256)
    for seqlen_q, seqlen_k in ((128, 128), (333, 333), (1000, 191), (191, 1000))
    for kind, mask in MASKS.items()
]  # fmt: skip
PACKED = [
    Case(name=f"packed-{kind}-{head_dim}", lengths=((1000, 1000), (3, 500), (777, 777), (0, 5), (513, 1)),
         head_dim=head_dim, num_heads=4, num_kv_heads=2, mask=MASKS[kind])
    for head_dim in (64, 128, 256)
    for kind in ("full", "causal", "window")
]  # fmt: skip
LARGE = [
    Case(name=f"{kind}-{head_dim}", batch=2, seqlen_q=2048, num_heads=16, num_kv_heads=4, head_dim=head_dim,
         mask=MASKS[kind], lengths=PACKED[0].lengths if kind == "window" else None)
    for head_dim in (64, 128, 256)
    for kind in ("causal", "longformer", "window")
]  # fmt: skip


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Hopper's forward in the place of portable's wherever it takes the call; how often it did."""
    count: list[int] = []
    real = portable.forward

    def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        if hopper.refuses(q, k, v, call) is not None:
            return real(q, k, v, call)
        count.append(1)
        return launch.forward(q, k, v, call)

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(portable, "forward", forward)
    yield count


@pytest.mark.parametrize("case", [*CASES, *TILES, *PACKED], ids=str)
def test_errs_no_more_than_pytorch(case: Case, served: list[int]) -> None:
    check(case, "portable", torch.bfloat16, "cuda")
    if case in TILES or case in PACKED:
        assert served


@pytest.mark.parametrize("case", [*tables.DIMS, *tables.HEADS, *tables.PACKED, *TILES[:10]], ids=str)
def test_errs_no_more_than_pytorch_in_float16(case: Case, served: list[int]) -> None:
    check(case, "portable", torch.float16, "cuda")


def is_near(out: Tensor, want: Tensor) -> None:
    """Assert that `out` is what bfloat16 makes of `want`, which rounds by 2^-8 at most.

    It does so to each probability, by 2^-9.3 in the mean square, then to each result. The first adds up to an error of
    the size of a row's values times 2^-9.3, whatever an element is; ten times that is allowed, which chance does not
    reach in 10 million elements, and twice what both make in the mean.
    """
    error, row = (out.float() - want).abs(), want.square().mean(-1, keepdim=True).sqrt()
    assert (error <= 2**-8 * want.abs() + 2**-6 * row).all(), float((error / row).nan_to_num(0.0).max())
    mean = (error / row).nan_to_num(0.0).mean()  # a row that sees nothing is exactly 0
    assert mean <= 2**-8, float(mean)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", [tables.FULL, tables.CAUSAL], ids=["full", "causal"])
def test_every_tile_of_the_table_is_right(mask: tables.Build, head_dim: int, served: list[int]) -> None:
    """Long enough for each line that the table has for a head_dim, and more items than the GPU takes at once."""
    for seqlen in (1000, 8200):
        heads = 40 if seqlen == 1000 else 2
        case = Case(name="long", seqlen_q=seqlen, num_heads=heads, num_kv_heads=2, head_dim=head_dim, mask=mask)
        problem = make(case, torch.bfloat16, "cuda")
        out, lse = call(problem, "portable")
        want, exact = call(problem.to(torch.float32), "portable")
        is_near(out, want)
        torch.testing.assert_close(lse, exact, rtol=1e-5, atol=1e-5)
    assert len(served) == 2


LONG_ROWS = {
    "longformer": {"mask": tables.fixed(Window(100, 100) | Global((0, 1, 5000)))},
    "sinks": {"mask": tables.fixed(Window(100, 100) | Global((8199,))), "has_sinks": True, "softcap": 5.0},
    "padded": {"mask": tables.both(tables.fixed(Window(9, 9) | Global((0,))), tables.padding(8200, 4000))},
    "per-head": {"mask": tables.fixed(Window(40, 40, dilation=(1, 1, 2, 3)) | Global((7,)))},
}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", LONG_ROWS)
def test_long_rows_are_cut_into_pieces(
    kind: str, head_dim: int, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[int] = []
    real = launch.plan_merge
    monkeypatch.setattr(launch, "plan_merge", lambda *sizes: merged.append(1) or real(*sizes))
    case = Case(name=kind, batch=2, seqlen_q=8200, num_heads=4, num_kv_heads=2, head_dim=head_dim, **LONG_ROWS[kind])
    problem = make(case, torch.bfloat16, "cuda")
    want, exact = call(problem.to(torch.float32), "portable")
    assert not served
    first = None
    for _ in range(20):  # which of the pieces end first changes nothing
        with poisoned():
            out, lse = call(problem, "portable")
        is_near(out, want)
        torch.testing.assert_close(lse, exact, rtol=1e-5, atol=1e-5)
        first = first or (out, lse)
        assert torch.equal(out, first[0]) and torch.equal(lse, first[1])
    assert len(served) == len(merged) == 20


@pytest.mark.parametrize("fill", promises.FILLS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("band", promises.PADDED)
def test_hidden_keys_do_not_leak(band: str, side: str, fill: str, served: list[int]) -> None:
    mask = promises.PADDED[band]
    promises.hidden_keys_do_not_leak(promises.FILLS[fill], side, mask, "portable", torch.bfloat16, "cuda")
    assert served


@pytest.mark.parametrize("head_dim", [16, 128, 256])
@pytest.mark.parametrize("fill", promises.FILLS)
def test_keys_that_a_list_hides_do_not_leak(fill: str, head_dim: int, served: list[int]) -> None:
    """Holes in a tile that some row visits: keys 60 to 200 are padding of the second sequence."""
    lengths = torch.tensor([300, 60], dtype=torch.int32, device="cuda")
    case = Case(name="holes", batch=2, seqlen_q=300, head_dim=head_dim,
                mask=lambda *_: tables.LONGFORMER(*_) & Padding(lengths))  # fmt: skip
    clean = make(case, torch.bfloat16, "cuda")
    k, v = clean.k.clone(), clean.v.clone()
    k[1, 60:], v[1, 60:] = promises.FILLS[fill], promises.FILLS[fill]
    for got, want in zip(call(replace(clean, k=k, v=v), "portable"), call(clean, "portable"), strict=True):
        assert torch.equal(got, want)
    assert len(served) == 2


def test_packed_neighbours_do_not_leak(served: list[int]) -> None:
    promises.neighbours_do_not_leak("portable", torch.bfloat16, "cuda")
    assert served


@pytest.mark.parametrize("kind", promises.EXTREMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_extremes_stay_finite(kind: str, dtype: torch.dtype, served: list[int]) -> None:
    promises.extremes_stay_finite(kind, "portable", dtype, "cuda")


@pytest.mark.parametrize("case", promises.REPEATED, ids=str)
def test_a_hundred_launches_are_equal(case: Case, served: list[int]) -> None:
    promises.runs_repeat(case, 100, "portable", torch.bfloat16, "cuda")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_hundred_launches_that_fill_the_gpu_are_equal(head_dim: int, served: list[int]) -> None:
    case = Case(name="many", batch=4, seqlen_q=2048, num_heads=16, num_kv_heads=4, head_dim=head_dim,
                mask=tables.CAUSAL)  # fmt: skip
    problem = make(case, torch.bfloat16, "cuda")
    out, lse = call(problem, "portable")
    for number in range(100):
        again = call(problem, "portable")
        assert torch.equal(again[0], out) and torch.equal(again[1], lse), f"run {number}"
    assert len(served) == 101


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_a_hundred_deterministic_runs_are_equal(case: Case, served: list[int]) -> None:
    """Outputs and all gradients, asked for by the public function; more tiles than programs but for the packed ones."""
    promises.runs_repeat(case, 100, "hopper", torch.bfloat16, "cuda")


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "row", "head"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_offsets_are_wide(name: str, dim: int, served: list[int]) -> None:
    promises.offsets_are_wide(name, dim, "portable", torch.bfloat16, "cuda")
    assert len(served) == 2


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_tensors_of_more_than_two_to_the_31_elements(is_packed: bool, served: list[int]) -> None:
    seqlen, heads, dim, last = 1_050_000, 16, 128, 600
    shape = (seqlen, heads, dim) if is_packed else (1, seqlen, heads, dim)
    rows = 0 if is_packed else 1
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(3))
    options = {}
    if is_packed:
        bounds = torch.arange(0, seqlen + 1, 300, dtype=torch.int32, device="cuda")
        options = {f"cu_seqlens_{side}": bounds for side in "qk"} | {f"max_seqlen_{side}": 300 for side in "qk"}
    got = hasten.attention(q, k, v, Window(64, 0), implementation="portable", **options)
    own = [tensor.narrow(rows, seqlen - last, last).double() for tensor in (q, k, v)]
    if is_packed:
        few = torch.tensor([0, 300, 600], dtype=torch.int32, device="cuda")
        options |= {f"cu_seqlens_{side}": few for side in "qk"}
    want = hasten.attention(*own, Window(64, 0), implementation="reference", **options)
    seen = 300  # rows so late that what they see lies in the last 600
    close = (got.narrow(rows, seqlen - seen, seen).double(), want.narrow(rows, last - seen, seen))
    torch.testing.assert_close(*close, rtol=2e-2, atol=2e-2)
    assert served


def test_a_captured_graph_gives_the_same_again(served: list[int]) -> None:
    q, k, v = (torch.randn(2, 1000, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    want = hasten.attention(q, k, v, Causal(), implementation="portable")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hasten.attention(q, k, v, Causal(), implementation="portable")
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)


def chosen(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, q: Tensor | None = None, **terms) -> str:
    """Which implementation is chosen for a call."""
    q = torch.randn(2, 100, 4, head_dim, device="cuda", dtype=dtype) if q is None else q
    arguments = {
        "mask": Causal(),
        "softmax_scale": None,
        "softcap": None,
        "sinks": None,
        "bias": None,
        "dropout_p": 0.0,
    }
    arguments |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
    ready = public.prepare(q, q, q, **{**arguments, **terms})
    return choose.choose(ready.q, ready.k, ready.v, ready.call, None)[0]


def test_it_is_chosen_first_and_not_where_it_refuses(served: list[int]) -> None:
    assert chosen() == "hopper" and chosen(head_dim=72) == "hopper" and chosen(torch.float16) == "hopper"
    assert chosen(deterministic=True) == "hopper"
    assert chosen(softcap=5.0, sinks=torch.zeros(4, device="cuda")) == "hopper"
    far = torch.randn(1 + 2 * 100 * 4 * 64, device="cuda", dtype=torch.bfloat16)[1:].view(2, 100, 4, 64)
    refused = {
        "float32": {"dtype": torch.float32},
        "head_dim": {"head_dim": 12},
        "bias": {"bias": torch.zeros(100, 100, device="cuda")},
        "dropout": {"dropout_p": 0.1},
        "start at a multiple": {"q": far},
        "strides": {"q": torch.randn(2, 100, 1, 64, device="cuda", dtype=torch.bfloat16).expand(2, 100, 4, 64)},
    }
    for terms in refused.values():
        assert chosen(**terms) == "portable", terms
    q = torch.randn(2, 100, 4, 64, device="cuda")
    with pytest.raises(UnsupportedError, match="float16 and bfloat16"):
        hasten.attention(q, q, q, implementation="hopper")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", MASKS)
def test_forward_and_backward_together(kind: str, head_dim: int, served: list[int]) -> None:
    """Twice, since a launch is prepared the first time; errors as a share of the result, twice what bf16 rounds."""
    case = Case(name=kind, batch=2, seqlen_q=333, num_heads=4, num_kv_heads=2, head_dim=head_dim, mask=MASKS[kind])
    problem = make(case, torch.bfloat16, "cuda")
    want = solve(problem.to(torch.float64), lambda own: call(own, "reference"))
    for deterministic in (False, False, True, True):
        got = solve(problem, lambda own, chosen=deterministic: call(own, "hopper", deterministic=chosen))
        for name, exact in want.items():
            shown = torch.where(exact.isfinite(), got[name].double() - exact, 0.0).norm()
            assert shown <= 1e-2 * torch.where(exact.isfinite(), exact, 0.0).norm(), name


def test_another_length_after_the_first_is_right_too(served: list[int]) -> None:
    for seqlen_q, seqlen_k in [(80, 80), (81, 96), (300, 81), (80, 80), (128, 300)]:
        for mask in (tables.CAUSAL, tables.LONGFORMER):
            check(
                Case(name="sweep", seqlen_q=seqlen_q, seqlen_k=seqlen_k, mask=mask), "portable", torch.bfloat16, "cuda"
            )


def test_the_package_has_what_an_implementation_has() -> None:
    assert callable(hopper.forward) and callable(hopper.backward) and callable(hopper.refuses)
    q = torch.randn(1, 8, 1, 64)
    refused = hopper.refuses(q, q, q, Call(mask=Full(), softmax_scale=1.0, max_seqlen_q=8, max_seqlen_k=8))
    assert refused is not None and "Hopper" in refused
