"""What a training step costs by the two conventions in use, and what share of a GPU that is.

`exact` counts what must be computed: 6 FLOPs a token for each weight that is multiplied, and the visible cells of
causal attention. `palm` counts attention as if it were not causal (PaLM, nanoGPT, the FlashAttention-2 paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hasten.masks import Causal, Full, Mask
from hasten.ops import cost


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step, forward and backward; what is computed again is not counted."""

    exact: int
    palm: int


def step_flops(model: Any, batch: int, seqlen: int, *, is_causal: bool = True) -> StepFlops:
    """FLOPs of a step of `batch` rows of one document each.

    The table of input embeddings is looked up, not multiplied; the output one counts, also where it is the same table.
    The backward counts as twice the forward. Without causality (encoders) both conventions agree.
    """
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def attention(mask: Mask) -> int:
        pairs = cost.visible_pairs(mask, batch, config.num_attention_heads, seqlen, seqlen)
        return 3 * cost.forward_flops(pairs, head_dim, head_dim) * config.num_hidden_layers

    matrices = 6 * multiplied_weights(model) * batch * seqlen
    whole = matrices + attention(Full())
    return StepFlops(exact=matrices + attention(Causal()) if is_causal else whole, palm=whole)


def multiplied_weights(model: Any) -> int:
    """Weights that are multiplied with every token: all but tables that are only looked up."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = sum(weight.numel() for weight in model.parameters() if id(weight) not in tables)
    output = model.get_output_embeddings().weight
    return int(weights + (output.numel() if id(output) in tables else 0))
