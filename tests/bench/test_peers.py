"""Peers: which are here, what they refuse, and that each computes the problem it is given."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from hasten.bench import check, peers
from hasten.bench.problems import Pattern, Problem
from hasten.errors import ArgumentError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def names(asked: str, device: torch.device = CPU, ours: tuple[str, ...] = ("reference",)) -> list[str]:
    return [peer.name for peer in peers.find_peers(asked.split(","), device, list(ours))]


def problem(text: str, num_kv_heads: int = 2) -> Problem:
    pattern = Pattern.parse(text)
    sizes = {"batch": 2, "seqlen": 40, "num_heads": 4, "num_kv_heads": num_kv_heads, "head_dim": 16}
    return Problem(**sizes, pattern=pattern, dtype=torch.float32)


def test_on_a_cpu_the_peers_are_torchs_two():
    assert names("auto") == names("all") == ["hasten_reference", "sdpa_flash", "sdpa_math"]
    assert names("none") == ["hasten_reference"]
    assert names("none,sdpa_math") == ["hasten_reference", "sdpa_math"]


def test_on_a_gpu_auto_leaves_out_the_slow_ones():
    assert set(names("all", GPU)) - set(names("auto", GPU)) == {"flex", "sdpa_math"}
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
@pytest.mark.parametrize("text", ["causal", "full", "window:7,2", "longformer:5,3"])
@pytest.mark.parametrize("name", ["hasten_reference", "sdpa_flash", "sdpa_math"])
def test_every_peer_computes_the_same_problem(name, text, num_kv_heads):
    this = problem(text, num_kv_heads)
    (peer,) = [peer for peer in peers.find_peers(["auto"], CPU, ["reference"]) if peer.name == name]
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
    assert table["sdpa_cudnn"].refuses(wide, GPU) is None
    assert table["sdpa_cudnn"].refuses(long, GPU) == "the mask as a matrix is too large"
    assert table["flex"].refuses(long, GPU) is None


def test_flash_attn_is_told_of_windows_in_its_own_words(monkeypatch):
    told = []

    class Module:
        @staticmethod
        def flash_attn_func(q, k, v, causal, window_size):
            told.append((causal, window_size))
            return q + 0, "lse"

    monkeypatch.setattr(importlib, "import_module", lambda name: Module)
    for text in ("causal", "full", "window:7,2"):
        this = problem(text)
        bound = peers._bind_flash_attn("flash_attn", -1, this, *this.tensors(CPU, 0)[:3])
        assert bound.run().shape == (2, 40, 4, 16)
    assert told == [(True, (-1, -1)), (False, (-1, -1)), (False, (7, 2))]
    refusal = peers._flash_attn_refuses(problem("longformer:4,2"), GPU)
    assert refusal == "has no global tokens"
    assert peers._flash_attn_refuses(problem("causal"), GPU) == "takes 16-bit inputs only"
