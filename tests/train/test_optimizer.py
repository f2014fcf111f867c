"""AdamW groups, master weights and clipping, against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hasten.train.config import OptimizerConfig
from hasten.train.optimizer import Weights, clip, make_optimizer, set_lr


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def backward(net, scale=1.0):
    torch.manual_seed(1)
    (net(torch.randn(4, 5, dtype=next(net.parameters()).dtype)) ** 2).sum().mul(scale).backward()


def test_matrices_decay_and_vectors_do_not():
    optimizer = make_optimizer(Weights(model(), with_masters=False), OptimizerConfig(weight_decay=0.3))
    groups = [({one.ndim for one in group["params"]}, group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [({2}, 0.3), ({1}, 0.0)]
    assert all(group["fused"] for group in optimizer.param_groups)


def test_a_state_made_beforehand_changes_nothing():
    ours, plain = model(), model()
    optimizer = make_optimizer(Weights(ours, with_masters=False), OptimizerConfig(weight_decay=0.1))
    groups = [{"params": [p for p in plain.parameters() if (p.ndim > 1) == is_matrix]} for is_matrix in (True, False)]
    groups[1]["weight_decay"] = 0.0
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    set_lr(optimizer, 0.01)
    for _ in range(3):
        for net, one in ((ours, optimizer), (plain, theirs)):
            net.zero_grad()
            backward(net)
            one.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("most", [0.0, 1e-3, 1.0, 1e9])
def test_clip_is_pytorchs(most):
    net = model()
    backward(net)
    other = copy.deepcopy(net)
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        two.grad = one.grad.clone()
    want = nn.utils.clip_grad_norm_(other.parameters(), most or float("inf"))
    got = clip(Weights(net, with_masters=False), most)
    torch.testing.assert_close(got, want)
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_masters_keep_updates_that_bfloat16_would_lose():
    net = model()
    weights = Weights(net, with_masters=True)
    optimizer = make_optimizer(weights, OptimizerConfig(weight_decay=0.0))
    set_lr(optimizer, 1e-5)  # far below half of the distance between two bfloat16 numbers near 0.3
    before = {name: one.clone() for name, one in weights.trained.items()}
    assert all(torch.equal(one, before[name]) for name, one in model().named_parameters())
    for _ in range(3):
        backward(net, 0.5)
        weights.collect()
        backward(net, 0.5)
        weights.collect()
        optimizer.step()
        optimizer.zero_grad()
        weights.publish()
    for name, master in weights.trained.items():
        assert master.dtype == torch.float32
        assert not torch.equal(master, before[name])
        assert torch.equal(weights.used[name], master.bfloat16())


def test_micro_batches_add_up_in_float32():
    net, whole = model(torch.bfloat16), model(torch.bfloat16)
    weights = Weights(net, with_masters=True)
    for _ in range(3):
        backward(net)
        weights.collect()
    backward(whole)
    for name, weight in whole.named_parameters():
        assert torch.equal(weights.trained[name].grad, 3 * weight.grad.float())
