"""Which implementation serves a call: a fixed order for each kind of device, and the reasons.

The first of the order that does not refuse the call is taken. `implementation=` or the environment
variable HASTEN_IMPLEMENTATION forces one: outside its envelope that is an error, never a silent switch.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from torch import Tensor

from hasten import config
from hasten.errors import ArgumentError, UnsupportedError
from hasten.ops.call import Call, Gradients

#: the implementations, and for each device type the order in which they are asked
NAMES = ("hopper", "portable", "blockwise", "reference")
ORDER = {"cuda": ("hopper", "portable", "blockwise", "reference")}
ORDER_ELSEWHERE = ("blockwise", "reference")


class Implementation(Protocol):
    """What `call.py` says an implementation is."""

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
        """Why the call is outside the envelope, or None."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """(out, lse)."""

    def backward(self, dout: Tensor, dlse: Tensor | None, *saved: Any) -> Gradients:
        """Gradients of q, k, v, out, lse, call."""


def load(name: str) -> Implementation:
    """The implementation of that name; its module is imported on first use (by statements, which dynamo traces)."""
    module: Any
    if name == "hopper":
        from hasten.ops import hopper as module
    elif name == "portable":
        from hasten.ops import portable as module
    elif name == "blockwise":
        from hasten.ops import blockwise as module
    else:
        from hasten.ops import reference as module
    return module


def choose(q: Tensor, k: Tensor, v: Tensor, call: Call, forced: str | None) -> tuple[str, dict[str, str]]:
    """(name of the implementation, why each one before it in the order was passed over).

    Raises ArgumentError for an unknown forced name and UnsupportedError for one that refuses the call.
    """
    forced = forced or config.forced_implementation()
    if forced is not None:
        if forced not in NAMES:
            raise ArgumentError("implementation", f"one of {', '.join(NAMES)}", repr(forced), "or leave it out")
        reason = _refusal(forced, q, k, v, call)
        if reason:
            raise UnsupportedError(forced, reason, "leave implementation out to have another one chosen")
        return forced, {}
    refused: dict[str, str] = {}
    for name in ORDER.get(q.device.type, ORDER_ELSEWHERE):
        reason = _refusal(name, q, k, v, call)
        if reason is None:
            return name, refused
        refused[name] = reason
    raise UnsupportedError("any", "; ".join(f"{name}: {why}" for name, why in refused.items()), "see hasten.explain")


def no_triton(tensor: Tensor) -> str | None:
    """Why Triton kernels cannot take this tensor, or None; under TRITON_INTERPRET=1 they run on the CPU."""
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels need a GPU, q is on {tensor.device.type}"
    try:
        import triton  # noqa: F401  # here, because `import hasten` must not load it
    except ImportError:
        return "triton is not installed"
    return None


def _refusal(name: str, q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    reason = no_triton(q) if name in ("hopper", "portable") else None
    return reason or load(name).refuses(q, k, v, call)
