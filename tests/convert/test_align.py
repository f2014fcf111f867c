"""Turns change nothing in any architecture, and bring heads together that are turned copies of each other."""

from __future__ import annotations

import pytest
import torch

from hasten.convert import align, gqa, heads, merge
from tests.convert import families
from tests.models import tiny


def turned(model, *, freely=False):
    """The model with every key and value head turned at random, as its architecture allows (or freely), in place."""
    state = model.state_dict()
    for site in heads.sites(model):
        crosses = torch.randn(2, site.num_kv_heads, site.head_dim, site.head_dim, dtype=torch.float64)
        keys = align.value_turn(crosses[0]) if freely else align.key_turn(site, crosses[0])
        members = list(range(site.num_kv_heads))
        new = align.turn(site, heads.read(site, state), members, keys, align.value_turn(crosses[1]))
        for name, tensor in heads.write(site, new, state, site.layout).items():
            state[name].copy_(tensor)
    return model


@pytest.mark.parametrize("name", families.FAMILIES)
def test_allowed_turns_leave_the_logits(name):
    model = families.build(name)
    before, weights = families.logits(model), [p.clone() for p in model.parameters()]
    turned(model)
    assert tiny.distance(families.logits(model), before) < 1e-5
    assert any(not torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3-half-rotary"])
def test_turns_that_do_not_commute_are_seen(name):
    model = families.build(name)
    before = families.logits(model)
    assert tiny.distance(families.logits(turned(model, freely=True)), before) > 1e-2


@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.parametrize("method", ["aligned", "factored"])
def test_turned_copies_of_one_head_become_one_without_loss(name, method):
    model = turned(families.equal_heads(families.build(name), 2))
    expected = families.logits(model)
    assert tiny.distance(families.logits(gqa.to_gqa(model, 2, method=method)), expected) < 2e-4
    assert tiny.distance(families.logits(gqa.to_gqa(model, 2, method="mean")), expected) > 1e-2


def test_planted_turns_are_found():
    (site, *_) = heads.sites(families.build("llama"))
    key = torch.randn(8, 33, dtype=torch.float64)
    for find in (lambda cross: align.key_turn(site, cross), align.value_turn):
        planted = find(torch.randn(8, 8, dtype=torch.float64))
        torch.testing.assert_close(find((planted.T @ key) @ key.T), planted)
        torch.testing.assert_close(planted @ planted.T, torch.eye(8, dtype=torch.float64))


def test_a_head_is_as_close_to_itself_as_can_be():
    model = families.build("llama")
    (site, *_) = heads.sites(model)
    read = heads.read(site, model.state_dict())
    close = align.similarity(site, align.moment(read.k, None), align.moment(read.v, None))
    torch.testing.assert_close(close.diagonal(), torch.full((4,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(close, close.T)
    assert close.max() <= 2 + 1e-9


@pytest.mark.parametrize("method", ["aligned", "factored"])
def test_the_error_of_scores_and_values_is_below_that_of_the_mean(method):
    """Against what the heads compute on the calibration text itself; factored is the least squares solution."""
    model = families.build("gpt2")
    errors = {}
    calibration = [tiny.tokens(8, 30, seed=5)]
    expected = families.logits(model, 20)
    for one in ("mean", method):
        errors[one] = (families.logits(gqa.to_gqa(model, 2, method=one, calibration=calibration), 20) - expected).norm()
    assert errors[method] < errors["mean"]


def close_table(groups):
    """Similarity 2 within each of these groups and 0.1 between them."""
    size = sum(map(len, groups))
    table = torch.full((size, size), 0.1, dtype=torch.float64)
    for group in groups:
        for head in group:
            table[head, group] = 2.0
    return table


def test_planted_groups_are_found():
    even, uneven = [[0, 5, 6], [1, 2, 7], [3, 4, 8]], [[0, 2, 3, 4, 5], [1], [6, 7]]
    assert merge._balanced(close_table(even), 3) == even
    assert merge._uneven(close_table(uneven), 3) == uneven
