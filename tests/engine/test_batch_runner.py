"""Logits of packed batches over pages equal those of the model's own forward, however prompts are cut and mixed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from hasten.cache.paged import PagedCache, kinds_of, layers_of
from hasten.engine.batch import Piece, parts
from hasten.engine.batch_runner import BatchRunner
from hasten.errors import ArgumentError
from tests.models.tiny import DECODERS, distance, tokens

PROMPTS = [tokens(1, length, length)[0].tolist() for length in (5, 33, 48)]


def runner(model, num_pages=20):
    layers = layers_of(model)
    cache = PagedCache(layers, [num_pages] * len(kinds_of(layers)), 16, model.dtype, "cpu")
    return BatchRunner(model, cache)


def run_in_pieces(made, prompts, sizes):
    """Logits of every token of every prompt, computed a piece of each at a time; sizes(step, row) tokens of it."""
    ledger = made.cache.ledger()
    holdings, found, step = [ledger.open() for _ in prompts], [[] for _ in prompts], 0
    while any(one.num_tokens < len(prompt) for one, prompt in zip(holdings, prompts, strict=True)):
        pieces, rows = [], []
        for row, (prompt, holding) in enumerate(zip(prompts, holdings, strict=True)):
            start = holding.num_tokens
            count = min(sizes(step, row), len(prompt) - start)
            if count:
                holding.slide()
                copies = holding.grow(count)
                ids = prompt[start : start + count]
                pieces.append(Piece(ids=ids, start=start, holding=holding, rows=range(count), copies=copies))
                rows.append(row)
        logits = made.run(pieces).split([len(piece.ids) for piece in pieces])
        for row, part in zip(rows, logits, strict=True):
            found[row].append(part)
        step += 1
        ledger.check_integrity(holdings)
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("architecture", DECODERS, ids=str)
def test_packed_pieces_equal_whole_prompts(architecture):
    model = architecture.build()
    with torch.no_grad():
        expected = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    found = run_in_pieces(runner(model), PROMPTS, lambda step, row: [3, 11, 1][(step + row) % 3])
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("architecture", DECODERS, ids=str)
def test_tokens_one_at_a_time_beside_each_other_and_beside_a_prompt(architecture):
    model = architecture.build()
    with torch.no_grad():
        expected = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    made = poisoned(model)
    found = run_in_pieces(made, PROMPTS, lambda step, row: 1 if step else [2, 19, 33][row])
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < 1e-5
    found = run_in_pieces(made, PROMPTS, lambda step, row: 6 if row == 2 else 1)
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("architecture", DECODERS, ids=str)
def test_the_way_of_a_device_gives_the_same(architecture, monkeypatch):
    """decode_attention and append_kv, which a GPU takes, by their implementations for a CPU."""
    model = architecture.build()
    with torch.no_grad():
        expected = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    made = poisoned(model)
    forward = made._forward

    def as_on_a_device(batch):
        tables = tuple(replace(one, rows=None) for one in batch.pages.tables)
        calls = parts(batch.pages.lengths, 16, torch.device("cpu"))
        return forward(replace(batch, pages=replace(batch.pages, tables=tables, plans=(), parts=calls)))

    monkeypatch.setattr(made, "_forward", as_on_a_device)
    found = run_in_pieces(made, PROMPTS, lambda step, row: 1 if step > 2 else [2, 9, 14][row])
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = DECODERS[4].build(dtype)
    with torch.no_grad():
        expected = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    found = run_in_pieces(runner(model), PROMPTS, lambda step, row: 1 if step else [2, 19, 33][row])
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < {8: 1e-6, 2: 0.1}[dtype.itemsize]


@pytest.mark.parametrize("boundary", range(1, 40))
def test_a_boundary_at_every_token(boundary):
    model = DECODERS[4].build()  # Gemma 2: windows, full layers, softcap
    prompt = PROMPTS[2][:40]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    (found,) = run_in_pieces(runner(model), [prompt], lambda step, row: boundary if step == 0 else 40)
    assert distance(found, expected) < 1e-5


def test_whatever_is_in_unused_pages_is_not_seen():
    model = DECODERS[4].build()
    clean, dirty = (run_in_pieces(one, PROMPTS, lambda step, row: 7) for one in (runner(model), poisoned(model)))
    assert all(torch.equal(*pair) for pair in zip(clean, dirty, strict=True))


def poisoned(model):
    made = runner(model)
    for pool in [pool for pools in made.cache.pools for pool in pools]:
        pool.fill_(float("nan"))
    return made


def test_windows_give_pages_back():
    made = runner(DECODERS[1].build(), num_pages=3)  # Mistral: 48 tokens are three pages, a window at most two
    ledger = made.cache.ledger()
    one = ledger.open()
    for start in range(48):
        one.slide()
        copies = one.grow(1)
        made.run([Piece(ids=[5], start=start, holding=one, rows=[], copies=copies)])
        assert one.num_pages[0] <= 2
    assert one.tables[0].pages[:2] == [0, 0]


def test_only_the_rows_that_are_wanted_give_logits():
    made = runner(DECODERS[0].build())
    ledger = made.cache.ledger()
    one, two = ledger.open(), ledger.open()
    one.grow(4), two.grow(3)
    pieces = [
        Piece(ids=PROMPTS[1][:4], start=0, holding=one, rows=[3]),
        Piece(ids=PROMPTS[2][:3], start=0, holding=two, rows=[0, 2]),
    ]
    with torch.no_grad():
        first, second = (made.model(torch.tensor([piece.ids])).logits[0] for piece in pieces)
    assert distance(made.run(pieces), torch.stack([first[3], second[0], second[2]])) < 1e-5


def test_a_model_that_is_served_still_does_everything_else():
    eager = DECODERS[4].build()
    made = runner(copy.deepcopy(eager))
    ids = tokens(2, 9)
    with torch.no_grad():
        assert distance(made.model(ids).logits, eager(ids).logits) < 1e-5
        out = [model.generate(ids, max_new_tokens=8, do_sample=False) for model in (made.model, eager)]
    assert torch.equal(*out)
    made.close()
    assert made.model.config._attn_implementation == "eager"


def test_a_mask_that_reaches_further_than_the_pages_is_refused():
    model = DECODERS[1].build()
    made = runner(model)
    model.config.sliding_window = 9
    one = made.cache.ledger().open()
    one.grow(3)
    with pytest.raises(ArgumentError, match="model: expected layer 0 to see 3 tokens before its own"):
        made.run([Piece(ids=[5, 6, 7], start=0, holding=one, rows=[])])
