"""What is measured beside what: every attention on this machine that others use, and our own implementations.

Each peer is a row of a table: its name, why it cannot do a problem here (or None), and how it is called with
tensors in the layout it likes best. A new peer is a new row. Knows no clock.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.bench.problems import Pattern, Problem
from hasten.errors import ArgumentError
from hasten.ops import choose
from hasten.ops.attention import attention

_LARGEST_DENSE_MASK = 1 << 30


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Bound:
    """A peer with its inputs: `run()` gives out; `leaves` are q, k, v as it was given them.

    All are (batch, heads, seqlen, head_dim) if `heads_first`, else (batch, seqlen, heads, head_dim).
    """

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    heads_first: bool
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def to_contract(self, tensor: Tensor) -> Tensor:
        """(batch, seqlen, heads, head_dim), our layout."""
        return tensor.transpose(1, 2) if self.heads_first else tensor

    def from_contract(self, tensor: Tensor) -> Tensor:
        """The layout of this peer, contiguous."""
        return tensor.transpose(1, 2).contiguous() if self.heads_first else tensor


@dataclass(frozen=True)
class Peer:
    """An attention that can be measured. `begin` runs once before each problem."""

    name: str
    refuses: Callable[[Problem, torch.device], str | None]
    bind: Callable[[Problem, Tensor, Tensor, Tensor], Bound]
    is_ours: bool = False
    begin: Callable[[], None] = _nothing


def find_peers(names: list[str], device: torch.device, implementations: list[str]) -> list[Peer]:
    """The peers of those names ("auto": all here but slow ones, "all": all here), behind ours.

    `implementations`: which of ours; empty means each one but the oracle. Raises ArgumentError for a name that
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
            slow = _SLOW if name == "auto" and device.type == "cuda" else ()
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
    return [_our_peer(name) for name in ours] + list(chosen.values())


def our_implementations(device: torch.device) -> tuple[str, ...]:
    """Ours on that device, in the order in which they are asked."""
    return choose.ORDER.get(device.type, choose.ORDER_ELSEWHERE)


def _our_peer(implementation: str) -> Peer:
    """One of our implementations, called as a user calls it: through the public op, with the name forced.

    What it cannot do it says itself, when called, with an UnsupportedError.
    """

    def bind(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
        mask = problem.pattern.mask()

        def run() -> Tensor:
            out = attention(q, k, v, mask, implementation=implementation)
            assert isinstance(out, Tensor)
            return out

        return Bound(run, (q, k, v), heads_first=False)

    return Peer(f"hasten_{implementation}", _takes_all, bind, is_ours=True)


def _absence(name: str, device: torch.device) -> str | None:
    """Why a peer is not on this machine at all, or None."""
    if name in ("sdpa_cudnn", "sdpa_efficient") and device.type != "cuda":
        return "needs a CUDA device"
    if name == "flex" and device.type != "cuda":
        return "has no backward on the CPU, and needs a C++ compiler there"
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


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Leaves of the layout (batch, heads, seqlen, head_dim), contiguous, which ask for gradients as these do."""
    return tuple(
        tensor.detach().transpose(1, 2).contiguous().requires_grad_(tensor.requires_grad) for tensor in tensors
    )


def _bind_sdpa(backend: SDPBackend, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """torch's scaled_dot_product_attention with one back end, on contiguous (batch, heads, seqlen, head_dim)."""
    pattern = problem.pattern
    q, k, v = _heads_first(q, k, v)
    matrix = None if pattern.is_dense else pattern.mask().keep(problem.seqlen, device=q.device)
    has_groups = problem.num_kv_heads != problem.num_heads

    def run() -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=matrix, is_causal=pattern.is_causal, enable_gqa=has_groups
        )

    return Bound(run, (q, k, v), heads_first=True, context=partial(sdpa_kernel, backend))


def _sdpa_refuses(takes_matrix: bool, problem: Problem, device: torch.device) -> str | None:
    if problem.pattern.is_dense:
        return None
    if not takes_matrix and device.type == "cuda":
        return "takes no mask but causal"
    return "the mask as a matrix is too large" if problem.seqlen**2 > _LARGEST_DENSE_MASK else None


def _bind_flex(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """FlexAttention compiled for exactly this problem, on contiguous (batch, heads, seqlen, head_dim)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # imports the compiler

    q, k, v = _heads_first(q, k, v)
    length, has_groups = problem.seqlen, problem.num_kv_heads != problem.num_heads
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    blocks = None
    if problem.pattern != Pattern():
        blocks = create_block_mask(problem.pattern.mask_mod(), None, None, length, length, device=str(q.device))

    def run() -> Tensor:
        out = compiled(q, k, v, block_mask=blocks, enable_gqa=has_groups)
        assert isinstance(out, Tensor)
        return out

    return Bound(run, (q, k, v), heads_first=True)


def _forget_compiled() -> None:
    """Start the compiler anew: past eight shapes it would give up and run FlexAttention uncompiled."""
    torch.compiler.reset()


def _bind_flash_attn(module: str, unlimited: int | None, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """The flash-attn packages, on (batch, seqlen, heads, head_dim); `unlimited` is how they write no window."""
    function = importlib.import_module(module).flash_attn_func
    q, k, v = (tensor.detach().requires_grad_(tensor.requires_grad) for tensor in (q, k, v))
    pattern = problem.pattern
    window = (unlimited, unlimited) if pattern.is_dense else (pattern.left, pattern.right)

    def run() -> Tensor:
        out = function(q, k, v, causal=pattern.is_causal, window_size=window)
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, Tensor)
        return result

    return Bound(run, (q, k, v), heads_first=False)


def _flash_attn_refuses(problem: Problem, device: torch.device) -> str | None:
    if problem.pattern.num_global:
        return "has no global tokens"
    return "takes 16-bit inputs only" if problem.dtype.itemsize != 2 else None


def _takes_all(problem: Problem, device: torch.device) -> str | None:
    return None


#: Modules that must be there: the first is the one called, others hold its kernels.
_FLASH_ATTN = {
    "flash_attn_2": ("flash_attn", "flash_attn_2_cuda"),
    "flash_attn_3": ("flash_attn_interface",),
    "flash_attn_4": ("flash_attn.cute",),
}
#: Those whose preparation takes longer than their measuring: seconds of compiling for every problem (flex), or
#: whole score matrices (math). "auto" leaves them out on a GPU.
_SLOW = ("flex", "sdpa_math")
_PEERS = (
    Peer("sdpa_flash", partial(_sdpa_refuses, False), partial(_bind_sdpa, SDPBackend.FLASH_ATTENTION)),
    Peer("sdpa_cudnn", partial(_sdpa_refuses, True), partial(_bind_sdpa, SDPBackend.CUDNN_ATTENTION)),
    Peer("sdpa_efficient", partial(_sdpa_refuses, True), partial(_bind_sdpa, SDPBackend.EFFICIENT_ATTENTION)),
    Peer("sdpa_math", partial(_sdpa_refuses, True), partial(_bind_sdpa, SDPBackend.MATH)),
    Peer("flex", _takes_all, _bind_flex, begin=_forget_compiled),
    Peer("flash_attn_2", _flash_attn_refuses, partial(_bind_flash_attn, "flash_attn", -1)),
    Peer("flash_attn_3", _flash_attn_refuses, partial(_bind_flash_attn, "flash_attn_interface", -1)),
    Peer("flash_attn_4", _flash_attn_refuses, partial(_bind_flash_attn, "flash_attn.cute", None)),
)
