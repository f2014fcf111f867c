"""Tile shapes of the Hopper forward: a table by head_dim, each line with what was measured beside it.

TFLOP/s on an H100 (SXM, bf16, 16k tokens by 2048) at 1k, 4k, 16k causal, then full; cuDNN in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Consumers of 64 rows each, BLOCK_N keys, stages of the K and V rings, stages of Q.

    Registers of a consumer's and of the producer's threads: 65,536 for all warpgroups of a CTA together.
    """

    consumers: int
    block_n: int
    stages: int
    q_stages: int
    consumer_registers: int = 224
    producer_registers: int = 56

    @property
    def block_m(self) -> int:
        """Rows of an item."""
        return 64 * self.consumers


# padded head_dim (the larger of q's and v's) -> tile
FORWARD: dict[int, Tile] = {
    # 329 433 457 408 442 458; cuDNN 346 443 471 447 474 504; (3, 64, 4, 2, 160, 32) 253 405 456 360 413 453
    64: Tile(2, 128, 3, 2),
    # 454 632 685 601 681 697; cuDNN 443 581 632 618 676 678
    128: Tile(2, 128, 2, 2),
    # 438 645 701 603 727 761; cuDNN 460 604 657 627 730 755
    256: Tile(2, 64, 2, 1, 232, 40),
}
# 192 rows: better where few tiles are partial and the last one of a sequence is not mostly empty
FORWARD_LONG = {64: Tile(3, 128, 3, 2, 160, 32)}  # 213 426 517 411 472 529
_LONG_FULL, _LONG_MASKED = 2048, 8192


def forward_tile(block_d: int, seqlen_q: int, sees_all: bool) -> Tile:
    """The line for a padded head_dim; `sees_all`: the mask is Full."""
    long = FORWARD_LONG.get(block_d)
    is_long = seqlen_q >= (_LONG_FULL if sees_all else _LONG_MASKED)
    return long if long is not None and is_long else FORWARD[block_d]
