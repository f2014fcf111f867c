"""A step and an evaluation: the same however they are split, and under a compiler."""

from __future__ import annotations

import pytest
import torch

from hasten.train import events
from hasten.train.data import Plan, Rows
from hasten.train.distributed import World
from hasten.train.model import load
from hasten.train.run_folder import RunFolder
from hasten.train.step import Step
from tests.engine.tiny_checkpoints import llama
from tests.train import runs

CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = runs.prepare(tmp_path_factory.mktemp("step"))
    llama(folder / "model")
    return runs.config(folder)


@pytest.fixture(scope="module")
def rows(config):
    loaded = load(config.model)
    tokens, _ = RunFolder(config, CPU).tokens(loaded.tokenizer, 300, loaded.identity)
    return Rows(tokens, config.data.seqlen, 0)


def step(config):
    return Step(load(config.model).model, config, CPU)


@pytest.mark.parametrize("micro", [1, 3, 4, 64])
@pytest.mark.parametrize("most", [1, 6, 7])
def test_an_evaluation_counts_every_label_once(config, rows, most, micro):
    one = step(config)
    batch = rows.batch(range(most))
    want = one.language(batch.ids, batch.positions, batch.labels).item() / batch.num_labels
    loss, count = one.evaluate(rows, Plan(batch=micro, micro_batch=micro), most)
    assert loss == pytest.approx(want, rel=1e-5) and count == batch.num_labels
    assert one.language.training


def test_micro_batches_of_unequal_labels_weigh_by_labels(config, rows):
    whole, split = step(config), step(config)
    batch = rows.batch(range(4))
    values = whole.train([batch], 1e-3)
    parts = [rows.batch([index]) for index in range(4)]
    assert len({part.num_labels for part in parts}) > 1
    torch.testing.assert_close(split.train(parts, 1e-3), values)
    for name, weight in whole.weights.trained.items():
        torch.testing.assert_close(split.weights.trained[name], weight, rtol=1e-3, atol=1e-4)


# dynamo itself makes an instance of the loss's Function while it traces apply()
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_packed_rows_and_the_loss_compile_into_one_graph(config, rows):
    language, batch = step(config).language, rows.batch(range(3))
    given = (batch.ids, batch.positions, batch.labels)
    want = torch.autograd.grad(language(*given), list(language.parameters()))
    compiled = torch.compile(language, backend="aot_eager", fullgraph=True, dynamic=False)
    got = torch.autograd.grad(compiled(*given), list(language.parameters()))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_numbers_are_read_in_order():
    readings = events.Readings(CPU.device)
    for number in range(3):
        readings.put(number, torch.tensor([float(number), 0.5]))
    assert readings.take() == [(0, [0.0, 0.5]), (1, [1.0, 0.5]), (2, [2.0, 0.5])]
    assert readings.take(wait=True) == []
    assert not events.is_sound([1.0, float("inf")]) and events.is_sound([0.0])
