"""The decode kernels held to the contract: small cases in the interpreter, the same and larger ones on a GPU.

In the interpreter units are 64 keys and a group 512, so that short sequences have every kind of part. Left out there:
bfloat16, which the interpreter of triton 3.6 computes wrongly, and with it 8-bit caches under float16 queries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from hasten.masks import Window
from hasten.ops.decode import decode_attention
from hasten.ops.kv import ContiguousKV, PagedKV
from hasten.ops.portable import decode_launch
from tests.ops.decode_cases import CASES, QUANTIZED, DecodeCase, DecodeProblem, judge, make, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
HERE = pytest.param("cpu", torch.float32, id="fp32-cpu", marks=pytest.mark.interpreter)
THERE = pytest.param("cuda", torch.bfloat16, id="bf16-cuda", marks=pytest.mark.gpu)
UNITS = {"units": 1, "groups": decode_launch.GROUP}
# in the interpreter others show the same: seconds there are milliseconds on a GPU
SHOWN = ("full-5", "pages-256", "window-0", "contiguous-even", "alibi", "scale-negative", "prefix-window", "int8-ring",
         "lengths-0-1-17", "ring")  # fmt: skip
LONG = [
    DecodeCase(name="long-gqa", lengths=(5000, 1, 2049, 16384), group_size=4, num_kv_heads=2, head_dim=128),
    DecodeCase(name="long-mqa", lengths=(40000,), group_size=32, head_dim=128, page_size=256),
    DecodeCase(name="long-mha-64", lengths=(3000, 777), num_kv_heads=8, head_dim=64, page_size=64),
    DecodeCase(name="long-256", lengths=(3000,), group_size=2, num_kv_heads=2, head_dim=256, page_size=32),
    DecodeCase(name="long-window", lengths=(9000, 100), group_size=4, mask=Window(4095, 0), head_dim=128),
    DecodeCase(name="long-ring", lengths=(9000, 100), kind="ring", mask=Window(4095, 0), head_dim=128, seqlen_q=2),
    DecodeCase(name="long-int8", lengths=(5000, 300), group_size=4, num_kv_heads=2, head_dim=128, stored=torch.int8),
    DecodeCase(name="long-fp8", lengths=(5000, 300), group_size=4, head_dim=128, stored=torch.float8_e4m3fn),
    DecodeCase(name="long-prefix", lengths=(5000, 4400, 0), group_size=4, shared_prefix=4352, head_dim=128),
    DecodeCase(name="long-prefix-many", lengths=(5000,) * 40, group_size=8, shared_prefix=4800, head_dim=128),
    DecodeCase(name="long-chunk", lengths=(3000, 700), seqlen_q=(512, 1), group_size=4, head_dim=128),
]


@pytest.fixture(autouse=True)
def small_units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("interpreter"):
        monkeypatch.setattr(decode_launch, "UNIT", 64)


def force(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Make every split call run by a plan with these fields."""
    real = decode_launch.plan_for

    def forced(*terms: Any) -> decode_launch.Plan:
        plan = real(*terms)
        if plan.units == 0:
            return plan
        own = dict(fields)
        if plan.prefix_units == 0:
            own.pop("prefix_units", None)
        return replace(plan, **own)

    monkeypatch.setattr(decode_launch, "plan_for", forced)


def points(cases: list[DecodeCase]) -> list[Any]:
    made = []
    for case in cases:
        if case.name not in SHOWN:
            made.append(pytest.param(case, *HERE.values, id=f"{case}-fp32-cpu", marks=HERE.marks))
        if case.name == "queries-5":
            made.append(pytest.param(case, "cpu", torch.float16, id=f"{case}-fp16-cpu", marks=HERE.marks))
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
            made.append(pytest.param(case, "cuda", dtype, id=f"{case}-{name}-cuda", marks=pytest.mark.gpu))
    return made


