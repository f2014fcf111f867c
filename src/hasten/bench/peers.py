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

from hasten.bench.problems import Problem
from hasten.errors import ArgumentError, HastenError
from hasten.ops import choose
from hasten.ops.attention import attention, prepare

_LARGEST_DENSE_MASK = 1 << 30


def _everywhere() -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Bound:
    """A peer with its inputs: `run()` gives out; `leaves` are q, k, v as it was given them.

    All are (batch, heads, seqlen, head_dim) if `heads_first`, else (batch, seqlen, heads, head_dim).
    """

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    heads_first: bool
    context: Callable[[], AbstractContextManager[Any]] = _everywhere

    def to_contract(self, tensor: Tensor) -> Tensor:
        """(batch, seqlen, heads, head_dim), our layout."""
        return tensor.transpose(1, 2) if self.heads_first else tensor

    def from_contract(self, tensor: Tensor) -> Tensor:
        """The layout of this peer, contiguous."""
        return tensor.transpose(1, 2).contiguous() if self.heads_first else tensor


@dataclass(frozen=True)
class Peer:
    """An attention that can be measured."""

    name: str
    refuses: Callable[[Problem, torch.device], str | None]
    bind: Callable[[Problem, Tensor, Tensor, Tensor], Bound]
    is_ours: bool = False


def find_peers(names: list[str], device: torch.device, implementations: list[str]) -> list[Peer]:
    """The peers of those names ("auto": all here but slow ones, "all": all here), behind ours.

    `implementations`: which of ours; empty means each one but the oracle. Raises ArgumentError for a name that
    does not exist, and for one asked for by name that is not installed.
    """
    ours = implementations or [name for name in _ours_on(device) if name != "reference"]
    unknown = [name for name in ours if name not in choose.MODULES]
    if unknown:
        raise ArgumentError("implementation", f"one of {', '.join(choose.MODULES)}", repr(unknown[0]), "or leave it out")
    table = {peer.name: peer for peer in _PEERS}
    chosen: dict[str, Peer] = {}
    for name in names:
        if name in ("auto", "all"):
            slow = _SLOW if name == "auto" and device.type == "cuda" else ()
            chosen |= {key: peer for key, peer in table.items() if key not in slow and _absence(key, device) is None}
        elif name == "none":
            continue
        elif name not in table:
            raise ArgumentError("peers", f"auto, all, none or some of {', '.join(table)}", repr(name), "separate by commas")
        elif (absence := _absence(name, device)) is not None:
            raise ArgumentError("peers", "peers that are here", f"{name}: {absence}", "use auto for those that are")
        else:
            chosen[name] = table[name]
    return [_our_peer(name) for name in ours] + list(chosen.values())


def _ours_on(device: torch.device) -> tuple[str, ...]:
    return choose.ORDER.get(device.type, choose.ORDER_ELSEWHERE)


