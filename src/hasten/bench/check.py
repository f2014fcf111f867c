"""Is a peer right? Its out and gradients against attention by definition in a wider dtype, before it is timed.

One batch entry and one K/V head with all its query heads are computed, in runs of rows, so that a length of
16384 needs no 16384 x 16384 matrix. Independent of every implementation, `reference.py` included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hasten.bench.problems import Problem
from hasten.masks import Cells

#: Largest relative error, norm against norm, of a right answer: right ones stay under half of it, a wrong mask or
#: an unwritten row is far above. TF32 products of float32 inputs pass.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}
_SCORES_AT_ONCE = 1 << 25


class Expected(NamedTuple):
    """out and gradients of the last batch entry and K/V head: (seqlen, group_size or 1, head_dim) each."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def expected(problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Expected:
    """Attention and its gradients by definition, in float32 (float64 for float32 inputs)."""
    wide = torch.float64 if q.dtype == torch.float32 else torch.float32
    heads = our_part(problem, q)
    q, dout = heads.to(wide), our_part(problem, dout).to(wide)
    k, v = our_part(problem, k)[:, 0].to(wide), our_part(problem, v)[:, 0].to(wide)
    out, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scale = problem.head_dim**-0.5
    for rows in torch.arange(problem.seqlen, device=q.device).split(max(1, _SCORES_AT_ONCE // problem.seqlen)):
        keep = visible(problem, rows)
        for head in range(q.shape[1]):
            scores = (q[rows, head] @ k.T * scale).masked_fill(~keep, -torch.inf)
            probs = torch.softmax(scores, dim=-1)
            out[rows, head] = probs @ v
            dprobs = dout[rows, head] @ v.T
            delta = (dout[rows, head] * out[rows, head]).sum(-1, keepdim=True)
            dscores = probs * (dprobs - delta) * scale
            dq[rows, head] = dscores @ k
            dk += dscores.T @ q[rows, head]
            dv += probs.T @ dout[rows, head]
    return Expected(out, dq, dk[:, None], dv[:, None])


def our_part(problem: Problem, tensor: Tensor) -> Tensor:
    """The last batch entry and K/V head of a tensor (batch, seqlen, heads, head_dim), without the batch axis."""
    heads = tensor.shape[2] // problem.num_kv_heads
    return tensor[-1, :, tensor.shape[2] - heads :]


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; infinite where anything is not finite."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got.detach().to(want.dtype) - want).norm() / want.norm())


def visible(problem: Problem, rows: Tensor) -> Tensor:
    """bool (rows, seqlen): the mask's own definition."""
    none = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=rows.device)
    keys = torch.arange(problem.seqlen, device=rows.device)
    cells = Cells(none, none, rows[None, None, :, None], keys[None, None, None], problem.seqlen, problem.seqlen)
    return problem.mask(rows.device).visible(cells).expand(1, 1, len(rows), problem.seqlen)[0, 0]
