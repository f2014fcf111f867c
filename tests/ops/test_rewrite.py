"""Masks as cheaper equal calls: documents as packed sequences, dilation as strides; and what must not be rewritten."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hasten
from hasten.masks import Causal, Documents, Full, Global, Mask, Padding, Window
from hasten.ops import rewrite
from hasten.ops.call import Call

OWN = Documents(torch.tensor([0, 3, 10], dtype=torch.int32))
SHARED = {"softmax_scale": 1.0, "max_seqlen_q": 10, "max_seqlen_k": 10}


def tensors(seqlen_q: int = 10, seqlen_k: int = 10, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, seqlen_q, 4, 8), torch.zeros(batch, seqlen_k, 2, 8)


@pytest.mark.parametrize(
    ("mask", "band"),
    [
        (OWN, Full()),
        (OWN & Causal(), Causal()),
        (Causal() & OWN, Causal()),
        (OWN & Window(3, 0), Window(3, 0)),
        (OWN & Causal() & Window(3, 3), Causal() & Window(3, 3)),
    ],
    ids=repr,
)
def test_documents_with_a_band_are_taken_apart(mask: Mask, band: Mask) -> None:
    assert rewrite.split_documents(mask) == (OWN, band)


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        OWN | Causal(),
        OWN & OWN,
        OWN & Padding(torch.tensor([3, 4])),
        OWN & Window(2, 2, dilation=2),
        OWN & Global((0,)),
        OWN & (Causal() | Global((0,))),
    ],
    ids=repr,
)
def test_anything_else_is_left_alone(mask: Mask) -> None:
    assert rewrite.split_documents(mask) is None


def test_documents_become_packed_sequences_of_the_flattened_batch() -> None:
    q, k = tensors()
    packed = rewrite.pack_documents(q, k, Call(mask=OWN & Causal(), **SHARED))
    assert packed is not None and packed.mask == Causal()
    assert packed.cu_seqlens_q.tolist() == [0, 3, 10, 13, 20] and packed.cu_seqlens_q.dtype == torch.int32
    assert packed.cu_seqlens_k is packed.cu_seqlens_q
    assert (packed.max_seqlen_q, packed.max_seqlen_k) == (7, 7)


def test_rows_with_their_own_documents_keep_them() -> None:
    q, k = tensors()
    documents = Documents(torch.tensor([[0, 3, 10, 10], [0, 1, 2, 10]]))
    packed = rewrite.pack_documents(q, k, Call(mask=documents, **SHARED))
    assert packed is not None and sorted(set(packed.cu_seqlens_q.tolist())) == [0, 3, 10, 11, 12, 20]
    assert packed.max_seqlen_q == 8


@pytest.mark.parametrize("bounds", [[1, 10], [0, 9], [0, 5, 4, 10], [0, 11]], ids=str)
def test_documents_that_leave_gaps_are_not_packed(bounds: list[int]) -> None:
    q, k = tensors()
    assert rewrite.pack_documents(q, k, Call(mask=Documents(torch.tensor(bounds)), **SHARED)) is None


def test_what_counts_from_the_first_row_is_not_packed() -> None:
    """A bias, dropout cells and slopes of a row would be other ones in a packed call; two lengths do not pack."""
    q, k = tensors()
    call = Call(mask=OWN, **SHARED)
    assert rewrite.pack_documents(q, k, call) is not None
    assert rewrite.pack_documents(q, k, replace(call, bias=torch.zeros(1, 1, 10, 10))) is None
    assert rewrite.pack_documents(q, k, replace(call, seed=torch.zeros(1, dtype=torch.int64))) is None
    assert rewrite.pack_documents(q, k, replace(call, slopes=torch.ones(2, 4))) is None
    assert rewrite.pack_documents(q, k, replace(call, slopes=torch.ones(1, 4))) is not None
    assert rewrite.pack_documents(q[:, :5], k, call) is None


@pytest.mark.parametrize("step", [2, 3, 7])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(10, 10), (9, 22), (22, 9), (7, 7)])
def test_a_dilated_window_is_plain_on_every_so_many_rows(step: int, seqlen_q: int, seqlen_k: int) -> None:
    mask = Window(2, 1, dilation=step)
    call = Call(mask=mask, **SHARED)
    assert rewrite.dilation(*tensors(seqlen_q, seqlen_k), call) == step
    plain = rewrite.undilated(mask)
    assert plain == Window(2, 1)
    keep, shift = mask.keep(seqlen_q, seqlen_k)[0, 0], seqlen_k - seqlen_q
    for residue in range(step):
        rows, cols = slice(residue, None, step), slice((residue + shift) % step, None, step)
        own = keep[rows, cols]
        assert torch.equal(own, plain.keep(*own.shape)[0, 0])
        assert keep[rows].sum() == own.sum(), "and nothing is visible elsewhere"


def test_what_is_no_dilated_window_alone_is_not_rewritten() -> None:
    call = Call(mask=Window(2, 1, dilation=3), **SHARED)
    q, k = tensors()
    assert rewrite.dilation(q, k, call) == 3
    for mask in (Causal(), Window(2, 1), Window(2, 1, dilation=(2, 2, 3, 3)), Window(2, 1, dilation=3) & Causal()):
        assert rewrite.dilation(q, k, replace(call, mask=mask)) == 1
    assert rewrite.dilation(q, k, replace(call, bias=torch.zeros(1, 1, 10, 10))) == 1
    assert rewrite.dilation(q, k, replace(call, slopes=torch.ones(1, 4))) == 1
    assert rewrite.dilation(q, k, replace(call, seed=torch.zeros(1, dtype=torch.int64))) == 1
    assert rewrite.dilation(q[:, :2], k, call) == 1, "shorter than the step"


@pytest.mark.parametrize("length", [6, 7, 8, 3])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_interleave_undoes_taking_every_third(length: int, dim: int) -> None:
    shape = [2, 2, 2]
    shape[dim] = length
    whole = torch.randn(shape)
    take = [slice(None)] * 3
    parts = []
    for residue in range(3):
        take[dim] = slice(residue, None, 3)
        parts.append(whole[tuple(take)])
    joined = rewrite.interleave(parts, dim)
    assert torch.equal(joined, whole) and joined.is_contiguous()


def test_interleave_passes_gradients_through() -> None:
    parts = [torch.randn(1, 2, 2, requires_grad=True, dtype=torch.float64) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *own: rewrite.interleave(list(own), 1), parts)


def test_documents_that_are_written_to_are_packed_anew() -> None:
    bounds = torch.tensor([0, 3, 10], dtype=torch.int32)
    q, k, v = (torch.randn(1, 10, 2, 8) for _ in range(3))
    first = hasten.attention(q, k, v, Documents(bounds))
    bounds[1] = 6
    second = hasten.attention(q, k, v, Documents(bounds))
    want = hasten.attention(q, k, v, Documents(torch.tensor([0, 6, 10])), implementation="reference")
    torch.testing.assert_close(second, want)
    assert not torch.allclose(first, second)
