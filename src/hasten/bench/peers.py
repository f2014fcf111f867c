"""What is measured beside what: every attention on this machine that others use, and our own implementations.

Each peer is a row of a table: its name, why it cannot do a problem here (or None), and how it is called with
tensors in the layout it likes best. A new peer is a new row; one that needs more words than a function has a
module of its own. Knows no clock.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from hasten.bench import flash_attn, huggingface, torch_peers
from hasten.bench.bound import Bound, as_given, cu_seqlens, packed
from hasten.bench.problems import Problem
from hasten.errors import ArgumentError
from hasten.masks import Causal
from hasten.ops import choose
from hasten.ops.attention import attention


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Peer:
    """An attention that can be measured. `begin` runs once before each problem."""

    name: str
    refuses: Callable[[Problem, torch.device], str | None]
    bind: Callable[[Problem, Tensor, Tensor, Tensor], Bound]
    is_ours: bool = False
    begin: Callable[[], None] = _nothing


def find_peers(
    names: list[str], device: torch.device, implementations: list[str], deterministic: bool = False
) -> list[Peer]:
    """The peers of those names ("auto": all here but slow ones, "all": all here), behind ours.

    `implementations`: which of ours; empty means each one but the oracle. `deterministic`: ours once more, asked
    for gradients that are equal in every bit on every run. Raises ArgumentError for a name that
    does not exist, and for one asked for by name that is not installed.
    """
    ours = implementations or [name for name in our_implementations(device) if name != "reference"]
    unknown = [name for name in ours if name not in choose.NAMES]
    if unknown:
        raise ArgumentError("implementation", f"one of {', '.join(choose.NAMES)}", repr(unknown[0]), "or leave it out")
    table = {peer.name: peer for peer in _PEERS}
    chosen: dict[str, Peer] = {}
    for name in names:
        if name in ("auto", "all"):
            slow = (_SLOW if device.type == "cuda" else ("hf_longformer",)) if name == "auto" else ()
            chosen |= {key: peer for key, peer in table.items() if key not in slow and _absence(key, device) is None}
        elif name == "none":
            continue
        elif name not in table:
            raise ArgumentError(
                "peers", f"auto, all, none or some of {', '.join(table)}", repr(name), "separate by commas"
            )
        elif (absence := _absence(name, device)) is not None:
            raise ArgumentError("peers", "peers that are here", f"{name}: {absence}", "use auto for those that are")
        else:
            chosen[name] = table[name]
    ways = (False, True) if deterministic else (False,)
    return [_our_peer(name, way) for name in ours for way in ways] + list(chosen.values())


def our_implementations(device: torch.device) -> tuple[str, ...]:
    """Ours on that device, in the order in which they are asked."""
    return choose.ORDER.get(device.type, choose.ORDER_ELSEWHERE)


def _our_peer(implementation: str, deterministic: bool) -> Peer:
    """One of our implementations, called as a user calls it: through the public op, with the name forced.

    What it cannot do it says itself, when called, with an UnsupportedError.
    """

    def bind(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
        is_packed = problem.pattern.is_packed
        words: dict[str, Any] = {"implementation": implementation, "deterministic": deterministic}
        if is_packed:
            q, k, v = packed(q, k, v)
            words |= {"mask": Causal(), **cu_seqlens(problem, q.device)}
        else:
            words |= {"mask": problem.mask(q.device)}

        def run() -> Tensor:
            out = attention(q, k, v, **words)
            assert isinstance(out, Tensor)
            return out

        return Bound(run, (q, k, v), is_packed=is_packed)

    return Peer(f"hasten_{implementation}{'+deterministic' if deterministic else ''}", _takes_all, bind, is_ours=True)


def _absence(name: str, device: torch.device) -> str | None:
    """Why a peer is not on this machine at all, or None."""
    if name in ("sdpa_cudnn", "sdpa_efficient") and device.type != "cuda":
        return "needs a CUDA device"
    if name == "flex" and device.type != "cuda":
        return "has no backward on the CPU, and needs a C++ compiler there"
    if name == "hf_longformer" and not _is_installed("transformers"):
        return "transformers is not installed"
    if name not in _FLASH_ATTN:
        return None
    if device.type != "cuda":
        return "needs a CUDA device"
    missing = [module for module in _FLASH_ATTN[name] if not _is_installed(module)]
    return f"{missing[0]} is not installed" if missing else None


def _is_installed(module: str) -> bool:
    """True if the module can be found; its parent package is imported to look inside."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the parent is not there, or not for this machine
        return False


def _bind_hf_longformer(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """Hugging Face transformers, on (batch, seqlen, heads, head_dim)."""
    q, k, v = as_given(q, k, v)
    return Bound(huggingface.longformer_function(problem, q, k, v), (q, k, v))


def _takes_all(problem: Problem, device: torch.device) -> str | None:
    return None


#: Modules that must be there: the first is the one called, others hold its kernels.
_FLASH_ATTN = {
    "flash_attn_2": ("flash_attn", "flash_attn_2_cuda"),
    "flash_attn_3": ("flash_attn_interface",),
    "flash_attn_4": ("flash_attn.cute",),
}
#: "auto" leaves these out on a GPU: seconds of compiling for every problem (flex), whole score matrices (math),
#: one mask alone and far from the others (Hugging Face).
_SLOW = ("flex", "sdpa_math", "hf_longformer")
_PEERS = (
    Peer(
        "sdpa_flash",
        partial(torch_peers.sdpa_refuses, False),
        partial(torch_peers.bind_sdpa, SDPBackend.FLASH_ATTENTION),
    ),
    Peer(
        "sdpa_cudnn",
        partial(torch_peers.sdpa_refuses, True),
        partial(torch_peers.bind_sdpa, SDPBackend.CUDNN_ATTENTION),
    ),
    Peer(
        "sdpa_efficient",
        partial(torch_peers.sdpa_refuses, True),
        partial(torch_peers.bind_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    ),
    Peer("sdpa_math", partial(torch_peers.sdpa_refuses, True), partial(torch_peers.bind_sdpa, SDPBackend.MATH)),
    Peer("flex", _takes_all, torch_peers.bind_flex, begin=torch_peers.forget_compiled),
    Peer("flash_attn_2", partial(flash_attn.refuses, False), partial(flash_attn.bind, "flash_attn", -1)),
    Peer("flash_attn_3", partial(flash_attn.refuses, False), partial(flash_attn.bind, "flash_attn_interface", -1)),
    Peer("flash_attn_4", partial(flash_attn.refuses, True), flash_attn.bind_4),
    Peer("hf_longformer", huggingface.refuses, _bind_hf_longformer),
)
