"""Longformer as Hugging Face transformers computes it, without its projections: the core of its attention alone.

The module itself is called; what gives it queries, keys and values is replaced by the tensors of the problem.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hasten.bench.problems import Problem


def refuses(problem: Problem, device: torch.device) -> str | None:
    """Why the module cannot do a problem, or None."""
    pattern = problem.pattern
    if not pattern.num_global:
        return "does Longformer alone"
    if problem.num_kv_heads != problem.num_heads:
        return "has no grouped heads"
    if not pattern.left or problem.seqlen % (2 * pattern.left):
        return "wants a multiple of two windows"
    return None


def longformer_function(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """A function that gives out; q, k, v are (batch, seqlen, heads, head_dim)."""
    from transformers import LongformerConfig  # seconds to import, and only this peer needs it
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    window, num_global = problem.pattern.left, problem.pattern.num_global
    assert window is not None
    config = LongformerConfig(
        attention_window=[2 * window],
        hidden_size=problem.num_heads * problem.head_dim,
        num_attention_heads=problem.num_heads,
        num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )
    module: Any = LongformerSelfAttention(config, layer_id=0).eval()
    projections = {"query": q, "query_global": q[:, :num_global], "key": k, "value": v}
    projections |= {"key_global": k, "value_global": v}
    for name, tensor in projections.items():
        setattr(module, name, _Given(tensor))
    hidden = q.detach().flatten(2)
    is_global = (torch.arange(problem.seqlen, device=q.device) < num_global).expand(problem.batch, -1)
    words = {
        "attention_mask": is_global.float() * 1e4,
        "is_index_masked": torch.zeros_like(is_global),
        "is_index_global_attn": is_global,
        "is_global_attn": True,
    }

    def run() -> Tensor:
        out = module(hidden, **words)[0].unflatten(-1, (problem.num_heads, problem.head_dim))
        assert isinstance(out, Tensor)
        return out

    return run


class _Given(torch.nn.Module):
    """In the place of a projection: gives a tensor, (seqlen, batch, width), copied where it is scaled in place."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.tensor.flatten(2).transpose(0, 1).clone()
