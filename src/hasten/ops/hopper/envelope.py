"""Which calls the Hopper kernels take: what TMA can address, and the features they have.

Imports no Gluon, whose names differ between versions of Triton: those that are not served are refused here.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hasten.ops.call import Call
from hasten.ops.tiles import as_band

#: bytes of which every address and stride that TMA uses is a multiple
_TMA_BYTES = 16
_LARGEST = 2**31 - 1
#: first version of Triton that is served, and first that is not: what tests/ops/hopper compile, up to where they have
#: passed on a GPU. 3.8 and 3.9 compile (`make test-newest`); once they have run, END_VERSION = (3, 10) is all it takes.
FIRST_VERSION, END_VERSION = (3, 6), (3, 8)


def version_refusal() -> str | None:
    """Why this version of Triton cannot serve, or None."""
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    if FIRST_VERSION <= (major, minor) < END_VERSION:
        return None
    first, end = (".".join(map(str, version)) for version in (FIRST_VERSION, END_VERSION))
    return f"written for triton >= {first}, < {end}, this is {triton.__version__}"


def _is_hopper(device: torch.device) -> bool:
    """Not cached here: torch keeps the properties, and dynamo warns of caches of ours."""
    properties = torch.cuda.get_device_properties(device)
    return torch.version.hip is None and (properties.major, properties.minor) == (9, 0)


def untouchable(name: str, tensor: Tensor) -> str | None:
    """Why TMA cannot address a tensor (..., heads, head_dim), or None."""
    if tensor.data_ptr() % _TMA_BYTES:
        return f"TMA needs {name} to start at a multiple of {_TMA_BYTES} bytes"
    if tensor.stride(-1) != 1:
        return f"TMA needs a last stride of 1, {name} has {tensor.stride(-1)}"
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size > 1 and (stride <= 0 or stride * tensor.element_size() % _TMA_BYTES):
            return f"TMA needs strides of a positive multiple of {_TMA_BYTES} bytes, {name} has {tensor.stride()}"
    if max(tensor.shape) > _LARGEST:
        return f"TMA needs sizes below 2^31, {name} has {tuple(tensor.shape)}"
    return None


def refuses(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    """Why the call is outside the envelope, or None."""
    reason = version_refusal()
    if reason or q.device.type != "cuda" or not _is_hopper(q.device):
        return reason or f"written for Hopper (compute capability 9.0), q is on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"float16 and bfloat16, got {q.dtype}"
    features = {"bias": call.bias, "ALiBi slopes": call.slopes, "dropout": call.seed}
    named = [name for name, term in features.items() if term is not None]
    if named:
        return f"no {' or '.join(named)}"
    sizes = q.shape[-1], v.shape[-1]
    if max(sizes) > 256 or any(size % 8 for size in sizes):
        return f"head_dim in multiples of 8 up to 256, got {sizes[0]} and {sizes[1]}"
    if 0 in q.shape or 0 in k.shape:
        return f"nothing to address: q is {tuple(q.shape)}, k is {tuple(k.shape)}"
    band = as_band(call.mask)
    if call.is_packed and (band is None or band.padding is not None):
        return f"packed sequences take Full, Causal and plain Window masks, got {call.mask!r}"
    reasons = (untouchable(name, tensor) for name, tensor in (("q", q), ("k", k), ("v", v)))
    return next((reason for reason in reasons if reason), None)
