"""ALiBi as a value: a bias that is a slope times the distance, never a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ALiBi:
    """Attention with linear biases (Press et al., arXiv 2108.12409): score -= slope * |position - key|.

    `slopes`: (num_heads,) or (batch, num_heads), any float dtype; may require gradients.
    Pass it as `bias` to `hasten.attention`.
    """

    slopes: Tensor

    @classmethod
    def for_heads(cls, num_heads: int, device: torch.device | str | None = None) -> ALiBi:
        """The paper's slopes (num_heads,) float32: a geometric sequence that ends at 2^-8 for powers of two.

        For other numbers of heads, those of the next lower power and every other one of the next higher.
        """
        power = 2 ** math.floor(math.log2(num_heads))
        slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
        slopes += [2 ** (-4 * (head + 1) / power) for head in range(0, 2 * (num_heads - power), 2)]
        return cls(torch.tensor(slopes, dtype=torch.float32, device=device))
