"""decode_attention in PyTorch: the oracle against gathered keys, the CPU path, choices, errors, tracing."""

from __future__ import annotations

import pytest
import torch

import hasten
from hasten.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from hasten.masks import Causal, Full, Global, Padding, Window
from hasten.ops import choose
from hasten.ops.decode import _operator, decode_attention
from hasten.ops.kv import ContiguousKV, PagedKV, RingKV
from tests.ops.decode_cases import CASES, QUANTIZED, DecodeCase, judge, make, run


@pytest.mark.parametrize("case", [*CASES, *QUANTIZED], ids=str)
def test_the_oracle_is_attention_over_gathered_keys(case):
    problem = make(case, torch.float64)
    judge(problem, run(problem, "reference"))


BF16 = ("queries-5", "contiguous-even", "ring", "everything", "int8", "fp8", "packed")
POINTS = [pytest.param(case, torch.float32, id=f"{case}-fp32") for case in [*CASES, *QUANTIZED]]
POINTS += [pytest.param(c, torch.bfloat16, id=f"{c}-bf16") for c in [*CASES, *QUANTIZED] if c.name in BF16]


@pytest.mark.parametrize(("case", "dtype"), POINTS)
def test_the_cpu_path_errs_no_more_than_pytorch(case, dtype):
    problem = make(case, dtype)
    judge(problem, run(problem, None))


def test_lse_is_returned_on_request():
    problem = make(CASES[0], torch.float32)
    assert isinstance(decode_attention(problem.q, problem.keys), torch.Tensor)
    out, lse = decode_attention(problem.q, problem.keys, return_lse=True)
    assert lse.shape == (out.shape[0], out.shape[2], out.shape[1])


def test_the_result_is_that_of_attention_over_the_same_keys():
    problem = make(DecodeCase(name="one", lengths=(50,), kind="contiguous", spare=14), torch.float32)
    out = decode_attention(problem.q, problem.keys)
    want = hasten.attention(problem.q, problem.k[0][None], problem.v[0][None], Causal())
    assert torch.equal(out, want)


@pytest.mark.parametrize("fullgraph_kind", ["paged", "contiguous", "ring"])
def test_compiles_to_one_graph_and_follows_lengths(fullgraph_kind):
    mask = Window(40, 0) if fullgraph_kind == "ring" else None
    problem = make(DecodeCase(name="c", lengths=(40, 20), kind=fullgraph_kind, mask=mask, spare=24), torch.float32)
    keys = problem.keys

    def call(q, lengths):
        view = (
            PagedKV(keys.keys, keys.values, keys.block_table, lengths)
            if fullgraph_kind == "paged"
            else type(keys)(keys.keys, keys.values, lengths)
        )
        return decode_attention(q * 1.0, view, mask)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for lengths in ([40, 20], [39, 3]):
        given = torch.tensor(lengths, dtype=torch.int32)
        assert torch.equal(compiled(problem.q, given), call(problem.q, given))


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_opcheck(implementation):
    problem = make(DecodeCase(name="op", lengths=(40, 20), has_sinks=True, alibi="h"), torch.float32)
    keys = problem.keys
    slopes = problem.terms["slopes"].reshape(1, -1)
    args = (problem.q, keys.keys, keys.values, keys.block_table, keys.cache_seqlens, None, None)
    more = (problem.terms["sinks"], slopes, None, "paged", None, 0, 0.25, 0.0, 1, 0, implementation)
    torch.library.opcheck(_operator, (*args, *more))


def test_gradients_are_refused():
    problem = make(CASES[0], torch.float32)
    with pytest.raises(ArgumentError, match="q: expected a tensor without gradients"):
        decode_attention(problem.q.requires_grad_(), problem.keys)
    with torch.no_grad():
        decode_attention(problem.q, problem.keys)


@pytest.mark.parametrize("mask", [Global((0,)), Padding([3, 3]), Window(4, 0, dilation=2)], ids=repr)
def test_other_masks_are_refused_by_name(mask):
    problem = make(DecodeCase(name="m"), torch.float32)
    with pytest.raises(ArgumentError, match=r"mask: expected Full, Causal.*" + type(mask).__name__):
        decode_attention(problem.q, problem.keys, mask)


