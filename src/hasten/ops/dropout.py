"""The dropout mask as a pure function of (seed, batch, head, query, key), the same on every device.

Philox4x32-10 (Salmon et al., SC 2011) with the cell as its counter, so forward, backward, every
implementation and every tile size drop the same cells. This is the PyTorch statement of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)


def threshold(dropout_p: float) -> int:
    """A cell is kept if its 32-bit word is at least this: P(dropped) = dropout_p to within 2^-32."""
    return min(int(dropout_p * 2**32), _WORD)


def keep_cells(seed: Tensor, dropout_p: float, sequence_head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """bool: True where the cell survives.

    `seed` int64 (1,); `sequence_head` = sequence * num_heads + head, `query`, `key`: int64, broadcastable,
    counted inside the sequence.
    """
    c0, c1, c2 = torch.broadcast_tensors(key, query, sequence_head)
    c0, c1, c2, c3 = c0 & _WORD, c1 & _WORD, c2 & _WORD, torch.zeros_like(c0)
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c2, c1, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ key0,
            ((product0 >> 32) & _WORD) ^ c3 ^ key1,
            product1 & _WORD,
            product0 & _WORD,
        )
        key0, key1 = (key0 + _KEY_STEP[0]) & _WORD, (key1 + _KEY_STEP[1]) & _WORD
    return c0 >= threshold(dropout_p)
