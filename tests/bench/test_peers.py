"""Peers: which are here, what they refuse, and that each computes the problem it is given."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hasten.bench import check, flash_attn, peers
from hasten.bench.problems import Pattern, Problem
from hasten.errors import ArgumentError
from hasten.masks import Causal
from hasten.ops.attention import attention

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def names(asked: str, device: torch.device = CPU, ours: tuple[str, ...] = ("reference",)) -> list[str]:
    return [peer.name for peer in peers.find_peers(asked.split(","), device, list(ours))]


def problem(text: str, num_kv_heads: int = 2, seqlen: int = 40) -> Problem:
    pattern = Pattern.parse(text)
    sizes = {
        "batch": 1 if pattern.mean_length else 2,
        "seqlen": seqlen,
        "num_heads": 4,
        "num_kv_heads": num_kv_heads,
        "head_dim": 16,
    }
    return Problem(**sizes, pattern=pattern, dtype=torch.float32)


def test_on_a_cpu_the_peers_are_torchs_two():
    assert names("auto") == ["hasten_reference", "sdpa_flash", "sdpa_math"]
    assert names("all") == [*names("auto"), "hf_longformer"]
    assert names("none") == ["hasten_reference"]
    assert names("none,sdpa_math") == ["hasten_reference", "sdpa_math"]


def test_on_a_gpu_auto_leaves_out_the_slow_ones():
    assert set(names("all", GPU)) - set(names("auto", GPU)) == {"flex", "sdpa_math", "hf_longformer"}
    assert {"sdpa_cudnn", "sdpa_flash", "sdpa_efficient"} <= set(names("auto", GPU))
    assert "flex" in names("auto,flex", GPU)


def test_ours_are_all_but_the_oracle_unless_named():
    ours = [name for name in peers.our_implementations(CPU) if name != "reference"]
    assert names("none", CPU, ()) == [f"hasten_{name}" for name in ours]
    with pytest.raises(ArgumentError, match=r"implementation: expected one of .* got 'fastest'"):
        names("none", CPU, ("fastest",))


def test_an_unknown_peer_and_one_that_is_not_here_are_refused():
    with pytest.raises(ArgumentError, match=r"peers: expected auto, all, none or some of sdpa_flash.* got 'spda'"):
        names("spda")
    with pytest.raises(ArgumentError, match="flash_attn_2: needs a CUDA device"):
        names("flash_attn_2")


def test_a_package_without_its_kernels_is_not_here(monkeypatch):
    def find(name: str) -> object | None:
        if name == "flash_attn.cute":
            raise ModuleNotFoundError(name)
        return object() if name == "flash_attn" else None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert "flash_attn_2" not in names("all", GPU)
    with pytest.raises(ArgumentError, match="flash_attn_2_cuda is not installed"):
        names("flash_attn_2", GPU)
    with pytest.raises(ArgumentError, match=r"flash_attn\.cute is not installed"):
        names("flash_attn_4", GPU)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize(
    "text", ["causal", "full", "window:7,2", "longformer:5,3", "blocks:50", "documents:9", "packed:9"]
)
@pytest.mark.parametrize("name", ["hasten_reference", "hasten_reference+deterministic", "sdpa_flash", "sdpa_math"])
def test_every_peer_computes_the_same_problem(name, text, num_kv_heads):
    computes(name, problem(text, num_kv_heads, seqlen=300 if "blocks" in text else 40))


def test_hugging_face_computes_longformer_and_nothing_else():
    computes("hf_longformer", problem("longformer:5,3", num_kv_heads=4))
    for this in (problem("window:5,5", 4), problem("longformer:7,3", 4), problem("longformer:5,3", 2)):
        assert peers.huggingface.refuses(this, CPU) is not None


def computes(name: str, this: Problem) -> None:
    table = {peer.name: peer for peer in peers.find_peers(["all"], CPU, ["reference"], deterministic=True)}
    peer = table[name]
    assert peer.refuses(this, CPU) is None
    q, k, v, dout = this.tensors(CPU, 0)
    want = check.expected(this, q, k, v, dout)
    bound = peer.bind(this, *(tensor.requires_grad_() for tensor in (q, k, v)))
    with bound.context():
        out = bound.run()
    grads = torch.autograd.grad(out, bound.leaves, bound.from_contract(dout))
    for got, wanted in zip((out, *grads), want, strict=True):
        assert check.error(check.our_part(this, bound.to_contract(got)), wanted) < 1e-5


def test_a_matrix_too_large_and_a_mask_without_words_are_refused():
    table = {peer.name: peer for peer in peers.find_peers(["all"], GPU, ["reference"])}
    wide = problem("window:7,2")
    long = replace(wide, seqlen=65536)
    assert table["sdpa_flash"].refuses(wide, GPU) == "takes no mask but causal"
    assert table["sdpa_flash"].refuses(problem("packed:9", num_kv_heads=4), GPU) is None
    assert "as many K/V heads" in table["sdpa_flash"].refuses(problem("packed:9"), GPU)
    assert table["sdpa_cudnn"].refuses(wide, GPU) is None
    assert table["sdpa_cudnn"].refuses(long, GPU) == "the mask as a matrix is too large"
    assert table["flex"].refuses(long, GPU) is None


class FlashAttn:
    """What the flash-attn packages offer, by definition, and a note of what they were told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **words: Any) -> tuple[Tensor, str]:
        self.told.append(words)
        return q + 0, "lse"

    def flash_attn_varlen_func(self, q: Tensor, k: Tensor, v: Tensor, **words: Any) -> Tensor:
        self.told.append(words)
        bounds = words["cu_seqlens_q"].tolist()
        assert words["max_seqlen_k"] == max(after - before for before, after in itertools.pairwise(bounds))
        outs = []
        for first, end in itertools.pairwise(bounds):
            out = attention(*(tensor[None, first:end] for tensor in (q, k, v)), Causal(), implementation="reference")
            assert isinstance(out, Tensor)
            outs.append(out[0])
        return torch.cat(outs)

    class BlockSparseTensorsTorch(NamedTuple):
        mask_block_cnt: Tensor
        mask_block_idx: Tensor
        full_block_cnt: Tensor
        full_block_idx: Tensor
        block_size: tuple[int, int]

    @staticmethod
    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        return function


