"""Accelerated models on a GPU: the Triton kernels under every architecture, and CUDA graphs of a compiled model."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny import (
    ARCHITECTURES,
    DECODERS,
    GENERATORS,
    distance,
    inputs,
    logits_and_gradients,
    padding,
    real_positions,
    tokens,
)

pytestmark = pytest.mark.gpu

TOLERANCE = 4e-5


def on_gpu(given):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


@pytest.mark.parametrize("side", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_logits_and_gradients_equal_eager(architecture, side):
    eager, fast = (model.cuda() for model in architecture.pair())
    given = on_gpu(inputs(architecture, side=side))
    real = real_positions(architecture, given)
    expected, expected_gradients = logits_and_gradients(eager, given, real)
    got, gradients = logits_and_gradients(fast, given, real)
    assert distance(got, expected) < TOLERANCE
    scale = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() < TOLERANCE * scale, name


# rounding to bfloat16 sends tokens of GPT-OSS to other experts
@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if one.name != "gpt_oss"], ids=str)
def test_bfloat16_is_no_worse_than_eager(architecture):
    given = on_gpu(inputs(architecture, side="right"))
    real = real_positions(architecture, given)
    exact, _ = logits_and_gradients(architecture.build().cuda(), given, real)
    eager, fast = (model.cuda() for model in architecture.pair(torch.bfloat16))
    ours = (logits_and_gradients(fast, given, real)[0] - exact).abs()
    theirs = (logits_and_gradients(eager, given, real)[0] - exact).abs()
    assert ours.mean() < 1.5 * theirs.mean()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("architecture", GENERATORS, ids=str)
def test_generate_gives_the_tokens_of_eager(architecture, options):
    eager, fast = (model.cuda() for model in architecture.pair())
    given = on_gpu({"input_ids": tokens(2, 9), "attention_mask": padding(2, 9, "left")})
    # compiling a model of each kind takes minutes; the compiled step has its own test below
    given |= {"max_new_tokens": 9, "do_sample": False, "disable_compile": True, **options}
    assert fast.generate(**given).tolist() == eager.generate(**given).tolist()


@pytest.mark.filterwarnings("ignore:TensorFloat32")  # inductor's advice; float32 is what is compared here
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # inductor begins with an empty one of its own
@pytest.mark.parametrize("architecture", [one for one in DECODERS if one.name in ("llama", "gpt2")], ids=str)
def test_cuda_graphs_of_a_compiled_model_equal_eager(architecture):
    """mode="reduce-overhead" replays graphs from the third call on; training and inference."""
    torch._dynamo.reset()
    eager, fast = (model.cuda() for model in architecture.pair())
    compiled = torch.compile(fast, mode="reduce-overhead", fullgraph=True)
    for number in range(4):
        given = {"input_ids": tokens(2, 16, seed=number).cuda(), "use_cache": False}
        torch.compiler.cudagraph_mark_step_begin()
        assert distance(compiled(**given).logits.detach(), eager(**given).logits) < TOLERANCE
        torch.compiler.cudagraph_mark_step_begin()
        fast.zero_grad()
        compiled(**given).logits.square().mean().backward()
        eager.zero_grad()
        eager(**given).logits.square().mean().backward()
        scale = max(parameter.grad.abs().max() for parameter in eager.parameters())
        for got, want in zip(fast.parameters(), eager.parameters(), strict=True):
            assert (got.grad - want.grad).abs().max() < TOLERANCE * scale
