"""What a call of attention would do, without doing it: implementation and why, FLOPs, bytes, least time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.masks import Mask
from hasten.ops import choose, cost, host
from hasten.ops.alibi import ALiBi
from hasten.ops.attention import prepare


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; `print` it or read its fields.

    `refused` says why each implementation before the chosen one was passed over. FLOPs and bytes are of the
    problem (see `cost.py`), for one forward and one backward; `roofline_s` is None where the device's
    rates are not known.
    """

    implementation: str
    refused: dict[str, str]
    mask: str
    visible_share: float
    forward_flops: int
    backward_flops: int
    forward_bytes: int
    backward_bytes: int
    rates: str | None = None
    forward_roofline_s: float | None = None
    backward_roofline_s: float | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"implementation  {self.implementation}"]
        lines += [f"                not {name}: {why}" for name, why in self.refused.items()]
        lines.append(f"mask            {self.mask}, {self.visible_share:.1%} of the cells visible")
        for phase in ("forward", "backward"):
            flops, num_bytes = getattr(self, f"{phase}_flops"), getattr(self, f"{phase}_bytes")
            least = getattr(self, f"{phase}_roofline_s")
            time = "" if least is None else f", at least {least * 1e6:.1f} us on {self.rates}"
            lines.append(f"{phase:<16}{flops / 1e9:.3f} GFLOP, {num_bytes / 1e6:.3f} MB{time}")
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | ALiBi | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    implementation: str | None = None,
) -> Explanation:
    """What `attention` would do with the same arguments; shapes, dtypes and errors are those of `attention`."""
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    devices = [q.device] if isinstance(q, Tensor) and q.is_cuda else []
    with torch.random.fork_rng(devices):  # asking draws no seed for dropout
        ready = prepare(q, k, v, mask, softmax_scale, softcap, sinks, bias, dropout_p, *sequences)
    name, refused = choose.choose(ready.q, ready.k, ready.v, ready.call, implementation)
    sizes, call = cost.Sizes.of(ready.q, ready.k, ready.v), ready.call
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        lengths_q, lengths_k = host.host_copy(call.cu_seqlens_q), host.host_copy(call.cu_seqlens_k)
        pairs = cost.packed_pairs(call.mask, lengths_q, lengths_k, sizes.num_heads)
        starts = zip(itertools.pairwise(lengths_q), itertools.pairwise(lengths_k), strict=True)
        cells = sizes.num_heads * sum((q1 - q0) * (k1 - k0) for (q0, q1), (k0, k1) in starts)
    else:
        pairs = cost.visible_pairs(call.mask, sizes.batch, sizes.num_heads, sizes.seqlen_q, sizes.seqlen_k)
        cells = sizes.batch * sizes.num_heads * sizes.seqlen_q * sizes.seqlen_k
    dims = sizes.head_dim, sizes.head_dim_v
    rates = cost.datasheet_rates(torch.cuda.get_device_name(q.device)) if q.is_cuda else None
    phases = [
        _phase(cost.forward_flops(pairs, *dims), cost.hbm_bytes(sizes), rates),
        _phase(cost.backward_flops(pairs, *dims), cost.hbm_bytes(sizes, is_backward=True), rates),
    ]
    return Explanation(
        implementation=name,
        refused=refused,
        mask=repr(call.mask),
        visible_share=pairs / cells if cells else 0.0,
        forward_flops=phases[0][0],
        backward_flops=phases[1][0],
        forward_bytes=phases[0][1],
        backward_bytes=phases[1][1],
        rates=None if rates is None else f"{torch.cuda.get_device_name(q.device)} (datasheet)",
        forward_roofline_s=phases[0][2],
        backward_roofline_s=phases[1][2],
        shapes={label: tuple(tensor.shape) for label, tensor in (("q", q), ("k", k), ("v", v))},
    )


def _phase(flops: int, num_bytes: int, rates: cost.Rates | None) -> tuple[int, int, float | None]:
    return flops, num_bytes, None if rates is None else cost.roofline_s(flops, num_bytes, rates)
