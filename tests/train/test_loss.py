"""Both cross-entropies against PyTorch's own over whole float32 logits, gradients included, at odd sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hasten.train import loss as module
from hasten.train.loss import IGNORED, cross_entropy, linear_cross_entropy


def problem(tokens, hidden_size=7, vocab=11, dtype=torch.float32):
    hidden = torch.randn(tokens, hidden_size).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden_size).to(dtype).requires_grad_()
    bias = torch.randn(vocab).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,))
    labels[::3] = IGNORED
    return hidden, weight, bias, labels


def plain(hidden, weight, bias, labels, softcap=None):
    logits = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss * 0.3, [one for one in inputs if one is not None])


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "softcap"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("tokens", [1, 2, 17, 33])
def test_linear_cross_entropy_is_the_plain_one(tokens, chunk, with_bias, softcap):
    hidden, weight, bias, labels = problem(tokens)
    bias = bias if with_bias else None
    want = plain(hidden, weight, bias, labels, softcap)
    got = linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=softcap, chunk_tokens=chunk)
    torch.testing.assert_close(got, want)
    wanted = gradients(want, hidden, weight, bias)
    for one, other in zip(gradients(got, hidden, weight, bias), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_is_the_plain_one(dtype, chunk):
    logits = torch.randn(3, 7, 19).mul(3).to(dtype).requires_grad_()
    labels = torch.randint(19, (3, 7))
    labels[1, :3] = IGNORED
    want = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)
    got = cross_entropy(logits, labels, chunk_tokens=chunk)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(gradients(one, logits)[0] for one in (got, want)))


def test_bf16_is_as_near_to_float32_as_pytorchs_bf16():
    hidden, weight, _, labels = problem(300, 64, 101, torch.bfloat16)
    exact = plain(hidden, weight, None, labels)
    wanted = gradients(exact, hidden, weight)
    pytorch = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum", ignore_index=IGNORED)
    ours = linear_cross_entropy(hidden, weight, labels, chunk_tokens=64)
    assert abs(ours - exact) <= 2 * abs(pytorch.float() - exact) + 1e-5 * exact
    for one, other, want in zip(
        gradients(ours, hidden, weight), gradients(pytorch, hidden, weight), wanted, strict=True
    ):
        assert (one - want).norm() <= 2 * (other - want).norm() + 1e-6 * want.norm()


def test_under_autocast_the_gradient_of_the_weight_is_summed_in_float32():
    hidden, weight, _, labels = problem(200, 16, 31)
    want = torch.autograd.grad(plain(hidden, weight, None, labels), weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, labels, chunk_tokens=3)
    grad = torch.autograd.grad(got, weight)[0]
    assert grad.dtype == torch.float32
    assert (grad - want).norm() < 0.01 * want.norm()


def test_nothing_to_count_is_zero_with_zero_gradients():
    hidden, weight, _, labels = problem(5)
    got = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED))
    assert got == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(got, [hidden, weight]))


def test_logits_are_never_whole_and_no_gradient_is_made_for_nobody(monkeypatch):
    shapes = []
    own = F.linear
    monkeypatch.setattr(module.F, "linear", lambda *given: shapes.append(given[0].shape[0]) or own(*given))
    monkeypatch.setattr(module, "_slopes", lambda *given: pytest.fail("gradients nobody asked for"))
    hidden, weight, _, labels = problem(10)
    with torch.no_grad():
        linear_cross_entropy(hidden.view(2, 5, 7), weight, labels.view(2, 5), chunk_tokens=4)
    assert shapes == [4, 4, 2]


# dynamo itself makes an instance of the Function while it traces apply()
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_both_compile_into_one_graph():
    hidden, weight, _, labels = problem(9)

    def both(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, chunk_tokens=4) + cross_entropy(hidden @ weight.T, labels)

    want = gradients(both(hidden, weight), hidden, weight)
    got = gradients(torch.compile(both, backend="aot_eager", fullgraph=True)(hidden, weight), hidden, weight)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
