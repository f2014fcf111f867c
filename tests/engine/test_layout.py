"""Weights laid out anew: the same values and names, columns together, one product for matrices of one input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from hasten.engine.layout import lay_out
from hasten.engine.recorder import Recorder


class Model(nn.Module):
    """An embedding tied to the output, three matrices of one input, one that is wider than tall."""

    def __init__(self, has_bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.q, self.k, self.v = nn.Linear(8, 8, has_bias), nn.Linear(8, 4, has_bias), nn.Linear(8, 4, has_bias)
        self.down = nn.Linear(16, 8, has_bias)

    def forward(self, token):
        x = self.embedding(token)
        joined = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        return F.linear(self.down(joined), self.embedding.weight)


def record(model):
    recorder, token = Recorder(), torch.tensor([[3]])
    recorder.input("token", token)
    with torch.inference_mode(), recorder:
        logits = model(token)
    recorder.finish(logits)
    return recorder


def laid_out(model):
    recorder = record(model)
    lay_out(recorder.graph, recorder.root)
    recorder.graph.lint()
    return fx.GraphModule(recorder.root, recorder.graph)


def num_products(graph):
    return sum(node.target is torch._C._nn.linear for node in graph.graph.nodes)


@pytest.mark.parametrize("has_bias", [True, False])
def test_results_and_parameters_stay(has_bias):
    model = Model(has_bias)
    before = copy.deepcopy(model)
    graph = laid_out(model)
    assert num_products(graph) == 3
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for token in range(5):
        ids = torch.tensor([[token]])
        torch.testing.assert_close(graph(ids), before(ids))
        torch.testing.assert_close(model(ids), before(ids))


def test_matrices_of_one_input_are_blocks_of_one_buffer():
    model = Model(False)
    laid_out(model)
    storages = {layer.weight.untyped_storage().data_ptr() for layer in (model.q, model.k, model.v)}
    assert len(storages) == 1
    assert [layer.weight.stride() for layer in (model.q, model.k, model.v)] == [(1, 16)] * 3


def test_what_is_wider_than_tall_and_what_is_looked_up_by_rows_stay_as_they_lie():
    model = Model(False)
    addresses = [model.down.weight.data_ptr(), model.embedding.weight.data_ptr()]
    laid_out(model)
    assert [model.down.weight.data_ptr(), model.embedding.weight.data_ptr()] == addresses
    assert model.down.weight.is_contiguous() and model.embedding.weight.is_contiguous()


def test_a_second_recording_finds_the_buffer():
    model = Model(False)
    laid_out(model)
    address = model.q.weight.data_ptr()
    again = laid_out(model)
    assert model.q.weight.data_ptr() == address and num_products(again) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_stay_as_they_are(dtype):
    model = Model(False).to(dtype)
    graph = laid_out(model)
    assert num_products(graph) == 5 and model.q.weight.is_contiguous()
