"""Decode steps in fixed places: padding, page tables, sizes, and the tokens, by a capture that needs no GPU."""

from __future__ import annotations

import logging

import pytest
import torch

import hasten.engine.engine as engines
from hasten.cache.paged import PagedCache, kinds_of, layers_of
from hasten.engine import decode_steps, make_runner
from hasten.engine.batch import Piece
from hasten.engine.batch_runner import BatchRunner
from hasten.engine.decode_steps import Inputs, PageRows, size_of
from hasten.errors import ArgumentError
from hasten.models.merged import MergedLinear
from tests.engine import test_engine
from tests.engine.test_engine import LENGTHS, NEW, engine, ids_of, model, of_transformers, prompt, run
from tests.models.tiny import DECODERS, distance, tokens

SAME = (
    test_engine.test_a_request_can_be_broken_off_in_every_state,
    test_engine.test_a_stop_string_ends_one_request_and_is_never_shown,
    test_engine.test_end_tokens_and_stop_ids_end_a_request,
    test_engine.test_forks_equal_separate_requests,
    test_engine.test_logprobs_are_those_of_the_model,
    test_engine.test_many_requests_choose_as_one_at_a_time_does,
    test_engine.test_one_request_that_is_no_number_touches_no_other,
    test_engine.test_preemption_changes_no_token,
)
globals().update({test.__name__: test for test in SAME})  # run again here, under the fixture below


@pytest.fixture(autouse=True)
def captured(monkeypatch):
    """Every engine captures; a "graph" is the function itself. Narrow tables, so that there are several widths."""
    monkeypatch.setattr(make_runner, "capture_for", lambda device, wanted: lambda run: run)
    monkeypatch.setattr(decode_steps, "CAPACITY", 16)


