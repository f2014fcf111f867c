"""FLOPs of a step by both conventions, against the books' formulas."""

from __future__ import annotations

import pytest
import torch
import transformers

from hasten.train.flops import step_flops


def gpt2(**sizes):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**sizes))


def test_gpt2_by_both_conventions():
    model, weights, tokens = gpt2(), 124_439_808 - 1024 * 768, 8 * 1024
    found = step_flops(model, 8, 1024)
    assert found.palm == pytest.approx((6 * weights + 12 * 12 * 768 * 1024) * tokens, rel=1e-9)
    assert found.exact == pytest.approx((6 * weights + 6 * 12 * 768 * 1025) * tokens, rel=1e-9)
    assert step_flops(model, 8, 1024, is_causal=False).exact == found.palm


def test_an_input_table_that_is_not_the_output_one_is_not_counted():
    tied, apart = (step_flops(gpt2(n_layer=1, tie_word_embeddings=is_tied), 1, 64) for is_tied in (True, False))
    assert tied == apart
