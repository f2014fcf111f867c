"""Our Longformer layer is the paper's, written out as matrices: windows, dilation, causality, global tokens."""

from __future__ import annotations

import pytest
import torch

from hasten.errors import ArgumentError
from hasten.models import LongformerSelfAttention, Tokens, read_tokens
from tests.models.longformers import MASKS, codes, truth

BATCH, SEQLEN, HIDDEN, HEADS = 3, 29, 24, 3
TOLERANCE = 5e-6


def layer_of(window=6, **options):
    torch.manual_seed(0)
    made = LongformerSelfAttention(HIDDEN, HEADS, window, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 1.5 * HIDDEN**-0.5)
    return made.eval()


def inputs(seqlen=SEQLEN):
    return torch.randn(BATCH, seqlen, HIDDEN, generator=torch.Generator().manual_seed(1))


def tokens_of(name, seqlen=SEQLEN, **options):
    return read_tokens(codes(name, BATCH, seqlen), batch=BATCH, seqlen=seqlen, device=torch.device("cpu"), **options)


def expected(layer, hidden_states, name, causal=False):
    dilation = torch.as_tensor(layer.pattern.dilation).expand(HEADS)
    side = layer.pattern.window // 2
    made = codes(name, BATCH, hidden_states.shape[1])
    return truth(layer, hidden_states, made, side, 0 if causal else side, dilation, causal)


def with_gradients(layer, hidden_states, compute):
    hidden_states = hidden_states.clone().requires_grad_()
    layer.zero_grad()
    out = compute(hidden_states)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    parameters = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return out.detach(), {"hidden_states": hidden_states.grad, **parameters}


def assert_equal(layer, hidden_states, name, tokens, run=None, causal=False):
    run = run or layer
    out, gradients = with_gradients(layer, hidden_states, lambda x: run(x, tokens))
    wanted, wanted_gradients = with_gradients(layer, hidden_states, lambda x: expected(layer, x, name, causal))
    assert (out - wanted).abs().max() < TOLERANCE
    scale = max(gradient.abs().max() for gradient in wanted_gradients.values() if gradient is not None)
    for key, gradient in wanted_gradients.items():
        got = torch.zeros(1) if gradients[key] is None else gradients[key]
        assert (got - (0.0 if gradient is None else gradient)).abs().max() < TOLERANCE * scale, key


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("capacity", [None, SEQLEN])
def test_every_mask_with_gradients(name, capacity):
    layer = layer_of()
    assert_equal(layer, inputs(), name, tokens_of(name, global_capacity=capacity))


@pytest.mark.parametrize("name", ["plain", "right", "different_right"])
@pytest.mark.parametrize("dilation", [2, (1, 2, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_dilation_and_causality(name, dilation, causal):
    layer = layer_of(dilation=dilation, is_causal=causal)
    assert_equal(layer, inputs(), name, tokens_of(name), causal=causal)


@pytest.mark.parametrize("seqlen", [1, 17, 63, 130])
@pytest.mark.parametrize("window", [2, 64, 512])
def test_any_length(seqlen, window):
    layer = layer_of(window)
    assert_equal(layer, inputs(seqlen), "one_global", tokens_of("one_global", seqlen))


@pytest.mark.parametrize("capacity", [0, 5])
def test_a_capacity_that_is_not_filled(capacity):
    name = "plain" if capacity == 0 else "different"
    layer = layer_of(is_causal=capacity == 0)
    tokens = tokens_of(name, global_capacity=capacity)
    assert_equal(layer, inputs(), name, tokens, causal=capacity == 0)


def test_no_tokens_means_that_all_are_local():
    layer = layer_of()
    assert torch.equal(layer(inputs()), layer(inputs(), Tokens()))


def test_global_projections_get_zeros_where_nothing_is_global():
    layer = layer_of().train()
    layer(inputs()).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert layer.query_global.weight.grad.abs().max() == 0.0


def test_dropout_is_on_in_training_only_and_keeps_the_mean():
    layer = layer_of(dropout=0.3)
    plain, tokens = layer_of()(inputs()), tokens_of("different")
    assert torch.equal(layer(inputs()), plain)
    layer.train()
    x = inputs()
    torch.manual_seed(3)
    outs = torch.stack([layer(x, tokens) for _ in range(40)])
    spread = outs.std(0) / 40**0.5
    assert (outs.mean(0) - layer.eval()(x, tokens)).abs().max() < 6 * spread.max()
    assert spread.max() > 1e-3


@pytest.mark.parametrize(("name", "capacity"), [("different_right", None), ("different_right", 4), ("plain", 0)])
def test_forward_and_backward_are_one_graph(name, capacity):
    torch._dynamo.reset()
    layer = layer_of()
    made = codes(name, BATCH, SEQLEN)

    def run(hidden_states, mask):
        device, (batch, seqlen) = hidden_states.device, mask.shape
        tokens = read_tokens(mask, batch=batch, seqlen=seqlen, device=device, global_capacity=capacity)
        return layer(hidden_states, tokens)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_equal(layer, inputs(), name, made, run=compiled)
    torch._dynamo.reset()


def test_bad_arguments_are_named():
    with pytest.raises(ArgumentError, match="attention_window: expected an even number, got 7"):
        LongformerSelfAttention(8, 2, 7)
    with pytest.raises(ArgumentError, match="attention_window: expected an int >= 1, got 0"):
        LongformerSelfAttention(8, 2, 0)
    with pytest.raises(ArgumentError, match="hidden_size: expected a multiple of 3 heads"):
        LongformerSelfAttention(8, 3, 4)
    with pytest.raises(ArgumentError, match="dilation: expected one value, or one for each of 2 heads"):
        LongformerSelfAttention(8, 2, 4, dilation=(1, 2, 3))
    with pytest.raises(ArgumentError, match="global_capacity: expected 0 in a causal layer"):
        layer_of(is_causal=True)(inputs(), tokens_of("one_global", global_capacity=2))
