"""Rows and batches: every token once an epoch, documents told apart, the same order from a seed and a place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hasten.errors import ArgumentError
from hasten.train.data import Plan, Rows, batches
from hasten.train.loss import IGNORED
from hasten.train.tokens import Tokens

CPU = torch.device("cpu")


def tokens(*lengths: int) -> Tokens:
    """Documents of these lengths in two arrays; each token is its number, so that it says where it came from."""
    length = np.array(lengths)
    half = len(lengths) // 2
    split = int(length[:half].sum())
    number = np.arange(length.sum(), dtype=np.uint16)
    start = length.cumsum() - length
    array = (np.arange(len(lengths)) >= half).astype(np.int64)
    return Tokens((number[:split], number[split:]), np.stack([array, start - array * split, length], axis=1))


LENGTHS = (3, 1, 17, 2, 8, 5, 1, 30, 4)
PINNED = [16, 29, 9, 69, 31, 3, 39, 53, 46, 60]


def stream(rows: Rows, epoch: int) -> np.ndarray:
    found = [rows.row(epoch * rows.rows_per_epoch + number)[0] for number in range(rows.rows_per_epoch)]
    order = np.argsort([int(cut) for cut in rows._cuts])
    return np.concatenate([found[number][:-1] for number in order])


@pytest.mark.parametrize("seqlen", [2, 3, 7, 16, 35, 70])
def test_an_epoch_has_every_token_once_and_documents_stay_whole(seqlen):
    made = tokens(*LENGTHS)
    rows = Rows(made, seqlen, seed=1)
    seen = stream(rows, 0)
    assert len(set(seen.tolist())) == len(seen) == rows.rows_per_epoch * seqlen > sum(LENGTHS) - 1 - seqlen
    starts = set((np.array(LENGTHS).cumsum() - LENGTHS).tolist())
    jumps = seen[1:] != seen[:-1] + 1
    assert set(seen[1:][jumps].tolist()) <= starts


def test_without_a_shuffle_the_order_is_that_of_the_files():
    rows = Rows(tokens(*LENGTHS), 7, seed=1, shuffle=False)
    assert stream(rows, 0).tolist() == list(range(70))
    assert rows.row(2)[0].tolist() == list(range(14, 22))


def test_seeds_and_epochs_shuffle_and_places_repeat():
    made = tokens(*LENGTHS)
    one, other = Rows(made, 7, seed=1), Rows(made, 7, seed=2)
    assert stream(one, 0).tolist() != stream(other, 0).tolist()
    assert stream(one, 0).tolist() != stream(one, 1).tolist()
    again = Rows(made, 7, seed=1)
    for index in (33, 0, 12, 33, 5):
        assert again.row(index)[0].tolist() == one.row(index)[0].tolist()


def test_the_order_of_a_seed_never_changes():
    """Pinned: a run that was begun yesterday must go on tomorrow."""
    rows = Rows(tokens(*LENGTHS), 7, seed=0)
    assert [int(rows.row(index)[0][0]) for index in range(10)] == PINNED


def test_labels_are_the_next_tokens_within_a_document():
    rows = Rows(tokens(*LENGTHS), 7, seed=3)
    begins = (np.array(LENGTHS).cumsum() - LENGTHS).tolist()
    batch = rows.batch(range(20))
    assert batch.ids.shape == batch.labels.shape == batch.positions.shape == (20, 7)
    assert batch.num_labels == int((batch.labels != IGNORED).sum())
    for ids, positions, labels in zip(batch.ids.tolist(), batch.positions.tolist(), batch.labels.tolist(), strict=True):
        for at, (token, position, label) in enumerate(zip(ids, positions, labels, strict=True)):
            assert label in (token + 1, IGNORED)
            assert (label == IGNORED) == (token + 1 in begins or token + 1 == sum(LENGTHS))
            is_first = at == 0 or token in begins
            assert position == (0 if is_first else positions[at - 1] + 1)


def test_too_little_data_is_refused():
    with pytest.raises(ArgumentError, match="data: expected more than 70 tokens, got 70 in all"):
        Rows(tokens(40, 30), 70, seed=0)
    assert Rows(tokens(41, 30), 70, seed=0).rows_per_epoch == 1


def test_a_step_takes_the_same_rows_however_it_is_split():
    plain = Plan(batch=12, micro_batch=12)
    assert list(plain.indices(24, 0)) == list(range(24, 36))
    for micro, world in ((3, 1), (1, 4), (3, 2), (2, 3)):
        plans = [Plan(batch=12, micro_batch=micro, rank=rank, world=world) for rank in range(world)]
        taken = [list(plan.indices(24, step)) for plan in plans for step in range(plan.micro_steps)]
        assert sorted(row for rows in taken for row in rows) == list(range(24, 36))
    with pytest.raises(ArgumentError, match="batch: expected a multiple of micro-batch times processes, got 12 rows"):
        Plan(batch=12, micro_batch=5)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_batches_from_a_place_are_those_of_the_whole_run(micro):
    rows, plan = Rows(tokens(*LENGTHS), 7, seed=4), Plan(batch=4, micro_batch=micro)
    whole = [torch.cat([one.ids for one in step]) for step in batches(rows, plan, 0, 9, CPU)]
    assert torch.equal(torch.cat(whole), rows.batch(range(36)).ids)
    rest = [torch.cat([one.ids for one in step]) for step in batches(rows, plan, 20, 4, CPU)]
    assert torch.equal(torch.cat(rest), torch.cat(whole[5:]))


def test_an_error_while_a_batch_is_made_reaches_the_loop(monkeypatch):
    rows = Rows(tokens(*LENGTHS), 7, seed=4)
    monkeypatch.setattr(rows, "row", lambda index: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(batches(rows, Plan(batch=4, micro_batch=4), 0, 9, CPU))


def test_a_run_that_stops_early_leaves_no_thread():
    made = batches(Rows(tokens(*LENGTHS), 7, seed=4), Plan(batch=4, micro_batch=2), 0, 9, CPU)
    next(made)
    made.close()
    import threading

    assert not [one for one in threading.enumerate() if one.name.startswith("hasten-data")]
