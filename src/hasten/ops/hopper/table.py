"""Tile shapes of the Hopper kernels (sm_90): a table by phase, head_dim and kind of mask, and what was measured.

TFLOP/s on an H100 (SXM, bf16): 16k tokens by 2048 at 1k, 4k, 16k full, or causal; a window of 512 at 64k; as lists,
Longformer (256 each side and 64 global) at 16k and blocks at 10 % density. Taken by
scripts with the timers of the bench, but for the backward, whose record docs/log.md names. To take them again:
`python -m hasten.bench.hopper_tiles`, which has not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

#: causal: unlimited to the left; window: a band that ends there; list: any mask that is no band
Kind = Literal["full", "causal", "window", "list"]


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


class BackwardTile(NamedTuple):
    """Tile of the main kernel; blocks of rows loaded ahead; whether dV is multiplied before dP is waited for."""

    block_m: int
    block_n: int
    ahead: int
    order: int


D64, D128, D256 = Tile(2, 128, 3, 2), Tile(2, 128, 2, 2), Tile(2, 64, 2, 1, 232, 40)
#: 192 rows: better where few tiles are partial and the last one of a sequence is not mostly empty
D64_TALL = Tile(3, 128, 3, 2, 160, 32)

# (padded head_dim, the larger of q's and v's; kind) -> (from which seqlen_q on, tile), ascending
FORWARD: dict[tuple[int, Kind], tuple[tuple[int, Tile], ...]] = {
    # 450 488 507, tall 425 519 571; four stages of K and V 446 493 514, tall 422 518 576; cuDNN 439 487 500
    (64, "full"): ((0, D64), (2048, D64_TALL)),
    # 358 460 496, tall 236 455 553 (8k: 479, 523); cuDNN 343 438 480
    (64, "causal"): ((0, D64), (8192, D64_TALL)),
    # 303, tall 234, 64 keys 276
    (64, "window"): ((0, D64),),
    # 122 462, tall 90 150, 64 keys 118 389
    (64, "list"): ((0, D64),),
    # 617 670 731; cuDNN 608 668 684
    (128, "full"): ((0, D128),),
    # 460 652 725; 64 keys 433 575 -; cuDNN 435 571 633
    (128, "causal"): ((0, D128),),
    (128, "window"): ((0, D128),),
    (128, "list"): ((0, D128),),  # blocks 614
    # 605 720 790; cuDNN 619 717 745
    (256, "full"): ((0, D256),),
    # 442 642 728; cuDNN 454 595 647
    (256, "causal"): ((0, D256),),
    (256, "window"): ((0, D256),),
    (256, "list"): ((0, D256),),
}

# (padded head_dim, is anything masked, is there a soft cap) -> tile
BACKWARD: dict[tuple[int, bool, bool], BackwardTile] = {
    (64, False, False): BackwardTile(128, 128, 2, 0),  # 402 501 508; cuDNN 351 453 484
    (64, True, False): BackwardTile(128, 128, 2, 0),  # 287 452 519; cuDNN 236 377 452
    (64, False, True): BackwardTile(64, 128, 2, 1),  # tanh needs the registers of half the tile
    (64, True, True): BackwardTile(64, 128, 2, 1),
    (128, False, False): BackwardTile(64, 128, 2, 0),  # 413 584 636; cuDNN 417 549 593
    (128, True, False): BackwardTile(64, 128, 2, 1),  # 326 520 616; cuDNN 287 465 575
    (128, False, True): BackwardTile(64, 128, 2, 0),
    (128, True, True): BackwardTile(64, 128, 2, 1),
    (256, False, False): BackwardTile(64, 64, 1, 0),  # 330 405 423; cuDNN 290 387 366
    (256, True, False): BackwardTile(64, 64, 1, 0),  # 259 381 399; cuDNN 237 361 411
    (256, False, True): BackwardTile(64, 64, 1, 0),
    (256, True, True): BackwardTile(64, 64, 1, 0),
}


def kind_of(band: tuple[int | None, int | None] | None) -> Kind:
    """The kind of a mask from the (left, right) of its band, None if it is no band."""
    if band is None:
        return "list"
    left, right = band
    return "window" if left is not None else "full" if right is None else "causal"


def forward_tile(block_d: int, kind: Kind, seqlen_q: int) -> Tile:
    """The line for a padded head_dim."""
    return [tile for first, tile in FORWARD[block_d, kind] if seqlen_q >= first][-1]


def backward_tile(block_d: int, is_masked: bool, has_softcap: bool) -> BackwardTile:
    """The line for a padded head_dim; `is_masked`: any tile may have hidden cells."""
    return BACKWARD[block_d, is_masked, has_softcap]
