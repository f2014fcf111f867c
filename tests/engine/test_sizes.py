"""How many pages an engine takes, and where sequences end."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Phi3Config

from hasten.cache.paged import Kind
from hasten.engine import sizes
from hasten.errors import ArgumentError

FULL, SLIDING = Kind(None, 2, 8, 8), Kind(100, 2, 8, 8)
PAGE = 2 * 16 * 2 * 8 * 4  # bytes of a page of one layer
CPU = torch.device("cpu")


def pages(layers, context=1024, max_running=4, max_batch_tokens=32, **options):
    asked = {"wanted": None, "memory_bytes": None, **options}
    return sizes.num_pages(
        layers,
        16,
        torch.float32,
        CPU,
        context=context,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        **asked,
    )


def test_a_number_of_pages_is_taken_as_it_is():
    assert pages([FULL, FULL], wanted=7) == [7]
    assert pages([FULL], wanted=70_000) == [70_000]


def test_windows_take_what_they_can_use():
    most = 4 * (7 + 2) + 2
    assert pages([SLIDING, FULL], wanted=20) == [20, 20]
    assert pages([SLIDING, FULL], wanted=200) == [most, 200]


def test_memory_is_shared_by_pages_until_a_kind_has_enough():
    assert pages([FULL, FULL], memory_bytes=2 * PAGE * 10) == [9]  # one is the page that nobody gets
    assert pages([FULL, SLIDING], memory_bytes=2 * PAGE * 21) == [20, 20]
    most = 4 * (7 + 2) + 2
    assert pages([FULL, SLIDING], memory_bytes=2 * PAGE + PAGE * (most + 100)) == [100, most]


def test_no_more_is_taken_than_sequences_can_use():
    assert pages([FULL], memory_bytes=2**40) == [4 * 64]
    assert pages([FULL], context=40) == [4 * 3]


@pytest.mark.parametrize("memory_bytes", [0, PAGE, 2 * PAGE - 1])
def test_memory_for_no_page_is_refused(memory_bytes):
    with pytest.raises(ArgumentError, match="memory_bytes: expected room for at least a page"):
        pages([FULL], memory_bytes=memory_bytes)


def test_pages_and_memory_contradict_each_other():
    with pytest.raises(ArgumentError, match="memory_bytes: expected nothing beside num_pages, got 5"):
        pages([FULL], wanted=3, memory_bytes=5)


def test_sequences_end_where_the_context_ends_or_longrope_changes():
    assert sizes.longest(LlamaConfig(max_position_embeddings=99)) == 99
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope["original_max_position_embeddings"] = 32
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = Phi3Config(max_position_embeddings=64, original_max_position_embeddings=32, rope_parameters=rope, **small)
    assert sizes.longest(config) == 32
