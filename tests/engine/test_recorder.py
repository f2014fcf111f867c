"""A recorded forward gives what the forward gives for all values of its inputs; what it could not repeat is refused."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from hasten.engine.recorder import NotRecordable, Recorder

WEIGHT = nn.Parameter(torch.randn(4, 4))
TABLE = torch.randn(10, 4)


def record(function, value):
    recorder = Recorder()
    recorder.input("x", value)
    with torch.inference_mode(), recorder:
        result = function(value)
    recorder.finish(result)
    return fx.GraphModule(recorder.root, recorder.graph)


def in_place(x):
    y = x * 2
    y[0] = 5
    y.add_(1).mul_(2)
    y += x
    return y


def assign(buffer, x):
    buffer[1:] = x[1:]
    return buffer


FORWARDS = {
    "linear": lambda x: F.silu(F.linear(x, WEIGHT)),
    "operators": lambda x: (2 - x) * x / 3 + x**2,
    "in_place": in_place,
    "out": lambda x: torch.add(x, x, out=torch.empty_like(x)),
    "views": lambda x: x.view(2, 2).T.reshape(4) + x.view(2, 2).mT.reshape(-1),
    "parts": lambda x: torch.cat([part * (index + 1) for index, part in enumerate(x.split(2))]),
    "slices": lambda x: x[..., 2:] - x[..., :2],
    "shapes": lambda x: x.reshape(x.shape[0] // 2, -1).sum(-1) * x.numel(),
    "gather": lambda x: TABLE[x.abs().long() % 10],
    "embedding": lambda x: F.embedding(x.abs().long() % 10, TABLE),
    "same_dtype": lambda x: x.to(torch.float32).contiguous() + 1,
    "folded": lambda x: x + (WEIGHT.float().sum() * torch.arange(4)),
    "dropout": lambda x: F.dropout(x, 0.5, training=False) + 1,
    "constants_in_place": lambda x: x + torch.zeros(4).add_(3).fill_(2),
    "where": lambda x: torch.where(x > 0, x, -x),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_the_graph_gives_what_the_forward_gives(name):
    torch.manual_seed(1)
    graph = record(FORWARDS[name], torch.randn(4))
    for _ in range(3):
        value = torch.randn(4)
        assert torch.equal(graph(value), FORWARDS[name](value.clone()))


REFUSED = {
    "item": lambda x: x * x[0].item(),
    "bool": lambda x: x if x.sum() > 0 else -x,
    "bool_mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "tolist": lambda x: x * x.tolist()[0],
    "numpy": lambda x: x * float(x.numpy()[0]),
    "unique": lambda x: x.unique(),
    "int_index": lambda x: x[: x[0].abs().long() + 1],
    "arange_to": lambda x: torch.arange(int(x[0].abs()) + 1),
    "equal": lambda x: x if torch.equal(x, x + 1) else -x,
    "contains": lambda x: x * 2 if 1.0 in x else x,
    "outside": lambda x: TABLE[0].add_(x),
    "counter": lambda x: (TABLE.add_(0), x + 1)[1],
    "view_of_outside": lambda x: TABLE.view(40)[:4].mul_(2) + x,
    "accumulate": lambda x: torch.zeros(4).add_(x),
    "assign": lambda x: assign(torch.zeros(4), x),
    "constant": lambda x: torch.ones(3),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_would_not_repeat_is_refused(name):
    with pytest.raises(NotRecordable):
        record(REFUSED[name], torch.randn(4))


def test_what_depends_on_weights_alone_is_computed_once():
    graph = record(FORWARDS["folded"], torch.randn(4))
    assert sum(node.op in ("call_function", "call_method") for node in graph.graph.nodes) == 1


def test_a_constant_in_the_graph_is_not_written_later():
    def forward(x):
        ones = torch.ones(4)
        y = x + ones
        return y + ones.add_(1)

    with pytest.raises(NotRecordable, match="add_ writes into a tensor that outlives the step"):
        record(forward, torch.randn(4))


def test_parameters_stay_the_same_objects():
    graph = record(FORWARDS["linear"], torch.randn(4))
    assert any(parameter is WEIGHT for parameter in graph.parameters())


def test_what_the_result_does_not_need_is_dropped():
    def forward(x):
        x.sin()
        return x.cos()

    graph = record(forward, torch.randn(4))
    assert [node.name for node in graph.graph.nodes if node.op in ("call_function", "call_method")] == ["cos"]


def test_a_call_is_recorded_as_one_and_is_kept():
    seen = []

    def note(store, x):
        seen.append(store)
        return x.sin().cos()

    recorder, value = Recorder(), torch.randn(4)
    recorder.input("x", value)
    node = recorder.input("store")
    with recorder:
        result = value * 2
        recorder.call(note, node, result, live={0: "first"})
    recorder.finish(result)
    graph = fx.GraphModule(recorder.root, recorder.graph)
    assert torch.equal(graph(value, "second"), value * 2)
    assert seen == ["first", "second"]
