"""torch.compile takes accelerated models whole: forward and backward in one graph, decoding without recompiling."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache

from tests.models.tiny import (
    ARCHITECTURES,
    DECODERS,
    distance,
    inputs,
    logits_and_gradients,
    padding,
    real_positions,
    tokens,
)

TOLERANCE = 4e-5
QUICK = {"llama": ("none", "left", "packed"), "t5": ("none",)}
CASES = [
    pytest.param(one, side, id=f"{one}-{side}", marks=() if side in QUICK.get(one.name, ()) else pytest.mark.slow)
    for one in ARCHITECTURES
    if one.name != "gpt_oss"  # the experts of transformers 5.17 read tensors while they are traced
    for side in (("none", "left", "right", "packed") if one.kind == "decoder" else ("none", "left", "right"))
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("architecture", "side"), CASES)
def test_one_graph_equals_eager_with_gradients(architecture, side):
    eager, fast = architecture.pair()
    given = inputs(architecture, side="none" if side == "packed" else side)
    if side == "packed":
        rows = [torch.cat([torch.arange(4), torch.arange(7)]), torch.arange(11)]
        given["position_ids"] = torch.stack(rows)
    options = {} if architecture.kind == "encoder" else {"use_cache": False}
    real = real_positions(architecture, given)
    expected, expected_gradients = logits_and_gradients(eager, given, real, **options)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    got, gradients = logits_and_gradients(compiled, given, real, **options)
    assert distance(got, expected) < TOLERANCE
    scale = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (gradients[f"_orig_mod.{name}"] - gradient).abs().max() < TOLERANCE * scale, name


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("architecture", [one for one in DECODERS if one.name in ("llama", "mistral")], ids=str)
@torch.no_grad()
def test_decoding_is_compiled_a_fixed_number_of_times(architecture, kind):
    eager, fast = architecture.pair()
    ids = tokens(2, 12)
    past = StaticCache(config=fast.config, max_cache_len=16) if kind == "static" else DynamicCache(config=fast.config)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(fast, backend=counter, fullgraph=True)
    logits = [fast(ids[:, :4], past_key_values=past, use_cache=True).logits]
    for position in range(4, 12):
        logits.append(compiled(ids[:, position : position + 1], past_key_values=past, use_cache=True).logits)
    assert distance(torch.cat(logits, dim=1), eager(ids).logits) < TOLERANCE
    assert counter.frame_count <= 2


@pytest.mark.parametrize("side", ["ones", "left"])
def test_a_prepared_mask_of_a_static_cache_enters_the_graph_without_recompiling(side):
    eager, fast = DECODERS[0].pair()
    given = {"input_ids": tokens(2, 9), "attention_mask": padding(2, 9, side), "max_new_tokens": 9}
    given |= {"do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = eager.generate(**given)
    counter = CompileCounterWithBackend("eager")
    fast.forward = torch.compile(fast.forward, backend=counter)
    assert fast.generate(**given).tolist() == expected.tolist()
    assert counter.frame_count <= 2