@pytest.fixture
def package(monkeypatch) -> FlashAttn:
    made = FlashAttn()
    monkeypatch.setattr(importlib, "import_module", lambda name: made)
    flash_attn.block_kinds.cache_clear()
    return made


def test_flash_attn_is_told_of_windows_in_its_own_words(package):
    for text in ("causal", "full", "window:7,2"):
        this = problem(text)
        bound = flash_attn.bind("flash_attn", -1, this, *this.tensors(CPU, 0)[:3])
        assert bound.run().shape == (2, 40, 4, 16)
    windows = [(words["causal"], words["window_size"]) for words in package.told]
    assert windows == [(True, (-1, -1)), (False, (-1, -1)), (False, (7, 2))]
    half = replace(problem("longformer:4,2"), dtype=torch.bfloat16)
    assert flash_attn.refuses(False, half, GPU) == "has no global tokens and no lists of blocks"
    assert flash_attn.refuses(True, half, GPU) is None
    assert "head_dim 128" in flash_attn.refuses(True, replace(half, head_dim=256), GPU)
    assert flash_attn.refuses(True, problem("causal"), GPU) == "takes 16-bit inputs only"


def test_flash_attn_is_told_of_documents_by_their_lengths(package):
    this = problem("packed:9")
    q, k, v, dout = this.tensors(CPU, 0)
    want = check.expected(this, q, k, v, dout)
    bound = flash_attn.bind_4(this, *(tensor.requires_grad_() for tensor in (q, k, v)))
    out = bound.run()
    grads = torch.autograd.grad(out, bound.leaves, bound.from_contract(dout))
    for got, wanted in zip((out, *grads), want, strict=True):
        assert check.error(check.our_part(this, bound.to_contract(got)), wanted) < 1e-5


@pytest.mark.parametrize("seqlen", [300, 640])
@pytest.mark.parametrize("text", ["longformer:70,40", "blocks:50"])
def test_flash_attn_4_is_told_of_every_cell_by_blocks(text, seqlen, package):
    """The two lists and the function of the cells, put together again, are the mask; by rows and by columns."""
    this = problem(text, seqlen=seqlen)
    assert flash_attn.bind_4(this, *this.tensors(CPU, 0)[:3]).run().shape == (2, seqlen, 4, 16)
    (words,) = package.told
    keep = this.mask(CPU).keep(seqlen)[0, 0]
    inside = keep
    if words["mask_mod"] is not None:
        query, key = torch.arange(seqlen)[:, None], torch.arange(seqlen)
        inside = words["mask_mod"](0, 0, query, key, None, None)
        assert torch.equal(inside, keep)
    for lists, cells in ((words["block_sparse_tensors"], keep), (words["block_sparse_tensors_bwd"], keep.T)):
        assert lists.block_size == (128, 128)
        partial, full = (
            spread(lists.mask_block_cnt, lists.mask_block_idx, seqlen),
            spread(lists.full_block_cnt, lists.full_block_idx, seqlen),
        )
        assert not bool((partial & full).any())
        assert torch.equal(full | (partial & cells), cells)
        assert bool(partial.any()) == (words["mask_mod"] is not None)


def spread(counts: Tensor, indices: Tensor, seqlen: int) -> Tensor:
    """The cells of listed blocks; (1, 1, rows) and (1, 1, rows, columns), int32."""
    assert counts.dtype == indices.dtype == torch.int32
    blocks = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        listed = indices[0, 0, row, :count].tolist()
        assert listed == sorted(listed)
        blocks[row, listed] = True
    return blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)[:seqlen, :seqlen]
