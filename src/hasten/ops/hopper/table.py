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
    # 358 460 496 450 488 507; cuDNN 343 438 480 439 487 500; four stages of K and V: +-1 %
    64: Tile(2, 128, 3, 2),
    # 460 652 725 617 670 731; cuDNN 435 571 633 608 668 684; keys by 64, four stages: 433 575 - - - 623
    128: Tile(2, 128, 2, 2),
    # 442 642 728 605 720 790; cuDNN 454 595 647 619 717 745
    256: Tile(2, 64, 2, 1, 232, 40),
}
# 192 rows: better where few tiles are partial and the last one of a sequence is not mostly empty.
# 236 455 553 425 519 571; a window of 512 at 64k 234 instead of 302, Longformer at 4k, 16k, 64k 93 90 87 instead of
# 138 122 115, blocks at 25 % density 174 instead of 500
FORWARD_LONG = {64: Tile(3, 128, 3, 2, 160, 32)}
_LONG_FROM: dict[str, int] = {"full": 2048, "causal": 8192}


def forward_tile(block_d: int, seqlen_q: int, kind: str) -> Tile:
    """The line for a padded head_dim and a kind of mask: full, causal, window or list."""
    long, first = FORWARD_LONG.get(block_d), _LONG_FROM.get(kind)
    return FORWARD[block_d] if long is None or first is None or seqlen_q < first else long
