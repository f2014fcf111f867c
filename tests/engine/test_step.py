"""The recorded step of every architecture gives the logits of its own forward, at every length."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from hasten.engine import step
from hasten.engine.runner import Runner
from hasten.models import accelerate
from tests.models.tiny import GENERATORS, WINDOW, distance, tokens

PROMPT, STEPS = 3, 3 * WINDOW


def runners(architecture, **options):
    """(a runner that records, one that does not) of one model, after the same prompt"""
    model = architecture.build()
    both = Runner(model, **options), Runner(model, can_record=False)
    first = [model.config.decoder_start_token_id] if architecture.kind == "seq2seq" else []
    for runner in both:
        runner.begin(tokens(1, PROMPT)[0].tolist(), first, STEPS + 1)
    return both


@pytest.mark.parametrize("may_lay_out", [False, True], ids=["as_it_lies", "laid_out"])
@pytest.mark.parametrize("architecture", GENERATORS, ids=str)
def test_logits_are_those_of_the_forward(architecture, may_lay_out):
    recorded, plain = runners(architecture, may_lay_out=may_lay_out)
    for token in tokens(1, STEPS, seed=5)[0].tolist():
        got, expected = recorded.next(token), plain.next(token)
        assert recorded.path == "recorded step" and plain.path == "the model's own forward"
        assert distance(got, expected) < 2e-5
    assert recorded.cache.length == plain.cache.length


def test_the_model_is_left_as_it_was():
    architecture = GENERATORS[0]
    runner, _ = runners(architecture)
    names = {id(module): dict(vars(module)).keys() for module in runner.model.modules()}
    runner.next(5)
    assert runner.model.config._attn_implementation == "eager"
    assert {id(module): dict(vars(module)).keys() for module in runner.model.modules()} == names


def test_the_step_needs_no_module_and_no_mask():
    runner, _ = runners(GENERATORS[0])
    runner.next(5)
    nodes = list(runner._step.graph.graph.nodes)
    assert not any(node.op == "call_module" for node in nodes)
    assert sum(node.target is step.attend for node in nodes) == runner.model.config.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_onednn_is_as_before_after_a_half_precision_step(dtype):
    model = GENERATORS[0].build(dtype)
    runner = Runner(model)
    runner.begin([5, 6, 7], [], 4)
    for token in (8, 9, 10):
        runner.next(token)
    assert runner.path == "recorded step" and torch.backends.mkldnn.enabled


def test_a_layer_that_brings_its_own_keys_is_refused():
    function = AttentionInterface()[step.NAME]
    query = torch.zeros(1, 1, 1, 4)
    with pytest.raises(step.NotRecordable, match="Identity attends to keys that it did not get from the cache"):
        function(nn.Identity(), query, query, query, None)


def test_a_model_that_is_not_reached_goes_on_with_its_own_forward(monkeypatch):
    """Layers that write to the cache but attend by a function of their own would attend to what stands for the keys."""
    runner, plain = runners(GENERATORS[0])
    accelerate(runner.model)  # whose function takes the mask of the step, as eager would not
    monkeypatch.setattr(step, "set_implementation", lambda *_: None)
    assert distance(runner.next(5), plain.next(5)) < 2e-5
    assert "attended by another function" in runner.path
