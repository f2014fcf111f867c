"""What an attention costs: FLOPs, bytes to and from device memory, and the least time a machine needs for them.

Plain integers and pure functions; called by `explain`, the benchmarks and the notes. Knows no implementation: the
counts are of the problem (and of the two algorithms the papers compare), not of what any kernel happens to do.
The model of memory is that of FlashAttention (arXiv 2205.14135, section 3.2): a small fast memory, a large slow
one, and only traffic to the slow one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.masks import BlockSparse, Mask, Window
from hasten.ops.tiles import as_band, build_tile_lists

_STATISTIC_BYTES = 4  # lse, delta and the running maximum and sum are float32
_TILE = 128


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of one attention. Packed sequences are one batch entry with all their tokens."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    element_bytes: int = 2

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Sizes:
        """Read them off q (batch, seqlen_q, num_heads, head_dim), k and v; or packed, (total, heads, head_dim)."""
        return cls(
            batch=q.shape[0] if q.ndim == 4 else 1,
            seqlen_q=q.shape[-3],
            seqlen_k=k.shape[-3],
            num_heads=q.shape[-2],
            num_kv_heads=k.shape[-2],
            head_dim=q.shape[-1],
            head_dim_v=v.shape[-1],
            element_bytes=q.element_size(),
        )

    @property
    def q_bytes(self) -> int:
        """Bytes of q, and of dq."""
        return self.batch * self.seqlen_q * self.num_heads * self.head_dim * self.element_bytes

    @property
    def k_bytes(self) -> int:
        """Bytes of k, and of dk."""
        return self.batch * self.seqlen_k * self.num_kv_heads * self.head_dim * self.element_bytes

    @property
    def v_bytes(self) -> int:
        """Bytes of v, and of dv."""
        return self.batch * self.seqlen_k * self.num_kv_heads * self.head_dim_v * self.element_bytes

    @property
    def out_bytes(self) -> int:
        """Bytes of out, and of dout."""
        return self.batch * self.seqlen_q * self.num_heads * self.head_dim_v * self.element_bytes

    @property
    def lse_bytes(self) -> int:
        """Bytes of lse, or of any other float32 number per query row and head."""
        return self.batch * self.seqlen_q * self.num_heads * _STATISTIC_BYTES

    @property
    def score_bytes(self) -> int:
        """Bytes of the whole score matrix, as standard attention keeps it."""
        return self.batch * self.num_heads * self.seqlen_q * self.seqlen_k * self.element_bytes


@dataclass(frozen=True)
class Rates:
    """What a machine can do at best: matrix FLOPs and bytes of device memory per second."""

    flops_per_s: float
    bytes_per_s: float


#: Dense 16-bit matrix rate and memory bandwidth by the makers' datasheets: never reached (an H200 gave 0.77e15 in a
#: bf16 product of 8192^3 and 4.3e12 in a copy), but the same for everyone. Keys are parts of the device's name;
#: the first that fits counts, so the more exact name comes first.
DATASHEET = {
    "H200": Rates(989e12, 4.8e12),
    "H100 PCIe": Rates(756e12, 2.0e12),
    "H100": Rates(989e12, 3.35e12),
    "B200": Rates(2250e12, 8.0e12),
    "A100-SXM4-80GB": Rates(312e12, 2.04e12),
    "A100": Rates(312e12, 1.56e12),
    "L40S": Rates(362e12, 0.864e12),
    "RTX 4090": Rates(165e12, 1.01e12),
}


def datasheet_rates(device_name: str) -> Rates | None:
    """The rates of a device by its name, as `torch.cuda.get_device_name` gives it; None for one not listed."""
    return next((rates for part, rates in DATASHEET.items() if part in device_name), None)


def visible_pairs(mask: Mask, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> int:
    """Visible cells (query, key) over all batch entries and query heads, exactly.

    By arithmetic for full, causal, window and block-sparse masks; for others the visible tiles of 128 x 128 are
    counted whole and the partial ones bit by bit, on the device of the mask's tensors.
    """
    mask.check(batch, num_heads, seqlen_q, seqlen_k)
    if seqlen_q == 0 or seqlen_k == 0:
        return 0
    band = as_band(mask)
    if band is not None and band.padding is None:
        return batch * num_heads * _band_pairs(band.left, band.right, seqlen_q, seqlen_k)
    if isinstance(mask, Window) and isinstance(mask.dilation, int):
        return batch * num_heads * _dilated_pairs(mask, mask.dilation, seqlen_q, seqlen_k)
    if isinstance(mask, BlockSparse):
        return _block_pairs(mask, batch, num_heads, seqlen_q, seqlen_k)
    return _tiled_pairs(mask, batch, num_heads, seqlen_q, seqlen_k)


def packed_pairs(mask: Mask, cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int], num_heads: int) -> int:
    """Visible cells of packed sequences, over all sequences and query heads; the mask applies inside each."""
    lengths = [
        (cu_seqlens_q[number + 1] - cu_seqlens_q[number], cu_seqlens_k[number + 1] - cu_seqlens_k[number])
        for number in range(len(cu_seqlens_q) - 1)
    ]
    pairs = {length: visible_pairs(mask, 1, num_heads, *length) for length in set(lengths)}
    return sum(pairs[length] for length in lengths)


def forward_flops(pairs: int, head_dim: int, head_dim_v: int) -> int:
    """Two products of two FLOPs a multiply-add: scores, and their values. Softmax is not counted, as in the papers."""
    return 2 * pairs * (head_dim + head_dim_v)


def backward_flops(pairs: int, head_dim: int, head_dim_v: int) -> int:
    """2.5 times the forward: five products, because the scores are computed again."""
    return 5 * pairs * (head_dim + head_dim_v)


def hbm_bytes(sizes: Sizes, *, is_backward: bool = False) -> int:
    """The fewest bytes exact attention can move: each input read once, each output written once.

    Forward: q, k, v in, out and lse out. Backward: q, k, v, out, dout and lse in, dq, dk and dv out.
    """
    inputs = sizes.q_bytes + sizes.k_bytes + sizes.v_bytes
    if is_backward:
        return 2 * inputs + 2 * sizes.out_bytes + sizes.lse_bytes
    return inputs + sizes.out_bytes + sizes.lse_bytes


def standard_bytes(sizes: Sizes, *, is_backward: bool = False, elementwise_ops: int = 0) -> int:
    """Bytes of attention that keeps the score matrix in device memory: Theta(N d + N^2).

    arXiv 2205.14135, algorithm 0 (forward: scores written and read, probabilities written and read) and
    algorithm 3 (backward: seven passes over such a matrix). `elementwise_ops`: kernels of their own between the
    products (a mask, dropout); each reads and writes the matrix once more. Query heads of a group read their K/V
    head once each, as a copy of K/V for every head does.
    """
    k_bytes = sizes.batch * sizes.seqlen_k * sizes.num_heads * sizes.head_dim * sizes.element_bytes
    v_bytes = sizes.batch * sizes.seqlen_k * sizes.num_heads * sizes.head_dim_v * sizes.element_bytes
    if is_backward:
        passes = 7 + 2 * elementwise_ops
        return passes * sizes.score_bytes + 2 * (sizes.q_bytes + sizes.out_bytes) + 2 * (k_bytes + v_bytes)
    passes = 4 + 2 * elementwise_ops
    return passes * sizes.score_bytes + sizes.q_bytes + k_bytes + v_bytes + sizes.out_bytes


def tiled_bytes(sizes: Sizes, sram_elements: int, *, is_backward: bool = False, density: float = 1.0) -> int:
    """Bytes of FlashAttention as first published: Theta(N^2 d^2 / M) for a fast memory of M elements.

    arXiv 2205.14135, algorithms 1 and 4 (theorem 2 and, with `density` < 1 as the share of blocks that are not
    zero, proposition 4): blocks of M / 4d keys are loaded once, and for each of them the queries pass by: q and
    the running out with its two statistics (forward), or q, out, dout, dq and three statistics (backward).
    """
    block_k = max(1, sram_elements // (4 * max(sizes.head_dim, sizes.head_dim_v)))
    visits = -(-sizes.seqlen_k // block_k) * density
    if is_backward:
        once = 2 * (sizes.k_bytes + sizes.v_bytes)
        per_visit = 3 * sizes.q_bytes + 2 * sizes.out_bytes + 3 * sizes.lse_bytes
    else:
        once = sizes.k_bytes + sizes.v_bytes
        per_visit = sizes.q_bytes + 2 * sizes.out_bytes + 4 * sizes.lse_bytes
    return once + int(visits * per_visit)


def roofline_s(flops: int, num_bytes: int, rates: Rates) -> float:
    """Seconds below which no implementation gets: the larger of the time of the products and of the bytes."""
    return max(flops / rates.flops_per_s, num_bytes / rates.bytes_per_s)


def _band_pairs(left: int | None, right: int | None, seqlen_q: int, seqlen_k: int) -> int:
    unlimited = seqlen_q + seqlen_k
    upper = unlimited if right is None else right
    lower = unlimited if left is None else left
    return _pairs_up_to(upper, seqlen_q, seqlen_k) - _pairs_up_to(-lower - 1, seqlen_q, seqlen_k)


def _pairs_up_to(distance: int, seqlen_q: int, seqlen_k: int) -> int:
    """Cells with key - position <= distance: row by row, min(max(position + distance + 1, 0), seqlen_k)."""

    def rows_up_to(count: int) -> int:
        """Sum of min(max(x, 0), seqlen_k) over all x <= count."""
        rising = max(0, min(count, seqlen_k))
        return rising * (rising + 1) // 2 + max(0, count - seqlen_k) * seqlen_k

    last = seqlen_k + distance
    return rows_up_to(last) - rows_up_to(last - seqlen_q)


def _dilated_pairs(mask: Window, step: int, seqlen_q: int, seqlen_k: int) -> int:
    """Diagonal by diagonal: key - position = step * t for t from -left to right, inside the matrix."""
    left = (seqlen_k - 1) // step if mask.left is None else min(mask.left, (seqlen_k - 1) // step)
    furthest = (seqlen_q - 1) // step  # the first query stands seqlen_q - 1 before the last key
    right = furthest if mask.right is None else min(mask.right, furthest)
    pairs = 0
    for distance in range(-left * step, right * step + 1, step):
        first = max(0, seqlen_k - seqlen_q + distance)
        pairs += max(0, min(seqlen_k, seqlen_k + distance) - first)
    return pairs


def _block_pairs(mask: BlockSparse, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> int:
    layout = mask.layout.cpu()
    layout = layout.reshape((1,) * (4 - layout.ndim) + tuple(layout.shape)).to(torch.int64)
    tables_batch, tables_heads, rows, cols = layout.shape
    heights = torch.full((rows,), mask.block_size)
    heights[-1] = seqlen_q - (rows - 1) * mask.block_size
    widths = torch.full((cols,), mask.block_size)
    widths[-1] = seqlen_k - (cols - 1) * mask.block_size
    pairs = int((layout * heights[:, None] * widths).sum())
    return pairs * (batch // tables_batch) * (num_heads // tables_heads)


def _tiled_pairs(mask: Mask, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> int:
    tables_batch, tables_heads = batch if mask.varies_by_batch else 1, num_heads if mask.varies_by_head else 1
    _, tensors = mask.parts()
    device = tensors[0].device if tensors else torch.device("cpu")
    lists = build_tile_lists(mask, tables_batch, tables_heads, seqlen_q, seqlen_k, _TILE, _TILE, device)
    octets = lists.bits.contiguous().view(torch.uint8).long()
    ones = torch.tensor([value.bit_count() for value in range(256)], device=device)[octets].sum((1, 2))
    num_full = int((lists.row_ptr[:, 1] - lists.row_ptr[:, 0]).sum())
    in_partial = int(ones[lists.row_bits.long()].sum()) - num_full * int(ones[0])  # full entries name map 0
    pairs = num_full * _TILE * _TILE + in_partial
    return pairs * (batch // tables_batch) * (num_heads // tables_heads)
