"""Exact union of attention over disjoint keys, from each part's output and log-sum-exp.

Used for split keys, cascades, ring attention and Longformer's parts. Differentiable in every input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.errors import ArgumentError
from hasten.ops import choose


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over all keys, from (out, lse) over disjoint sets of them.

    out: (batch, seqlen_q, num_heads, head_dim_v) with lse (batch, num_heads, seqlen_q), or packed
    (total_q, num_heads, head_dim_v) with lse (num_heads, total_q). A part with lse = -inf adds nothing;
    if all have it, out = 0 and lse = -inf. Sums in float32. Raises ArgumentError on unequal shapes.
    Source: FlashAttention, arXiv 2205.14135, section 3.1 (softmax by blocks).
    """
    if not parts:
        raise ArgumentError("parts", "at least one (out, lse)", "none", "leave merge out if there is nothing to merge")
    out0, lse0 = parts[0]
    for number, (out, lse) in enumerate(parts):
        want = (out.shape[1], out.shape[0]) if out.ndim == 3 else (out.shape[0], out.shape[2], out.shape[1])
        if out.shape != out0.shape or tuple(lse.shape) != tuple(want):
            got = f"out {tuple(out.shape)}, lse {tuple(lse.shape)}"
            raise ArgumentError(
                f"parts[{number}]", f"out {tuple(out0.shape)}, lse {tuple(lse0.shape)}", got, "split keys only"
            )
    outs, lses = [out for out, _ in parts], [lse for _, lse in parts]
    if choose.no_triton(out0) is None and out0.dtype != torch.float64 and out0.shape[-1] <= 256:
        out, lse = _merge(outs, lses)
        return out, lse
    return _merge_plain(outs, lses)


def _merge_plain(outs: list[Tensor], parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition, in PyTorch."""
    lses = torch.stack(parts)
    seen = (lses > -torch.inf).any(dim=0)
    finite = torch.where(seen, lses, 0.0)
    weights = torch.where(seen, torch.softmax(finite, dim=0), 0.0).transpose(-1, -2).unsqueeze(-1)
    total = weights[0] * outs[0]
    for weight, out in zip(weights[1:], outs[1:], strict=True):
        total = total + weight * out
    return total.to(outs[0].dtype), torch.where(seen, torch.logsumexp(finite, dim=0), -torch.inf)


@torch.library.custom_op("hasten::merge", mutates_args=())
def _merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    from hasten.ops.portable import merge as kernels  # triton is loaded by those who use it

    with torch.cuda.device_of(outs[0]):
        return kernels.forward(outs, lses)


@_merge.register_fake
def _(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


@torch.library.custom_op("hasten::merge_backward", mutates_args=())
def _merge_backward(
    dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> list[Tensor]:
    from hasten.ops.portable import merge as kernels

    with torch.cuda.device_of(out):
        douts, dlses = kernels.backward(dout, dlse, out, lse, outs, lses)
    return [*douts, *dlses]


@_merge_backward.register_fake
def _(dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, outs: Any, lses: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (*outs, *lses)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[0], *inputs[1])
    ctx.num_parts = len(inputs[0])


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    out, lse, *parts = ctx.saved_tensors
    grads = _merge_backward(dout, dlse, out, lse, parts[: ctx.num_parts], parts[ctx.num_parts :])
    return grads[: ctx.num_parts], grads[ctx.num_parts :]


_merge.register_autograd(_backward, setup_context=_setup)