def _our_peer(implementation: str) -> Peer:
    """One of our implementations, called as a user calls it: through the public op, with the name forced."""

    def refuses(problem: Problem, device: torch.device) -> str | None:
        shape = (problem.batch, problem.seqlen, problem.num_heads, problem.head_dim)
        q = torch.empty(shape, dtype=problem.dtype, device=device)
        k = q[:, :, : problem.num_kv_heads]
        ready = prepare(q, k, k, problem.pattern.mask(), None, None, None, None, 0.0, None, None, None, None)
        try:
            choose.choose(ready.q, ready.k, ready.v, ready.call, implementation)
        except HastenError as error:
            return str(error)
        return None

    def bind(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
        mask = problem.pattern.mask()

        def run() -> Tensor:
            out = attention(q, k, v, mask, implementation=implementation)
            assert isinstance(out, Tensor)
            return out

        return Bound(run, (q, k, v), heads_first=False)

    return Peer(f"hasten_{implementation}", refuses, bind, is_ours=True)


def _absence(name: str, device: torch.device) -> str | None:
    """Why a peer is not on this machine at all, or None."""
    if name in ("sdpa_cudnn", "sdpa_efficient") and device.type != "cuda":
        return "needs a CUDA device"
    if name == "flex" and device.type != "cuda":
        return "has no backward on the CPU, and needs a C++ compiler there"
    module = {"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute"}.get(name)
    if module is None:
        return None
    if device.type != "cuda":
        return "needs a CUDA device"
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if name == "flash_attn_2" and importlib.util.find_spec("flash_attn_2_cuda") is None:
        return "flash_attn is here without its compiled kernels"
    return None


def _bind_sdpa(backend: SDPBackend, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """torch's scaled_dot_product_attention with one back end, on contiguous (batch, heads, seqlen, head_dim)."""
    pattern = problem.pattern
    leaves = tuple(tensor.detach().transpose(1, 2).contiguous().requires_grad_(tensor.requires_grad) for tensor in (q, k, v))
    matrix = None if pattern.is_dense else pattern.mask().keep(problem.seqlen, device=q.device)
    options = {"attn_mask": matrix, "is_causal": pattern.is_causal, "enable_gqa": problem.num_kv_heads != problem.num_heads}
    run = partial(F.scaled_dot_product_attention, *leaves, **options)
    return Bound(run, (leaves[0], leaves[1], leaves[2]), heads_first=True, context=partial(sdpa_kernel, backend))


def _sdpa_refuses(takes_matrix: bool, problem: Problem, device: torch.device) -> str | None:
    if problem.pattern.is_dense:
        return None
    if not takes_matrix and device.type == "cuda":
        return "takes no mask but causal"
    return "the mask as a matrix is too large" if problem.seqlen**2 > _LARGEST_DENSE_MASK else None


def _bind_flex(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """FlexAttention compiled for exactly this problem, on contiguous (batch, heads, seqlen, head_dim)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # imports the compiler

    leaves = tuple(tensor.detach().transpose(1, 2).contiguous().requires_grad_(tensor.requires_grad) for tensor in (q, k, v))
    is_full = problem.pattern.is_dense and not problem.pattern.is_causal
    blocks = None
    if not is_full:
        blocks = create_block_mask(problem.pattern.mask_mod(), None, None, problem.seqlen, problem.seqlen, device=str(q.device))
    compiled = torch.compile(flex_attention, dynamic=False)
    run = partial(compiled, *leaves, block_mask=blocks, enable_gqa=problem.num_kv_heads != problem.num_heads)
    return Bound(run, (leaves[0], leaves[1], leaves[2]), heads_first=True)


def _bind_flash_attn(module: str, unlimited: int | None, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """The flash-attn packages, on (batch, seqlen, heads, head_dim); `unlimited` is how they write no window."""
    function = importlib.import_module(module).flash_attn_func
    leaves = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in (q, k, v))
    pattern = problem.pattern
    window = (unlimited, unlimited) if pattern.is_dense else (pattern.left, pattern.right)

    def run() -> Tensor:
        out = function(*leaves, causal=pattern.is_causal, window_size=window)
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, Tensor)
        return result

    return Bound(run, (leaves[0], leaves[1], leaves[2]), heads_first=False)


def _flash_attn_refuses(problem: Problem, device: torch.device) -> str | None:
    if problem.pattern.num_global:
        return "has no global tokens"
    return "takes 16-bit inputs only" if problem.dtype.itemsize != 2 else None


def _flex_refuses(problem: Problem, device: torch.device) -> str | None:
    return None if problem.head_dim >= 16 else "needs head_dim >= 16"


#: Those whose preparation takes longer than their measuring: seconds of compiling for every problem (flex), or
#: whole score matrices (math). "auto" leaves them out on a GPU.
_SLOW = ("flex", "sdpa_math")
_PEERS = (
    Peer("sdpa_flash", partial(_sdpa_refuses, False), partial(_bind_sdpa, SDPBackend.FLASH_ATTENTION)),
    Peer("sdpa_cudnn", partial(_sdpa_refuses, True), partial(_bind_sdpa, SDPBackend.CUDNN_ATTENTION)),
    Peer("sdpa_efficient", partial(_sdpa_refuses, True), partial(_bind_sdpa, SDPBackend.EFFICIENT_ATTENTION)),
    Peer("sdpa_math", partial(_sdpa_refuses, True), partial(_bind_sdpa, SDPBackend.MATH)),
    Peer("flex", _flex_refuses, _bind_flex),
    Peer("flash_attn_2", _flash_attn_refuses, partial(_bind_flash_attn, "flash_attn", -1)),
    Peer("flash_attn_3", _flash_attn_refuses, partial(_bind_flash_attn, "flash_attn_interface", -1)),
    Peer("flash_attn_4", _flash_attn_refuses, partial(_bind_flash_attn, "flash_attn.cute", None)),
)