@pytest.mark.parametrize(("case", "device", "dtype"), points([*CASES, *QUANTIZED]))
def test_errs_no_more_than_pytorch(case, device, dtype):
    problem = make(case, dtype, device)
    judge(problem, run(problem, "portable"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences_err_no_more_than_pytorch(case, dtype):
    problem = make(case, dtype, "cuda")
    judge(problem, run(problem, "portable"))


@pytest.mark.parametrize(("device", "dtype"), [HERE, THERE])
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", ["lengths-0-1-17", "ring", "prefix-300"])
def test_both_sizes_of_parts_are_right(name, units, device, dtype, monkeypatch):
    force(monkeypatch, units=UNITS[units], prefix_units=UNITS[units])
    case = next(case for case in CASES if case.name == name)
    problem = make(case, dtype, device)
    judge(problem, run(problem, "portable"))


BATCHED = [
    DecodeCase(name="paged", lengths=(5, 530), group_size=2),
    DecodeCase(name="window", lengths=(17, 200), mask=Window(70, 0), seqlen_q=2),
    DecodeCase(name="int8", lengths=(20, 130), stored=torch.int8, has_sinks=True),
]
BATCHED_THERE = [
    *BATCHED,
    DecodeCase(name="gqa-128", lengths=(20000, 17, 2600, 65), group_size=4, num_kv_heads=2, head_dim=128),
    DecodeCase(name="mqa-128", lengths=(9000, 3000), group_size=32, head_dim=128, page_size=64),
    DecodeCase(name="mha-64", lengths=(9000, 3000), num_kv_heads=4, head_dim=64, has_sinks=True),
]


def alone(problem: DecodeProblem, number: int) -> DecodeProblem:
    """One sequence of a dense problem, with a table just long enough for it."""
    keys, case = problem.keys, problem.case
    assert isinstance(keys, PagedKV)
    columns = -(-case.lengths[number] // case.page_size)
    own = slice(number, number + 1)
    view = replace(keys, block_table=keys.block_table[own, :columns], cache_seqlens=keys.cache_seqlens[own])
    return replace(problem, case=replace(case, lengths=case.lengths[own]), q=problem.q[own], keys=view)


@pytest.mark.parametrize(
    ("case", "device", "dtype"),
    [
        *[pytest.param(case, *HERE.values, id=f"{case}-cpu", marks=HERE.marks) for case in BATCHED],
        *[pytest.param(case, *THERE.values, id=f"{case}-cuda", marks=THERE.marks) for case in BATCHED_THERE],
    ],
)
def test_bits_depend_on_the_sequence_alone(case, device, dtype, monkeypatch):
    """Alone or in a batch, in a small cache or a large one, by units or by groups, in pages or in a row."""
    problem = make(case, dtype, device)
    want = run(problem, "portable")
    for units in UNITS.values():
        with monkeypatch.context() as patch:
            force(patch, units=units)
            again = run(problem, "portable")
            for number in range(len(case.lengths)):
                single = run(alone(problem, number), "portable")
                for name in want:
                    assert torch.equal(single[name][0], again[name][number]), (name, number)
        for name in want:
            assert torch.equal(again[name], want[name]), name
    larger = run(make(replace(case, spare=1500), dtype, device), "portable")
    straight = run(make(replace(case, kind="contiguous", spare=100), dtype, device), "portable")
    for name in want:
        assert torch.equal(larger[name], want[name]) and torch.equal(straight[name], want[name]), name


@pytest.mark.parametrize(("device", "dtype"), [HERE, THERE])
def test_a_shared_prefix_changes_only_rounding(device, dtype):
    case = next(case for case in CASES if case.name == "prefix")
    problem = make(case, dtype, device)
    shared, apart = run(problem, "portable"), run(replace(problem, case=replace(case, shared_prefix=0)), "portable")
    most = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(shared["out"], apart["out"], rtol=most, atol=most)
    torch.testing.assert_close(shared["lse"], apart["lse"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("device", "dtype"), [HERE, THERE])
def test_offsets_are_wide(device, dtype):
    """Pages, rows and heads that lie 2^31 elements apart."""
    problem = make(DecodeCase(name="wide", lengths=(20, 33), num_kv_heads=2), dtype, device)
    keys = problem.keys
    want = run(problem, "portable")
    for dim in (0, 1, 2):
        shape = list(keys.keys.shape)
        strides = [shape[1] * shape[2] * 16, shape[2] * 16, 16, 1]
        strides[dim] = -(-(2**31 + 16) // (shape[dim] - 1) // 16) * 16
        need = sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1
        memory = torch.empty(need, dtype=dtype, device=device)  # of which the few pages below are touched
        far = memory.as_strided(shape, strides)
        far.copy_(keys.keys)
        got = run(problem, "portable", replace(keys, key_pages=far, value_pages=far))
        same = run(problem, "portable", replace(keys, value_pages=keys.key_pages))
        assert torch.equal(got["out"], same["out"]) and torch.equal(got["lse"], want["lse"])


@pytest.mark.interpreter
def test_lengths_above_the_capacity_read_nothing_outside():
    keys = ContiguousKV(torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16), torch.tensor([90], dtype=torch.int32))
    out = decode_attention(torch.randn(1, 1, 1, 16), keys, implementation="portable")
    assert out.isfinite().all()


@pytest.mark.gpu
def test_a_cuda_graph_follows_lengths_and_tables():
    case = DecodeCase(name="graph", lengths=(900, 40, 0), group_size=4, head_dim=64, spare=700)
    problem = make(case, torch.bfloat16, "cuda")
    keys = problem.keys
    static = replace(keys, block_table=keys.block_table.clamp(0, 0).clone(), cache_seqlens=keys.cache_seqlens.clone())
    static.cache_seqlens.fill_(1)
    decode_attention(problem.q, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode_attention(problem.q, static, return_lse=True)
    static.block_table.copy_(keys.block_table)
    static.cache_seqlens.copy_(keys.cache_seqlens)
    graph.replay()
    want = run(problem, "portable")
    assert torch.equal(out, want["out"]) and torch.equal(lse, want["lse"])


@pytest.mark.gpu
def test_a_hundred_launches_are_equal():
    problem = make(
        DecodeCase(name="race", lengths=(9000, 4000, 17), group_size=8, head_dim=128), torch.bfloat16, "cuda"
    )
    want = run(problem, "portable")
    for _ in range(100):
        got = run(problem, "portable")
        assert torch.equal(got["out"], want["out"]) and torch.equal(got["lse"], want["lse"])


@pytest.mark.gpu
def test_a_sweep_of_lengths_compiles_few_kernels():
    def count() -> int:
        kernels = (decode_launch.decode_part, decode_launch.decode_merge)
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    before = None
    for length in (300, 1000, 1500, 2100, 5000, 7777):
        problem = make(DecodeCase(name="sweep", lengths=(length, 3), spare=length % 7), torch.float16, "cuda")
        run(problem, "portable")
        before = count() if length == 1000 else before
    assert before is not None and count() - before <= 3  # one part or several, divisible sizes or not


def test_plans_come_from_shapes_alone():
    """More programs than fill the device: groups; fewer: units. A chunk of a prompt is not split."""
    few = make(DecodeCase(name="few", lengths=(1000,)), torch.float32)
    many = make(DecodeCase(name="many", lengths=(3000,) * 4, num_kv_heads=2), torch.float32)
    chunk = make(DecodeCase(name="chunk", lengths=(100,), seqlen_q=17), torch.float32)
    from hasten.ops.decode_call import DecodeCall

    plans = [
        decode_launch.plan_for(p.q, p.keys, DecodeCall(softmax_scale=1.0, max_seqlen_q=p.q.shape[1], right=0))
        for p in (few, many, chunk)
    ]
    assert [plan.units for plan in plans] == [1, decode_launch.GROUP, 0]
