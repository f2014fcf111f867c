"""Host side of the portable kernels: outputs, strides, grids. Everything was checked above.

What a launch is told besides addresses is worked out once, by `plans.py`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton import TritonError

from hasten.ops.call import Call, Gradients
from hasten.ops.portable import plans
from hasten.ops.portable.plans import Sizes
from hasten.ops.portable.table import Limits, Tile
from hasten.ops.tiles import as_band, tile_lists

__all__ = ["Sizes", "TritonError", "backward", "forward", "limits"]


@lru_cache
def limits(device: torch.device) -> Limits | None:
    """What the GPU allows; None where the kernels are interpreted."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    capability = 0 if torch.version.hip else 10 * properties.major + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Limits(capability, shared)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), as `call.py` says."""
    sizes = Sizes.of(q, k, v, call)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(
        (q.shape[1], q.shape[0]) if call.is_packed else (q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32
    )
    block, launch = plans.forward(sizes, sizes.line("forward"), limits(q.device), out.stride(), lse.stride())
    launch(
        q, k, v, out, lse, call.sinks, call.bias, call.slopes, call.seed, call.cu_seqlens_q, call.cu_seqlens_k,
        *_visits(q, sizes, call, block, columns=False),
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Gradients:
    """Gradients, as `call.py` says; deterministic."""
    sizes = Sizes.of(q, k, v, call)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    delta = _delta(dout, dlse, out, lse, sizes, call)
    saved = (q, k, v, dout, lse, delta)
    dk, dv = _dkdv(saved, sizes, call)
    dq, dslopes = _dq(saved, sizes, call)
    dbias = _dbias(saved, sizes, call) if call.bias is not None and call.needs_bias else None
    dsinks = None
    if call.sinks is not None:  # the sink is one more key whose value is zero: ds = p * (0 - delta)
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(call.sinks[:, None] - lse)) * -delta
        dsinks = share.sum(-1) if lse.ndim == 2 else share.sum((0, 2))
    return Gradients(dq, dk, dv, dsinks, dbias, dslopes)


def _delta(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sizes: Sizes, call: Call) -> Tensor:
    delta = torch.empty_like(lse)
    strides = out.stride(), dout.stride(), lse.stride(), None if dlse is None else dlse.stride()
    plans.delta(sizes, *strides)(out, dout, dlse, delta, call.cu_seqlens_q)
    return delta


def _dkdv(saved: tuple[Tensor, ...], sizes: Sizes, call: Call) -> tuple[Tensor, Tensor]:
    q, k, v, dout, lse, delta = saved
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    strides = dout.stride(), lse.stride(), dk.stride(), dv.stride()
    block, launch = plans.dkdv(sizes, sizes.line("dkdv"), limits(q.device), *strides)
    launch(
        q, k, v, dout, lse, delta, dk, dv, call.bias, call.slopes, call.seed, call.cu_seqlens_q, call.cu_seqlens_k,
        *_visits(q, sizes, call, block, columns=True),
    )  # fmt: skip
    return dk, dv


def _dq(saved: tuple[Tensor, ...], sizes: Sizes, call: Call) -> tuple[Tensor, Tensor | None]:
    q, k, v, dout, lse, delta = saved
    dq = q.new_empty(q.shape)
    dslope = None if call.slopes is None else torch.empty_like(lse)
    strides = dout.stride(), lse.stride(), dq.stride()
    block, launch = plans.dq(sizes, sizes.line("dq"), limits(q.device), *strides)
    launch(
        q, k, v, dout, lse, delta, dq, dslope, call.bias, call.slopes, call.seed, call.cu_seqlens_q, call.cu_seqlens_k,
        *_visits(q, sizes, call, block, columns=False),
    )  # fmt: skip
    if dslope is None or call.slopes is None:
        return dq, None
    total = dslope.sum(-1)
    return dq, total.reshape(-1, sizes.num_heads).sum_to_size(call.slopes.shape)


def _dbias(saved: tuple[Tensor, ...], sizes: Sizes, call: Call) -> Tensor:
    q, k, v, dout, lse, delta = saved
    assert call.bias is not None
    bias_shape = tuple(call.bias.shape)
    strides = dout.stride(), lse.stride()
    block, launch, shape = plans.dbias(sizes, sizes.line("dbias"), limits(q.device), bias_shape, *strides)
    dbias = torch.zeros(shape, dtype=torch.float32, device=q.device)
    launch(
        q, k, v, dout, lse, delta, dbias, call.bias, call.seed,
        *_visits(q, sizes, call, block, columns=False),
    )  # fmt: skip
    return dbias.sum(2, keepdim=True).to(call.bias.dtype) if bias_shape[2] == 1 else dbias.to(call.bias.dtype)


def _visits(q: Tensor, sizes: Sizes, call: Call, block: Tile, columns: bool) -> tuple[Tensor | None, ...]:
    """Range of real keys (None if all are) and, for a mask that is no band, its index lists; `columns` for dk, dv."""
    if sizes.band is not None:
        band = as_band(call.mask) if sizes.is_padded else None
        padding = None if band is None else band.padding
        return (None if padding is None else padding.key_range(call.max_seqlen_k, q.device),)
    shape = call.max_seqlen_q, call.max_seqlen_k, block.block_m, block.block_n
    lists = tile_lists(call.mask, sizes.batch, sizes.num_heads, *shape, q.device)
    if columns:
        return None, lists.col_ptr, lists.col_index, lists.col_bits, lists.bits
    return None, lists.row_ptr, lists.row_index, lists.row_bits, lists.bits