@pytest.mark.parametrize("most", [1, 3, 8, 20, 256])
def test_sizes_are_few_and_large_enough(most):
    sizes = [size_of(count, most) for count in range(1, most + 1)]
    assert all(count <= size <= min(2 * count, count + 7, most) for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 4 + most // 8 and sizes[-1] == most
    assert most < 24 or set(sizes[:24]) == {1, 2, 4, 8, 16, 24}


def test_tables_on_the_host_follow_their_pages():
    rows, pages = PageRows(), [[3, 4], [5]]
    assert rows.fill(pages, 4, 3).tolist() == [[3, 4, 0], [5, 0, 0], [0, 0, 0], [0, 0, 0]]
    pages[1].append(9)
    assert rows.fill(pages, 2, 2).tolist() == [[3, 4], [5, 9]]
    assert rows.fill([[0, 4, 8, 1], [7]], 2, 5).tolist() == [[0, 4, 8, 1, 0], [7, 0, 0, 0, 0]]
    assert rows.fill([[7]], 4, 5).tolist() == [[7, 0, 0, 0, 0], *[[0] * 5] * 3]


def test_padding_is_a_sequence_without_tokens():
    inputs, cache = Inputs(4, 2, 2, torch.device("cpu")), object()
    for _ in range(2):  # nothing is left of the first time
        tables = [torch.arange(8).view(4, 2) * kind for kind in (1, 2)]
        inputs.put(([7, 8, 9], [0, 4, 5], [1, 5, 6], [-1, 2, 0]), tables)
        ids, positions, pages = inputs.of(cache, torch.tensor([11, 12, -1]))
        assert ids.tolist() == [[7, 0, 11, 0]] and positions.tolist() == [[0, 4, 5, 0]]
        assert pages.cache_seqlens.tolist() == [1, 5, 6, 0] and pages.cache_seqlens.dtype == torch.int32
        assert [one.block_table.tolist() for one in pages.tables] == [table.tolist() for table in tables]
    inputs.put(([7], [3], [4], [-1]), [torch.zeros(4, 2), torch.zeros(4, 2)])
    ids, positions, pages = inputs.of(cache, torch.tensor([11, 12, -1]))
    assert ids.tolist() == [[7, 0, 0, 0]] and pages.cache_seqlens.tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("architecture", DECODERS, ids=str)
def test_logits_equal_those_of_whole_prompts_in_batches_that_change(architecture):
    """Three sequences of which one ends early; pools that hold NaN wherever nobody wrote, and stay so in page 0."""
    built = architecture.build()
    prompts = [tokens(1, length, length)[0].tolist() for length in (30, 37, 48)]
    with torch.no_grad():
        expected = [built(torch.tensor([prompt])).logits[0] for prompt in prompts]
    layers = layers_of(built)
    cache = PagedCache(layers, [20] * len(kinds_of(layers)), 16, built.dtype, "cpu")
    for pool in [pool for pools in cache.pools for pool in pools]:
        pool.fill_(float("nan"))
    runner = BatchRunner(built, cache, capture=lambda run: run, most_rows=5, context=64)
    ledger = cache.ledger()
    holdings = [ledger.open() for _ in prompts]
    for holding, ids in zip(holdings, prompts, strict=True):
        runner.run([Piece(ids=ids[:26], start=0, holding=holding, rows=[25], copies=holding.grow(26))])
    for position in range(26, 48):
        rows = [row for row, ids in enumerate(prompts) if position < len(ids)]
        pieces = []
        for row in rows:
            holdings[row].slide()
            copies = holdings[row].grow(1)
            ids = [prompts[row][position]]
            pieces.append(Piece(ids=ids, start=position, holding=holdings[row], rows=[0], copies=copies))
        logits = runner.run(pieces)
        want = torch.stack([expected[row][position] for row in rows])
        assert len(logits) == len(rows) and distance(logits, want) < 1e-5, position
    assert runner.steps.num_replays == 22 and runner.steps.num_graphs == 3  # (4, 64), (2, 64), (1, 64)
    assert all(pool[0].isnan().all() for pools in cache.pools for pool in pools)


def test_merged_projections_change_no_token():
    built = test_engine.BY_NAME["gemma2"].build()
    built.generation_config.eos_token_id = None
    with engine(built, merge_projections=True) as made:
        assert sum(type(layer) is MergedLinear for layer in built.modules()) == 5 * 3
        records = run(made, [prompt(length) for length in LENGTHS], stays_open=True)
        assert ids_of(records) == [of_transformers("gemma2", length) for length in LENGTHS]
    assert not any(isinstance(layer, MergedLinear) for layer in built.modules())


@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_batch_that_grows_and_shrinks(is_ahead, monkeypatch):
    make = engines.Core.__init__
    monkeypatch.setattr(
        engines.Core, "__init__", lambda self, runner, scheduler: make(self, runner, scheduler, is_ahead=is_ahead)
    )
    with engine(model("gemma2"), max_batch_tokens=12) as made:
        records = run(made, [prompt(length) for length in LENGTHS] * 3, stays_open=True)
        assert ids_of(records) == [of_transformers("gemma2", length) for length in LENGTHS] * 3
        stats = made.stats()
    assert stats.no_graphs is None and stats.num_replays > stats.num_graphs >= 3
    assert made._core.runner.steps._logits is None  # the memory is free, whoever keeps the engine


def test_a_model_that_cannot_be_captured_runs_without_and_says_why(monkeypatch, caplog):
    def capture(run):
        try:
            raise ValueError("a wait for the device")
        finally:
            raise RuntimeError("the capture is no longer valid")

    monkeypatch.setattr(make_runner, "capture_for", lambda device, wanted: capture)
    with engine() as made, caplog.at_level(logging.WARNING, "hasten"):
        records = run(made, [prompt(length) for length in LENGTHS], stays_open=True)
        assert ids_of(records) == [of_transformers("llama", length) for length in LENGTHS]
        stats = made.stats()
    assert (stats.num_graphs, stats.num_replays) == (0, 0) and stats.no_graphs == "ValueError: a wait for the device"
    assert [one.message for one in caplog.records] == [
        "engine: decode steps are no CUDA graphs, since ValueError: a wait for the device"
    ]


def test_a_request_that_breaks_the_model_at_the_first_step_is_no_refusal(monkeypatch):
    with engine() as made:
        forward, steps = made._core.runner._all_logits, made._core.runner.steps

        def breaks(ids, positions, pages, **options):
            if pages.cu_seqlens_q is None and ((positions >= 5) & (positions < 16)).any():  # the first's new tokens
                raise ValueError("no such token")
            return forward(ids, positions, pages, **options)

        monkeypatch.setattr(steps, "_forward", breaks)
        monkeypatch.setattr(made._core.runner, "_all_logits", breaks)
        broken, good = made.generate([prompt(5), prompt(16)], {"max_tokens": NEW})
        assert "no such token" in str(broken.error) and good.token_ids == of_transformers("llama", 16)
        assert made.stats().no_graphs is None and made.stats().num_replays > 0


def test_graphs_are_asked_for_where_they_can_be(monkeypatch):
    monkeypatch.undo()
    with engine() as made:
        run(made, [prompt(5)], stays_open=True)
        assert (made.stats().num_graphs, made.stats().no_graphs) == (0, "cuda_graphs is off")
    with pytest.raises(ArgumentError, match="cuda_graphs: expected False, or a model on CUDA, got True on cpu"):
        engine(cuda_graphs=True)
    with pytest.raises(ArgumentError, match="compile: expected False without CUDA graphs, got True"):
        engine(compile=True)
