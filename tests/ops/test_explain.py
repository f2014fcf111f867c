"""explain: which implementation and why, what it costs, and that nothing happened by asking."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import ArgumentError, UnsupportedError
from hasten.masks import BlockSparse, Causal, Documents, Full, Global, Mask, Padding, Window
from tests.ops.cases import make
from tests.ops.tables import PACKED


def tensors(
    seqlen_q: int = 96, seqlen_k: int = 96, batch: int = 2, heads: int = 4, dim: int = 16, dim_v: int = 8
) -> list[Tensor]:
    sizes = ((seqlen_q, heads, dim), (seqlen_k, heads // 2, dim), (seqlen_k, heads // 2, dim_v))
    return [torch.randn(batch, *size) for size in sizes]


MASKS = [
    None,
    Causal(),
    Window(9, 3),
    Window(3, 3, dilation=2),
    Window(5, 5) | Global((0, 70)),
    Causal() & Padding(torch.tensor([96, 40])),
    Documents(torch.tensor([0, 30, 96])),
    BlockSparse(torch.eye(3, dtype=torch.bool), 32),
]


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(96, 96), (70, 96)])
def test_the_visible_share_and_the_flops_are_those_of_the_mask(mask: Mask | None, seqlen_q: int, seqlen_k: int) -> None:
    answer = hasten.explain(*tensors(seqlen_q, seqlen_k), mask)
    keep = (mask or Full()).keep(seqlen_q, seqlen_k, batch=2, num_heads=4)
    assert answer.visible_share == pytest.approx(keep.float().mean().item())
    assert answer.forward_flops == 2 * int(keep.sum()) * (16 + 8)
    assert answer.backward_flops == 2.5 * answer.forward_flops
    assert answer.mask == repr(mask or Full())


def test_bytes_are_each_tensor_once() -> None:
    q, k, v = tensors()
    answer = hasten.explain(q, k, v)
    inputs, out, lse = 4 * (q.numel() + k.numel() + v.numel()), 4 * 2 * 96 * 4 * 8, 4 * 2 * 4 * 96
    assert answer.forward_bytes == inputs + out + lse
    assert answer.backward_bytes == 2 * inputs + 2 * out + lse
    assert answer.shapes == {"q": tuple(q.shape), "k": tuple(k.shape), "v": tuple(v.shape)}


def test_packed_sequences_count_their_own_cells() -> None:
    case = next(case for case in PACKED if case.name == "packed-crossed-causal")
    problem = make(case, torch.float32)
    sequences = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), problem.cu_seqlens, strict=True))
    answer = hasten.explain(problem.q, problem.k, problem.v, Causal(), **sequences)
    visible = sum(int(Causal().keep(*lengths).sum()) for lengths in case.lengths)
    assert answer.forward_flops == 2 * 2 * visible * 32
    assert answer.visible_share == pytest.approx(visible / sum(q * k for q, k in case.lengths))


def test_the_first_that_does_not_refuse_is_chosen_and_told() -> None:
    answer = hasten.explain(*tensors())
    assert answer.implementation == "blockwise" and answer.refused == {}
    lines = str(answer).splitlines()
    assert lines[0].split() == ["implementation", "blockwise"]
    assert any("Full(), 100.0% of the cells visible" in line for line in lines)
    assert sum("GFLOP" in line and "MB" in line for line in lines) == 2


def test_a_forced_implementation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hasten.explain(*tensors(), implementation="reference").implementation == "reference"
    monkeypatch.setenv("HASTEN_IMPLEMENTATION", "reference")
    assert hasten.explain(*tensors()).implementation == "reference"
    assert hasten.explain(*tensors(), implementation="blockwise").implementation == "blockwise", "the call wins"
    with pytest.raises(ArgumentError, match="implementation: expected one of"):
        hasten.explain(*tensors(), implementation="magic")


def test_a_forced_implementation_that_refuses_raises_as_attention_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    messages = []
    for function in (hasten.explain, hasten.attention):
        with pytest.raises(UnsupportedError) as error:
            function(*tensors(), implementation="portable")
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "cpu" in messages[0]


def test_the_reasons_of_those_passed_over_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where portable is asked first: here it has no GPU, and says so."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("hasten.ops.choose.ORDER_ELSEWHERE", ("portable", "blockwise"))
    answer = hasten.explain(*tensors())
    assert answer.implementation == "blockwise"
    assert list(answer.refused) == ["portable"] and "GPU" in answer.refused["portable"]
    assert f"not portable: {answer.refused['portable']}" in str(answer)


def test_asking_changes_nothing() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in tensors())
    before = torch.get_rng_state()
    hasten.explain(q, k, v, Causal(), dropout_p=0.3, sinks=torch.zeros(4), bias=hasten.ALiBi.for_heads(4), softcap=3.0)
    assert torch.equal(torch.get_rng_state(), before), "no number is drawn for dropout"


def test_nothing_to_see_is_a_share_of_zero() -> None:
    assert hasten.explain(*tensors(seqlen_k=0)).visible_share == 0.0
    assert hasten.explain(*tensors(seqlen_q=0)).forward_flops == 0


def test_a_cpu_has_no_roofline() -> None:
    answer = hasten.explain(*tensors())
    assert answer.rates is None and answer.forward_roofline_s is None and answer.backward_roofline_s is None


@pytest.mark.gpu
def test_a_known_gpu_has_a_roofline() -> None:
    answer = hasten.explain(*(tensor.cuda().bfloat16() for tensor in tensors()), Causal())
    assert answer.implementation == ("hopper" if torch.cuda.get_device_capability() == (9, 0) else "portable")
    if answer.rates is None:
        pytest.skip(f"{torch.cuda.get_device_name()} is not in the table")
    assert 0 < answer.forward_roofline_s <= answer.backward_roofline_s
    assert torch.cuda.get_device_name() in answer.rates and "us on" in str(answer)
