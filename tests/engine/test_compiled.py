"""Decode steps under torch.compile: traced whole for every decoder, the same logits, K and V written in place."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from hasten.cache.paged import PagedCache, kinds_of, layers_of
from hasten.engine.batch import Piece
from hasten.engine.batch_runner import BatchRunner
from hasten.engine.compiled import CompiledForward
from hasten.models.merged import merge
from tests.models.tiny import DECODERS, distance, tokens

FIRST, LAST = 13, 24


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def decode(built, backend, num_sequences=2):
    """(logits of the tokens from FIRST on, in batches of two and then of one; the runner)."""
    layers = layers_of(built)
    cache = PagedCache(layers, [20] * len(kinds_of(layers)), 16, built.dtype, "cpu")
    runner = BatchRunner(built, cache, capture=lambda run: run, most_rows=4, context=64, backend=backend)
    ids, ledger = tokens(1, 48, 48)[0].tolist(), cache.ledger()
    holdings = [ledger.open() for _ in range(num_sequences)]
    for holding in holdings:
        runner.run([Piece(ids=ids[:FIRST], start=0, holding=holding, rows=[], copies=holding.grow(FIRST))])
    found = []
    for position in range(FIRST, LAST):
        pieces = []
        for holding in holdings[: 1 + (position < 18)]:
            holding.slide()
            copies = holding.grow(1)
            pieces.append(Piece(ids=[ids[position]], start=position, holding=holding, rows=[0], copies=copies))
        found.append(runner.run(pieces)[0].clone())
    return torch.stack(found), runner


def whole(built):
    with torch.no_grad():
        return built(tokens(1, 48, 48)).logits[0, FIRST:LAST]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("is_merged", [False, True])
def test_steps_are_traced_whole_and_give_the_same_logits(name, is_merged):
    built = next(one for one in DECODERS if one.name == name).build()
    expected = whole(built)
    if is_merged:
        merge(built)
    found, runner = decode(built, "eager")
    assert runner.compiled.refusal is None and runner.steps.num_graphs == 2
    assert distance(found, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", DECODERS, ids=str)
def test_every_decoder_is_traced_whole(architecture):
    built = architecture.build()
    expected = whole(built)
    merge(built)
    found, runner = decode(built, "aot_eager")
    assert runner.compiled.refusal is None and distance(found, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_inductor_writes_to_the_pages_in_place():
    built = DECODERS[0].build()
    expected = whole(built)
    (found, runner), codes = run_and_get_code(lambda: decode(built, "inductor"))
    assert runner.compiled.refusal is None and distance(found, expected) < 1e-5
    calls = [line for code in codes for line in code.splitlines() if "torch.ops.hasten.append_kv.default(" in line]
    assert len(calls) == 2 * 2 and all("reinterpret_tensor(arg" in line for line in calls)
    assert not any("aten.copy_" in code or "aten.clone" in code for code in codes)


def test_a_model_that_cannot_be_traced_runs_as_it_is_and_says_why(caplog):
    def forward(ids, positions, pages):
        torch._dynamo.graph_break()
        return ids.float()[..., None] + positions[..., None]

    made = CompiledForward(forward, "eager")
    ids = torch.arange(3)[None]
    with caplog.at_level(logging.WARNING, "hasten"):
        for _ in range(2):
            assert made(ids, ids, None).flatten().tolist() == [0.0, 2.0, 4.0]
    assert made.refusal is not None and len(caplog.records) == 1
    assert caplog.records[0].message == f"engine: decode steps are not compiled, since {made.refusal}"


def test_what_a_model_raises_is_raised():
    def forward(ids, positions, pages):
        if ids.shape[1] == 3:
            raise IndexError("no such token")
        return ids

    made = CompiledForward(forward, "eager")
    assert torch.equal(made(torch.ones(1, 2), torch.zeros(1, 2), None), torch.ones(1, 2)) and made.refusal is None
    with pytest.raises(IndexError, match="no such token"):
        made(torch.zeros(1, 3), torch.zeros(1, 3), None)
    assert torch.equal(made(torch.ones(1, 2), torch.zeros(1, 2), None), torch.ones(1, 2))
