"""What a machine gives each feature of attention, and whether what it gives is right.

The content of `hasten doctor`; every answer comes from the public functions, as a user would get it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.bench.check import error
from hasten.errors import UnsupportedError
from hasten.masks import BlockSparse, Causal, Documents, Full, Global, Padding, Window
from hasten.ops.alibi import ALiBi
from hasten.ops.attention import attention
from hasten.ops.explain import explain

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BATCH, _SEQLEN, _HEADS, _KV_HEADS, _HEAD_DIM = 2, 129, 8, 2, 64
_FACTOR = 2.0  # of the error PyTorch makes in the same dtype
_NAMES = ("out", "dq", "dk", "dv")


def _documents(device: torch.device) -> dict[str, Any]:
    return {"mask": Documents(torch.tensor([0, 50, _SEQLEN], dtype=torch.int32, device=device)) & Causal()}


def _blocks(device: torch.device) -> dict[str, Any]:
    return {"mask": BlockSparse(torch.eye(3, dtype=torch.bool, device=device), 64)}


def _bias(device: torch.device) -> dict[str, Any]:
    return {"bias": torch.zeros(1, _HEADS, _SEQLEN, _SEQLEN, device=device)}


#: feature -> the arguments of attention that ask for it
FEATURES: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "full": lambda device: {"mask": Full()},
    "causal": lambda device: {"mask": Causal()},
    "sliding window": lambda device: {"mask": Window(16, 0)},
    "dilated window": lambda device: {"mask": Window(16, 16, dilation=2)},
    "window and global tokens": lambda device: {"mask": Window(16, 16) | Global((0, 1))},
    "block-sparse": _blocks,
    "documents": _documents,
    "padding": lambda device: {"mask": Padding(torch.tensor([_SEQLEN, 100], dtype=torch.int32, device=device))},
    "soft cap": lambda device: {"softcap": 30.0},
    "sinks": lambda device: {"sinks": torch.zeros(_HEADS, device=device)},
    "dense bias": _bias,
    "ALiBi": lambda device: {"bias": ALiBi.for_heads(_HEADS, device)},
    "dropout": lambda device: {"dropout_p": 0.1},
}


@dataclass(frozen=True)
class Exactness:
    """Errors of one implementation against float64, and the largest allowed: twice PyTorch's in the same dtype."""

    device: str
    dtype: str
    implementation: str
    errors: dict[str, float]
    allowed: dict[str, float]

    @property
    def is_exact(self) -> bool:
        """True if every error is within what is allowed; one that is not a number never is."""
        return all(self.errors[name] <= self.allowed[name] for name in _NAMES)


def served_by(device: torch.device) -> dict[str, dict[str, str]]:
    """feature -> dtype -> implementation on that device ("—" where none takes it)."""
    table: dict[str, dict[str, str]] = {}
    for feature, arguments in FEATURES.items():
        table[feature] = {}
        for dtype in DTYPES:
            q, k, v = (tensor.to(dtype) for tensor in _tensors(device)[:3])
            try:
                chosen = explain(q, k, v, **arguments(device)).implementation
            except UnsupportedError:
                chosen = "—"
            table[feature][_short(dtype)] = chosen
    return table


def not_served() -> dict[str, str]:
    """implementation -> why it takes no call at all with the Triton installed here."""
    if importlib.util.find_spec("triton") is None:
        return dict.fromkeys(("hopper", "portable"), "triton is not installed")
    from hasten.ops.hopper import envelope  # here, because it needs triton, which may be missing

    reason = envelope.version_refusal()
    return {} if reason is None else {"hopper": reason}


def check_exactness(device: torch.device, dtype: torch.dtype) -> Exactness:
    """Causal attention with grouped heads, forward and backward, as it is served on that device."""
    narrow = [tensor.to(dtype) for tensor in _tensors(device)]
    truth = _run(_oracle, [tensor.double() for tensor in narrow])
    ours, torchs = _run(_ours, narrow), _run(_torchs, narrow)
    floor = torch.finfo(dtype).eps  # where PyTorch happens to be exact, rounding the result once is allowed
    errors = {name: error(got, want) for name, got, want in zip(_NAMES, ours, truth, strict=True)}
    theirs = {name: error(got, want) for name, got, want in zip(_NAMES, torchs, truth, strict=True)}
    allowed = {name: max(_FACTOR * value, floor) for name, value in theirs.items()}
    q, k, v, _ = narrow
    chosen = explain(q, k, v, Causal()).implementation
    return Exactness(device.type, _short(dtype), chosen, errors, allowed)


def _tensors(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (_HEADS, _KV_HEADS, _KV_HEADS, _HEADS)
    q, k, v, dout = (torch.randn(_BATCH, _SEQLEN, number, _HEAD_DIM, generator=generator) for number in heads)
    return q.to(device), k.to(device), v.to(device), dout.to(device)


def _run(function: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """out and the gradients of q, k, v."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, tensors[3]))


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attention(q, k, v, Causal())
    assert isinstance(out, Tensor)
    return out


def _oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attention(q, k, v, Causal(), implementation="reference")
    assert isinstance(out, Tensor)
    return out


def _torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own, as it chooses; grouped heads by repeating K and V, which every back end takes."""
    group_size = _HEADS // _KV_HEADS
    k, v = k.repeat_interleave(group_size, dim=2), v.repeat_interleave(group_size, dim=2)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
