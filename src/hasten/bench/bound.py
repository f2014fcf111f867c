"""A peer with its inputs, in the layout it likes best: what every module of peers makes and the suite calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.bench.problems import Problem


@dataclass(frozen=True)
class Bound:
    """A peer with its inputs: `run()` gives out; `leaves` are q, k, v as it was given them.

    All are (batch, heads, seqlen, head_dim) if `heads_first`, (seqlen, heads, head_dim) if `is_packed`, else
    (batch, seqlen, heads, head_dim).
    """

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    heads_first: bool = False
    is_packed: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def to_contract(self, tensor: Tensor) -> Tensor:
        """(batch, seqlen, heads, head_dim), our layout."""
        tensor = tensor[None] if self.is_packed else tensor
        return tensor.transpose(1, 2) if self.heads_first else tensor

    def from_contract(self, tensor: Tensor) -> Tensor:
        """The layout of this peer, contiguous."""
        tensor = tensor[0] if self.is_packed else tensor
        return tensor.transpose(1, 2).contiguous() if self.heads_first else tensor


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Leaves of the layout (batch, heads, seqlen, head_dim), contiguous, which ask for gradients as these do."""
    return tuple(
        tensor.detach().transpose(1, 2).contiguous().requires_grad_(tensor.requires_grad) for tensor in tensors
    )


def packed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Leaves of the layout (seqlen, heads, head_dim), which ask for gradients as these do; the batch is 1."""
    return tuple(tensor.detach()[0].requires_grad_(tensor.requires_grad) for tensor in tensors)


def cu_seqlens(problem: Problem, device: torch.device) -> dict[str, Any]:
    """The documents of a problem as ours and the flash-attn packages name them."""
    bounds, longest = problem.cu_seqlens(device)
    return {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}


def as_given(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Leaves of the layout (batch, seqlen, heads, head_dim), which ask for gradients as these do."""
    return tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors)
