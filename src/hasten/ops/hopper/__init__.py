"""Attention in Gluon for NVIDIA Hopper (sm_90): TMA, wgmma, warp specialization.

Envelope: float16, bfloat16; head_dim and head_dim_v in multiples of 8 up to 256; soft cap and sinks, but no bias,
ALiBi or dropout; tensors that TMA can address; packed sequences only with masks that are a band. All repeats bit
for bit, but dq only in a call that is deterministic: it is summed in an order of its own there, which takes longer.
"""

from __future__ import annotations

from hasten.ops.hopper.envelope import refuses, version_refusal

if version_refusal() is None:  # Gluon of another Triton may lack names that the kernels use; `refuses` says so
    from hasten.ops.hopper.backward_launch import backward
    from hasten.ops.hopper.launch import forward

__all__ = ["backward", "forward", "refuses"]
