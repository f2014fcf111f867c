"""Cross-entropy of a language model without float32 logits of the whole batch, exact, with gradients.

Both functions return the *sum* over the labels, float32: the caller divides by the number of labels of the whole step,
which is not that of one micro-batch. Labels are int64; -100 (`IGNORED`) counts nothing. Called by `train.model`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
# Logits that exist at one time, by device. On a GPU large enough that the matrix products stay full (5,300 tokens of
# GPT-2's 50,257), on a CPU about what its caches hold.
_ELEMENTS = {"cuda": 2**28, "cpu": 2**22}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T + bias` at `labels`; the logits never exist as a whole.

    hidden (..., hidden_size), weight (vocab_size, hidden_size), bias (vocab_size,), labels (...) of int64. softcap c:
    logits are c·tanh(logits / c). Products are computed in hidden's dtype (under autocast, in its dtype); softmax,
    sums and the gradient of the weight over chunks are float32. chunk_tokens: rows of logits at a time.

    Where gradients are wanted they are computed beside the loss, chunk by chunk while the logits are there, so
    the backward only scales them: three products in all, as without chunks, where to recompute logits would take four.
    """
    place = hidden.device.type
    if torch.is_autocast_enabled(place):
        hidden = hidden.to(torch.get_autocast_dtype(place))
    flat = hidden.flatten(0, -2)
    chunk = chunk_tokens or max(128, _elements(place) // weight.shape[0])
    with_grad = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(flat, weight, bias, labels.flatten(), softcap, chunk, with_grad)  # type: ignore[no-untyped-call]


def cross_entropy(logits: Tensor, labels: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Sum of the cross-entropies of logits (..., vocab_size) at labels (...); float32 only chunk by chunk.

    For models whose logits are more than a product with the output weights. The gradient has the dtype of logits.
    """
    flat = logits.flatten(0, -2)
    chunk = chunk_tokens or max(128, _elements(logits.device.type) // logits.shape[-1])
    return _CrossEntropy.apply(flat, labels.flatten(), chunk)  # type: ignore[no-untyped-call]


def _elements(device_type: str) -> int:
    return _ELEMENTS.get(device_type, _ELEMENTS["cuda"])


def _statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(lse, sum of the losses) of logits (tokens, vocab_size), float32."""
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return lse, torch.where(labels >= 0, lse - picked, 0.0).sum()


def _slopes(logits: Tensor, lse: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the sum of the losses by the logits: softmax less one at the label; 0 where ignored."""
    slopes = torch.exp(logits - lse[:, None])
    slopes.scatter_add_(1, labels.clamp(min=0)[:, None], torch.full_like(lse, -1.0)[:, None])
    return slopes.mul_((labels >= 0)[:, None])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        chunk: int,
        with_grad: bool,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = (with_grad and want for want in ctx.needs_input_grad[:3])
        used = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        for begin in range(0, hidden.shape[0], chunk):
            rows, targets = hidden[begin : begin + chunk], labels[begin : begin + chunk]
            logits = F.linear(rows, used, None if bias is None else bias.to(rows.dtype)).float()
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            lse, loss = _statistics(logits, targets)
            total += loss
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            slopes = _slopes(logits, lse, targets)
            if softcap is not None:
                slopes *= 1 - (logits / softcap) ** 2
            low = slopes.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[begin : begin + chunk] = low @ used
            if grad_weight is not None:
                grad_weight += low.T @ rows
            if grad_bias is not None:
                grad_bias += slopes.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad).to(bias_dtype),
            *(None,) * 4,
        )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, chunk: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        found = []
        for begin in range(0, logits.shape[0], chunk):
            lse, loss = _statistics(logits[begin : begin + chunk].float(), labels[begin : begin + chunk])
            found.append(lse)
            total += loss
        lse = torch.cat(found) if found else torch.zeros(0, device=logits.device)
        ctx.save_for_backward(logits, labels, lse)
        ctx.chunk = chunk
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        made = torch.empty_like(logits)
        for begin in range(0, logits.shape[0], ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            made[part] = _slopes(logits[part].float(), lse[part], labels[part]) * grad
        return made, None, None
