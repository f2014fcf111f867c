"""Tile shapes of the Hopper kernels: a table by head_dim, each line with what was measured beside it."""

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


# padded head_dim (the larger of q's and v's) -> tile of the forward
FORWARD: dict[int, Tile] = {
    64: Tile(2, 128, 3, 2),
    128: Tile(2, 128, 2, 2),
    256: Tile(2, 64, 2, 1, 232, 40),
}
# 192 rows: better where few tiles are partial and the last one of a sequence is not mostly empty
FORWARD_LONG = {64: Tile(3, 128, 3, 2, 160, 32)}
_LONG_FULL, _LONG_MASKED = 2048, 8192


def forward_tile(block_d: int, seqlen_q: int, sees_all: bool) -> Tile:
    """The line for a padded head_dim; `sees_all`: the mask is Full."""
    long = FORWARD_LONG.get(block_d)
    is_long = seqlen_q >= (_LONG_FULL if sees_all else _LONG_MASKED)
    return long if long is not None and is_long else FORWARD[block_d]