@pytest.mark.parametrize("mask", [Causal(), Full(), Window(8, 8), Window(64, 0)], ids=repr)
def test_a_ring_takes_only_windows_that_it_keeps(mask):
    ring = RingKV(torch.zeros(2, 64, 1, 16), torch.zeros(2, 64, 1, 16), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ArgumentError, match="mask: expected"):
        decode_attention(torch.zeros(2, 1, 1, 16), ring, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 1, 16)}, "q: expected shape"),
        ({"q": torch.zeros(2, 1, 1, 8)}, "q: expected head_dim 16"),
        ({"q": torch.zeros(3, 1, 1, 16)}, "q: expected 2 sequences"),
        ({"q": torch.zeros(2, 1, 1, 16, dtype=torch.float16)}, "q: expected the dtype of the cache"),
        ({"q": torch.zeros(2, 1, 1, 16, dtype=torch.int8)}, "q: expected a floating tensor"),
        ({"q": "text"}, "q: expected a floating tensor"),
        ({"keys": torch.zeros(2, 64, 1, 16)}, "keys: expected PagedKV"),
        ({"max_seqlen_q": 1}, "max_seqlen_q: expected None"),
        ({"q": torch.zeros(2, 1, 16), "cu_seqlens_q": torch.tensor([0, 1, 2])}, "cu_seqlens_q: expected an int32"),
        ({"q": torch.zeros(2, 1, 16), "cu_seqlens_q": torch.tensor([0, 1, 2]).int()}, "max_seqlen_q: expected an int"),
        (
            {"q": torch.zeros(2, 1, 16), "cu_seqlens_q": torch.tensor([0, 2, 1]).int(), "max_seqlen_q": 2},
            "cu_seqlens_q: expected",
        ),
        (
            {"q": torch.zeros(2, 1, 16), "cu_seqlens_q": torch.tensor([0, 0, 2]).int(), "max_seqlen_q": 1},
            "max_seqlen_q: expected at least",
        ),
        ({"bias": torch.zeros(1)}, "bias: expected ALiBi"),
        ({"sinks": torch.zeros(3)}, "sinks: expected shape"),
        ({"softcap": -1.0}, "softcap: expected"),
        ({"shared_prefix": 5}, "shared_prefix: expected a multiple of page_size 16"),
        ({"shared_prefix": 16 * 100}, "shared_prefix: expected a multiple"),
        ({"shared_prefix": -16}, "shared_prefix: expected an int >= 0"),
        ({"mask": "causal"}, "mask: expected a hasten mask"),
        ({"implementation": "fastest"}, "implementation: expected one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_one_clear_line(change, message):
    problem = make(DecodeCase(name="errors"), torch.float32)
    arguments = {"q": problem.q, "keys": problem.keys, **change}
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        decode_attention(arguments.pop("q"), arguments.pop("keys"), **arguments)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_length_above_the_capacity_is_an_error_on_a_cpu():
    keys = ContiguousKV(torch.zeros(1, 8, 1, 16), torch.zeros(1, 8, 1, 16), torch.tensor([9], dtype=torch.int32))
    with pytest.raises(ArgumentError, match="cache_seqlens: expected at most 8"):
        decode_attention(torch.zeros(1, 1, 1, 16), keys)


def test_portable_needs_a_gpu_and_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = make(CASES[0], torch.float32)
    with pytest.raises(UnsupportedError, match=r"portable.*GPU"):
        decode_attention(problem.q, problem.keys, implementation="portable")


def test_the_variable_forces_an_implementation(monkeypatch):
    problem = make(CASES[0], torch.float32)
    monkeypatch.setattr(choose, "NAMES", (*choose.NAMES, "elsewhere"))
    monkeypatch.setenv("HASTEN_IMPLEMENTATION", "elsewhere")  # an implementation that other ops have
    decode_attention(problem.q, problem.keys)
    monkeypatch.setenv("HASTEN_IMPLEMENTATION", "nothing")
    with pytest.raises(ArgumentError, match="implementation: expected one of portable"):
        decode_attention(problem.q, problem.keys)
