"""Bad input: each a line that names the argument, what was expected, what came, and what to do, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import ArgumentError, ArgumentTypeError, HastenError, UnsupportedError
from hasten.masks import BlockSparse, Dense, Documents, Global, Padding, Window

Arguments = dict[str, Any]


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*values: int, dtype: torch.dtype = torch.int32, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def dense(**changes: Any) -> Arguments:
    return {"q": t(2, 6, 4, 8), "k": t(2, 5, 2, 8), "v": t(2, 5, 2, 8)} | changes


def packed(**changes: Any) -> Arguments:
    sizes = {"q": t(6, 4, 8), "k": t(5, 2, 8), "v": t(5, 2, 8)}
    return sizes | {"cu_seqlens_q": ints(0, 2, 6), "cu_seqlens_k": ints(0, 3, 5)} | changes


# name -> (arguments, the argument to blame, words of what was expected, words of what came)
VALUES: dict[str, tuple[Arguments, str, str, str]] = {
    "q-dimensions": (dense(q=t(6, 4, 8)), "q", "(batch, seqlen, heads, head_dim)", "(6, 4, 8)"),
    "k-dimensions": (dense(k=t(2, 5, 8)), "k", "(batch, seqlen, heads, head_dim)", "(2, 5, 8)"),
    "v-dimensions": (dense(v=t(1, 2, 5, 2, 8)), "v", "(batch, seqlen, heads, head_dim)", "(1, 2, 5, 2, 8)"),
    "q-k-head-dim": (dense(k=t(2, 5, 2, 9)), "k", "head_dim 8", "9"),
    "k-v-length": (dense(v=t(2, 4, 2, 8)), "v", "(2, 5, 2)", "(2, 4, 2)"),
    "k-v-heads": (dense(v=t(2, 5, 4, 8)), "v", "(2, 5, 2)", "(2, 5, 4)"),
    "k-v-batch": (dense(v=t(1, 5, 2, 8)), "v", "(2, 5, 2)", "(1, 5, 2)"),
    "q-k-batch": (dense(k=t(3, 5, 2, 8), v=t(3, 5, 2, 8)), "k", "batch 2", "3"),
    "heads": (dense(k=t(2, 5, 3, 8), v=t(2, 5, 3, 8)), "q", "a multiple of 3 heads", "4"),
    "more-kv-heads": (dense(k=t(2, 5, 8, 8), v=t(2, 5, 8, 8)), "q", "a multiple of 8 heads", "4"),
    "no-heads": (dense(q=t(2, 6, 0, 8)), "q", "at least one head", "(2, 6, 0, 8)"),
    "no-kv-heads": (dense(k=t(2, 5, 0, 8), v=t(2, 5, 0, 8)), "k", "at least one head", "(2, 5, 0, 8)"),
    "no-head-dim": (dense(q=t(2, 6, 4, 0), k=t(2, 5, 2, 0)), "q", "at least one head", "(2, 6, 4, 0)"),
    "k-device": (dense(k=t(2, 5, 2, 8, device="meta")), "k", "device of q, cpu", "meta"),
    "v-device": (dense(v=t(2, 5, 2, 8, device="meta")), "v", "device of q, cpu", "meta"),
    "scale-nan": (dense(softmax_scale=float("nan")), "softmax_scale", "finite", "nan"),
    "scale-inf": (dense(softmax_scale=float("inf")), "softmax_scale", "finite", "inf"),
    "softcap-zero": (dense(softcap=0.0), "softcap", "> 0 or None", "0.0"),
    "softcap-negative": (dense(softcap=-3.0), "softcap", "> 0 or None", "-3.0"),
    "softcap-nan": (dense(softcap=float("nan")), "softcap", "> 0 or None", "nan"),
    "dropout-one": (dense(dropout_p=1.0), "dropout_p", "0 <= dropout_p < 1", "1.0"),
    "dropout-negative": (dense(dropout_p=-0.1), "dropout_p", "0 <= dropout_p < 1", "-0.1"),
    "dropout-nan": (dense(dropout_p=float("nan")), "dropout_p", "0 <= dropout_p < 1", "nan"),
    "sinks-number": (dense(sinks=t(2)), "sinks", "(4,)", "(2,)"),
    "sinks-per-row": (dense(sinks=t(2, 4)), "sinks", "(4,)", "(2, 4)"),
    "sinks-device": (dense(sinks=t(4, device="meta")), "sinks", "device of q, cpu", "meta"),
    "bias-keys": (dense(bias=t(6, 4)), "bias", "(2, 4, 6, 5)", "(6, 4)"),
    "bias-turned": (dense(bias=t(5, 6)), "bias", "(2, 4, 6, 5)", "(5, 6)"),
    "bias-kv-heads": (dense(bias=t(2, 2, 6, 5)), "bias", "(2, 4, 6, 5)", "(2, 2, 6, 5)"),
    "bias-dimensions": (dense(bias=t(1, 2, 4, 6, 5)), "bias", "(2, 4, 6, 5)", "(1, 2, 4, 6, 5)"),
    "bias-device": (dense(bias=t(6, 5, device="meta")), "bias", "device of q, cpu", "meta"),
    "bias-packed": (packed(bias=t(6, 5)), "bias", "None or ALiBi", "(6, 5)"),
    "slopes-number": (dense(bias=hasten.ALiBi(t(2))), "bias.slopes", "(4,)", "(2,)"),
    "slopes-batch": (dense(bias=hasten.ALiBi(t(3, 4))), "bias.slopes", "(4,)", "(3, 4)"),
    "slopes-packed": (packed(bias=hasten.ALiBi(t(6, 4))), "bias.slopes", "(4,)", "(6, 4)"),
    "max-seqlen-dense": (dense(max_seqlen_q=6), "max_seqlen_q", "nothing", "6"),
    "packed-dimensions": (packed(q=t(1, 6, 4, 8)), "q", "(total, heads, head_dim)", "(1, 6, 4, 8)"),
    "cu-seqlens-matrix": (packed(cu_seqlens_q=ints(0, 6)[None]), "cu_seqlens_q", "(batch + 1,)", "(1, 2)"),
    "cu-seqlens-empty": (packed(cu_seqlens_q=ints(), cu_seqlens_k=ints()), "cu_seqlens_q", "(batch + 1,)", "(0,)"),
    "cu-seqlens-number": (packed(cu_seqlens_k=ints(0, 5)), "cu_seqlens_k", "as many entries", "2 for 3"),
    "cu-seqlens-device": (packed(cu_seqlens_k=ints(0, 3, 5, device="meta")), "cu_seqlens_k", "device of q", "meta"),
    "cu-seqlens-falls": (packed(cu_seqlens_q=ints(0, 7, 6)), "cu_seqlens_q", "never fall", "7 then 6 at 1"),
    "cu-seqlens-start": (packed(cu_seqlens_q=ints(1, 2, 6)), "cu_seqlens_q", "0 first and 6 last", "1 and 6"),
    "cu-seqlens-end": (packed(cu_seqlens_k=ints(0, 3, 4)), "cu_seqlens_k", "0 first and 5 last", "0 and 4"),
    "cu-seqlens-beyond": (packed(cu_seqlens_k=ints(0, 3, 9)), "cu_seqlens_k", "0 first and 5 last", "0 and 9"),
    "max-seqlen-short": (packed(max_seqlen_q=3), "max_seqlen_q", "at least the longest sequence, 4", "3"),
    "max-seqlen-k-short": (packed(max_seqlen_k=1), "max_seqlen_k", "at least the longest sequence, 3", "1"),
    "max-seqlen-negative": (packed(max_seqlen_q=-1), "max_seqlen_q", ">= 0", "-1"),
    "mask-matrix": (dense(mask=Dense(t(5, 6, dtype=torch.bool))), "Dense.matrix", "(6, 5)", "(5, 6)"),
    "mask-heads": (dense(mask=Dense(t(2, 2, 6, 5, dtype=torch.bool))), "Dense.matrix", "(2, 4, 6, 5)", "(2, 2, 6, 5)"),
    "mask-layout": (dense(mask=BlockSparse(t(2, 2, dtype=torch.bool), 2)), "BlockSparse.layout", "(3, 3)", "(2, 2)"),
    "mask-padding": (dense(mask=Padding(ints(5, 5, 5))), "Padding.lengths", "(2,)", "(3,)"),
    "mask-documents": (
        dense(mask=Documents(ints(0, 5)[None].repeat(3, 1))),
        "Documents.cu_seqlens",
        "(2, 2)",
        "(3, 2)",
    ),
    "mask-token": (dense(mask=Global((0, 5))), "Global.tokens", "< 5", "5"),
    "mask-flags": (dense(mask=Global(t(6, dtype=torch.bool))), "Global.tokens", "(5,)", "(6,)"),
    "mask-dilation": (dense(mask=Window(1, 1, (1, 2))), "Window.dilation", "4 heads", "(1, 2)"),
    "mask-inside": (dense(mask=Window(1, 1) & (Padding(ints(5)) | Global(()))), "Padding.lengths", "(2,)", "(1,)"),
    "packed-dilation": (packed(mask=Window(1, 1, (1, 2))), "Window.dilation", "4 heads", "(1, 2)"),
    "implementation": (
        dense(implementation="fastest"),
        "implementation",
        "portable, blockwise, reference",
        "'fastest'",
    ),
}

TYPES: dict[str, tuple[Arguments, str, str, str]] = {
    "q-list": (dense(q=[[1.0]]), "q", "a tensor", "list"),
    "q-list-packed": (packed(q=[[1.0]]), "q", "a tensor", "list"),
    "v-none": (dense(v=None), "v", "a tensor", "NoneType"),
    "q-int": (dense(q=t(2, 6, 4, 8, dtype=torch.int64)), "q", "floating", "torch.int64"),
    "q-complex": (dense(q=t(2, 6, 4, 8, dtype=torch.complex64)), "q", "floating", "torch.complex64"),
    "q-float8": (dense(q=t(2, 6, 4, 8).to(torch.float8_e4m3fn)), "q", "16, 32 or 64 bits", "torch.float8_e4m3fn"),
    "k-dtype": (dense(k=t(2, 5, 2, 8, dtype=torch.float16)), "k", "torch.float32", "torch.float16"),
    "v-dtype": (dense(v=t(2, 5, 2, 8, dtype=torch.float64)), "v", "torch.float32", "torch.float64"),
    "mask-tensor": (dense(mask=t(6, 5, dtype=torch.bool)), "mask", "a hasten mask", "Tensor"),
    "mask-name": (dense(mask="causal"), "mask", "a hasten mask", "str"),
    "mask-class": (dense(mask=hasten.Causal), "mask", "a hasten mask", "type"),
    "bias-bool": (dense(bias=t(6, 5, dtype=torch.bool)), "bias", "floating", "torch.bool"),
    "bias-number": (dense(bias=0.5), "bias", "floating", "float"),
    "sinks-int": (dense(sinks=ints(1, 2, 3, 4)), "sinks", "floating", "torch.int32"),
    "sinks-list": (dense(sinks=[0.0] * 4), "sinks", "floating", "list"),
    "slopes-int": (dense(bias=hasten.ALiBi(ints(1, 2, 3, 4))), "bias.slopes", "floating", "torch.int32"),
    "cu-seqlens-alone": (packed(cu_seqlens_k=None), "cu_seqlens_k", "int32", "NoneType"),
    "cu-seqlens-list": (packed(cu_seqlens_q=[0, 2, 6]), "cu_seqlens_q", "int32", "list"),
    "cu-seqlens-float": (packed(cu_seqlens_q=t(3)), "cu_seqlens_q", "int32", "torch.float32"),
    "softcap-text": (dense(softcap="30"), "softcap", "number", "'30'"),
    "scale-text": (dense(softmax_scale="x"), "softmax_scale", "number", "'x'"),
    "dropout-none": (dense(dropout_p=None), "dropout_p", "number", "None"),
    "max-seqlen-tensor": (packed(max_seqlen_q=torch.tensor(4)), "max_seqlen_q", "int", "tensor(4)"),
    "max-seqlen-float": (packed(max_seqlen_k=3.0), "max_seqlen_k", "int", "3.0"),
}


def refused(function: Callable[..., Any], arguments: Arguments, kind: type[HastenError], blame: str) -> str:
    """The message of the refusal, after a look at its fields."""
    with pytest.raises(kind) as error:
        function(**arguments)
    assert type(error.value) is kind
    assert error.value.argument == blame
    text = str(error.value)
    assert text.startswith(f"{blame}: expected ") and "\n" not in text
    assert error.value.hint and text.endswith(error.value.hint)
    return text


@pytest.mark.parametrize("implementation", [None, "reference", "blockwise"])
@pytest.mark.parametrize("name", VALUES)
def test_a_wrong_value_is_one_clear_line(name: str, implementation: str | None) -> None:
    arguments, blame, expected, got = VALUES[name]
    text = refused(hasten.attention, {"implementation": implementation} | arguments, ArgumentError, blame)
    assert expected in text.split(", got ")[0] and got in text.split(", got ")[1]


@pytest.mark.parametrize("implementation", [None, "reference", "blockwise"])
@pytest.mark.parametrize("name", TYPES)
def test_a_wrong_type_is_one_clear_line(name: str, implementation: str | None) -> None:
    arguments, blame, expected, got = TYPES[name]
    text = refused(hasten.attention, {"implementation": implementation} | arguments, ArgumentTypeError, blame)
    assert expected in text.split(", got ")[0] and got in text.split(", got ")[1]


@pytest.mark.parametrize("name", VALUES)
def test_explain_refuses_what_attention_refuses(name: str) -> None:
    arguments, blame, _, _ = VALUES[name]
    refused(hasten.explain, arguments, ArgumentError, blame)


@pytest.mark.parametrize(
    ("make", "blame"),
    [
        (lambda: Window(-1, 0), "Window.left"),
        (lambda: Window(0, -1), "Window.right"),
        (lambda: Window(1.5, 0), "Window.left"),
        (lambda: Window(1, 1, 0), "Window.dilation"),
        (lambda: Window(1, 1, (1, -2)), "Window.dilation"),
        (lambda: Global((-1,)), "Global.tokens"),
        (lambda: BlockSparse(t(2, 2, dtype=torch.bool), 0), "BlockSparse.block_size"),
        (lambda: Padding(ints(1), "top"), "Padding.side"),
        (lambda: Dense(t(3, dtype=torch.bool)), "Dense.matrix"),
    ],
    ids=["left", "right", "fraction", "dilation", "dilations", "token", "block", "side", "vector"],
)
def test_a_mask_that_means_nothing_cannot_be_made(make: Callable[[], object], blame: str) -> None:
    with pytest.raises(ArgumentError) as error:
        make()
    assert error.value.argument == blame


def test_a_matrix_that_is_no_mask_cannot_be_made() -> None:
    with pytest.raises(ArgumentTypeError, match=r"Dense.matrix: expected torch.bool, got torch.float32"):
        Dense(t(3, 3))


def test_errors_are_what_callers_of_pytorch_catch() -> None:
    with pytest.raises(ValueError, match="q: expected"):
        hasten.attention(**dense(q=t(6, 4, 8)))
    with pytest.raises(TypeError, match="mask: expected"):
        hasten.attention(**dense(mask="causal"))
    with pytest.raises(NotImplementedError, match="implementation 'portable' cannot do this"):
        hasten.attention(**dense(q=t(2, 6, 4, 300), k=t(2, 5, 2, 300), implementation="portable"))


def test_a_forced_implementation_outside_its_envelope_raises_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for force in (
        lambda: {"implementation": "portable"},
        lambda: monkeypatch.setenv("HASTEN_IMPLEMENTATION", "portable"),
    ):
        with pytest.raises(UnsupportedError) as error:
            hasten.attention(**dense() | (force() or {}))
        assert error.value.implementation == "portable" and "q is on cpu" in error.value.reason
    monkeypatch.setenv("HASTEN_IMPLEMENTATION", "nonsense")
    refused(hasten.attention, dense(), ArgumentError, "implementation")


def test_a_refused_call_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    refused(hasten.attention, dense(dropout_p=0.5, sinks=t(2)), ArgumentError, "sinks")
    refused(hasten.attention, packed(dropout_p=0.5, max_seqlen_q=-1), ArgumentError, "max_seqlen_q")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_devices_that_differ_are_refused() -> None:
    refused(hasten.attention, dense(k=t(2, 5, 2, 8, device="cuda")), ArgumentError, "k")
    there = {name: tensor.cuda() for name, tensor in packed().items()}
    refused(hasten.attention, there | {"cu_seqlens_q": ints(0, 2, 6)}, ArgumentError, "cu_seqlens_q")
    refused(hasten.attention, there | {"sinks": t(4)}, ArgumentError, "sinks")
    refused(hasten.attention, there | {"cu_seqlens_q": ints(0, 7, 6, device="cuda")}, ArgumentError, "cu_seqlens_q")
