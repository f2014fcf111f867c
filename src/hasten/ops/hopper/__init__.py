"""Attention in Gluon for NVIDIA Hopper (sm_90): TMA, wgmma, warp specialization.

Envelope: float16, bfloat16; head_dim and head_dim_v in multiples of 8 up to 256; soft cap and sinks, but no bias,
ALiBi or dropout; tensors that TMA can address; packed sequences only with masks that are a band. Not deterministic:
the forward repeats bit for bit, dq of the backward does not.
"""

from __future__ import annotations

from torch import Tensor

from hasten.ops.call import Call, Gradients
from hasten.ops.hopper.envelope import refuses

__all__ = ["backward", "forward", "refuses"]

# The kernels are imported when first launched: Gluon of a Triton that `refuses` names may lack what they use.


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), as `call.py` says."""
    from hasten.ops.hopper import launch

    return launch.forward(q, k, v, call)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Gradients:
    """Gradients, as `call.py` says."""
    from hasten.ops.hopper import backward_launch

    return backward_launch.backward(dout, dlse, q, k, v, out, lse, call)
