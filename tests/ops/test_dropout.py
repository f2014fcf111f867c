"""The cells that dropout takes: known answers of Philox, the share, and the same cells wherever they are computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hasten
from hasten.masks import Causal, Documents, Window
from hasten.ops import dropout

IMPLEMENTATIONS = ["reference", "blockwise"]
plain = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers, from the paper's figure (Salmon et al., SC 2011, section 3.3)."""
    word = 0xFFFFFFFF
    for number in range(10):
        own = [(k + number * step) & word for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (second >> 32 ^ counter[1] ^ own[0], second & word, first >> 32 ^ counter[3] ^ own[1], first & word)
    return counter


def test_philox_gives_the_known_answers() -> None:
    """kat_vectors of Random123, philox4x32 10."""
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def keep(seed: int, dropout_p: float, sequence_head: int, query: int, key: int) -> bool:
    cell = (torch.tensor(number) for number in (sequence_head, query, key))
    return bool(dropout.keep_cells(torch.tensor([seed]), dropout_p, *cell))


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 17, 2**62 - 1])
def test_a_cell_is_kept_if_its_first_word_is_high_enough(seed: int) -> None:
    """The counter is (key, query, sequence * heads + head, 0), the key of the cipher the two halves of the seed."""
    for sequence_head, query, key in [(0, 0, 0), (3, 17, 200), (2**31, 5, 7), (9, 2**31 + 3, 2**32 - 1)]:
        own = philox((key, query, sequence_head, 0), (seed & 0xFFFFFFFF, seed >> 32))[0]
        share = own / 2**32
        assert keep(seed, share * 0.999, sequence_head, query, key)
        assert not keep(seed, min(share * 1.001, 0.9999999), sequence_head, query, key)


@pytest.mark.parametrize("dropout_p", [1e-9, 0.1, 0.5, 0.999999])
def test_the_threshold_is_the_share_of_all_words(dropout_p: float) -> None:
    assert dropout.threshold(dropout_p) == pytest.approx(dropout_p * 2**32, abs=1)
    assert dropout.threshold(1 - 2**-40) < 2**32


def kept_cells(
    dropout_p: float, implementation: str, seqlen: int = 256, heads: int = 4, batch: int = 2, **options: object
) -> Tensor:
    """bool (batch, queries, heads, keys), read off equal probabilities over the rows of an identity."""
    q = torch.zeros(batch, seqlen, heads, 4)
    v = torch.eye(seqlen)[None, :, None].expand(batch, seqlen, 1, seqlen)
    return hasten.attention(q, q[:, :, :1], v, dropout_p=dropout_p, implementation=implementation, **options) > 0


@plain
@pytest.mark.parametrize("dropout_p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_goes_is_within_a_hundredth(dropout_p: float, implementation: str) -> None:
    kept = kept_cells(dropout_p, implementation).float()
    assert abs(1 - kept.mean() - dropout_p) < 0.01
    for dim in range(4):  # in every batch entry, head, query and key: no axis is left out of the counter
        shares = 1 - kept.movedim(dim, 0).flatten(1).mean(1)
        spread = (dropout_p * (1 - dropout_p) / (kept.numel() / kept.shape[dim])) ** 0.5
        assert (shares - dropout_p).abs().max() < 5 * spread


def test_every_axis_draws_its_own_cells() -> None:
    kept = kept_cells(0.5, "reference")
    for dim in range(4):
        rows = kept.movedim(dim, 0).flatten(1)
        assert 0.4 < (rows[0] == rows[1]).float().mean() < 0.6


def test_every_call_draws_other_cells_and_the_same_seed_the_same() -> None:
    first, second = kept_cells(0.5, "reference"), kept_cells(0.5, "reference")
    assert 0.4 < (first == second).float().mean() < 0.6
    torch.manual_seed(0)
    again = kept_cells(0.5, "reference")
    torch.manual_seed(0)
    assert torch.equal(again, kept_cells(0.5, "blockwise")), "implementations drop the same cells"


def test_no_dropout_draws_no_number() -> None:
    q = torch.randn(1, 5, 1, 4)
    before = torch.get_rng_state()
    hasten.attention(q, q, q, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), before)


@plain
def test_forward_and_backward_drop_the_same_cells(implementation: str) -> None:
    """With equal scores, dv of a cell is its probability: dv = kept.T @ dout exactly where out = kept @ v."""
    seqlen = 100
    q = torch.zeros(1, seqlen, 2, 4)
    v = torch.eye(seqlen)[None, :, None].repeat(1, 1, 2, 1).requires_grad_()
    out = hasten.attention(q, q, v, dropout_p=0.3, implementation=implementation)
    dout = torch.eye(seqlen)[None, :, None].expand_as(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close(dv, out.transpose(1, 3))
    assert torch.equal(dv > 0, out.transpose(1, 3) > 0)


@plain
def test_kept_probabilities_are_raised_so_that_the_mean_stays(implementation: str) -> None:
    q, k, v = (torch.randn(1, 16, 1, 8) for _ in range(3))
    want = hasten.attention(q, k, v)
    many = torch.stack([hasten.attention(q, k, v, dropout_p=0.25, implementation=implementation) for _ in range(600)])
    spread = many.std(0) / 600**0.5
    assert ((many.mean(0) - want).abs() < 6 * spread).all()


@pytest.mark.parametrize(
    "mask",
    [Causal(), Window(6, 6, dilation=3), Documents(torch.tensor([0, 50, 100]))],
    ids=["causal", "dilated", "documents"],
)
def test_masks_hide_cells_and_move_none(mask: hasten.masks.Mask) -> None:
    """The cells of a mask are dropped as they are without it: a cheaper equal call may not renumber them."""
    everything = _seeded(None)
    torch.testing.assert_close(_seeded(mask), everything & mask.keep(100)[0, 0][None, :, None])


def _seeded(mask: hasten.masks.Mask | None) -> Tensor:
    torch.manual_seed(5)
    return kept_cells(0.4, "blockwise", seqlen=100, mask=mask)


def test_packed_sequences_count_their_own_queries_and_keys() -> None:
    """Sequence number n of a packed call drops the cells of batch entry n."""
    lengths = [40, 60]
    bounds = torch.tensor([0, 40, 100], dtype=torch.int32)
    torch.manual_seed(3)
    dense = kept_cells(0.4, "reference", seqlen=60)
    torch.manual_seed(3)
    v = torch.cat([torch.eye(60)[:length] for length in lengths])[:, None]
    q = torch.zeros(100, 4, 4)
    for implementation in IMPLEMENTATIONS:
        torch.manual_seed(3)
        out = hasten.attention(
            q, q[:, :1], v, dropout_p=0.4, cu_seqlens_q=bounds, cu_seqlens_k=bounds, implementation=implementation
        )
        for number, length in enumerate(lengths):
            rows = out[bounds[number] : bounds[number + 1]]
            assert torch.equal(rows[..., :length] > 0, dense[number, :length, :, :length])
