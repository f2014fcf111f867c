"""What test_engine.py promises, where the tokens of a step are read only once the next one is on its way."""

from __future__ import annotations

import pytest
import torch

from hasten.engine.core import Core
from tests.engine import test_engine
from tests.engine.test_engine import Hand, of_transformers, prompt

SAME = (
    test_engine.test_a_preempted_request_can_be_broken_off,
    test_engine.test_a_request_can_be_broken_off_in_every_state,
    test_engine.test_a_stop_string_ends_one_request_and_is_never_shown,
    test_engine.test_a_storm_of_requests_and_cancels_from_many_threads_leaves_nothing_behind,
    test_engine.test_end_tokens_and_stop_ids_end_a_request,
    test_engine.test_events_are_those_of_one_request_at_a_time,
    test_engine.test_forks_equal_separate_requests,
    test_engine.test_logprobs_are_those_of_the_model,
    test_engine.test_many_requests_choose_as_one_at_a_time_does,
    test_engine.test_one_request_that_breaks_the_model_touches_no_other,
    test_engine.test_one_request_that_is_no_number_touches_no_other,
    test_engine.test_preemption_changes_no_token,
    test_engine.test_the_context_ends_the_text,
)
globals().update({test.__name__: test for test in SAME})  # run again here, under the fixture below


@pytest.fixture(autouse=True)
def ahead(monkeypatch):
    make = Core.__init__
    monkeypatch.setattr(Core, "__init__", lambda self, runner, scheduler: make(self, runner, scheduler, is_ahead=True))


def test_a_step_is_on_its_way_before_the_last_one_is_read(monkeypatch):
    hand, order = Hand(), []
    request = hand.add(prompt(5))
    forward, read = hand.core.runner._forward, torch.Tensor.tolist

    def noting(batch):
        order.append("launch")
        return forward(batch)

    monkeypatch.setattr(hand.core.runner, "_forward", noting)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (order.append("read"), read(tensor))[1])
    hand.core.step()
    assert hand.events[request.number] == [] and "read" not in order
    hand.core.step()
    assert order[:2] == ["launch", "launch"] and order[2:].count("read") == 1 == len(hand.events[request.number])
    hand.rest()
    assert hand.events[request.number][-1].token_ids == of_transformers("llama", 5)
    assert order.count("launch") == test_engine.NEW  # the last token is known by its number, and nothing wasted


def test_every_step_computes_a_token_of_every_request():
    """A token that was chosen, and not yet read, is not forgotten when the one before it is read."""
    hand = Hand(max_batch_tokens=64)
    requests = [hand.add(prompt(length)) for length in (5, 9, 16)]
    hand.rest()
    assert hand.core.num_steps == test_engine.NEW
    for request, length in zip(requests, (5, 9, 16), strict=True):
        assert hand.events[request.number][-1].token_ids == of_transformers("llama", length)
    hand = Hand()
    hand.add(prompt(5))
    calls = 0
    while not hand.core.is_idle:
        hand.step()
        calls += 1
    assert calls == test_engine.NEW + 1 == hand.core.num_steps + 1


def test_who_ends_by_a_token_is_computed_once_too_often_and_no_more():
    end = of_transformers("llama", 9)[4]
    at = of_transformers("llama", 9).index(end)
    hand = Hand()
    request = hand.add(prompt(9), stop_ids=(end,))
    hand.rest()
    record = hand.events[request.number][-1]
    assert record.token_ids == of_transformers("llama", 9)[: at + 1] and record.num_positions == 9 + at + 1
