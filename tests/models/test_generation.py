"""With a KV cache: steps and chunks equal the full forward of `eager`, and `generate` gives the same tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from tests.models.tiny import DECODERS, GENERATORS, distance, padding, tokens

TOLERANCE = 4e-5
SEQLEN = 12
CHUNKS = {"steps": [5, *[1] * 7], "chunks": [2, 1, 6, 3]}  # the window is 4


def cache(kind, config, batch, encoder_seqlen=None):
    def one(length):
        return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=length)

    if encoder_seqlen is None:
        return one(SEQLEN + 5)
    return EncoderDecoderCache(one(SEQLEN + 5), one(encoder_seqlen))


def in_chunks(model, ids, mask, kind, lengths):
    """Logits of a decoder that is given `ids` a chunk at a time."""
    past, start, logits = cache(kind, model.config, len(ids)), 0, []
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    for length in lengths:
        end = start + length
        now = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        logits.append(model(ids[:, start:end], past_key_values=past, use_cache=True, **now).logits)
        start = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("lengths", CHUNKS.values(), ids=list(CHUNKS))
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left", "holes"])
@pytest.mark.parametrize("architecture", DECODERS, ids=str)
@torch.no_grad()
def test_chunks_equal_the_full_forward(architecture, side, kind, lengths):
    eager, fast = architecture.pair()
    ids, mask = tokens(2, SEQLEN), padding(2, SEQLEN, side)
    positions = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    expected = eager(ids, **positions).logits
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert distance(in_chunks(fast, ids, mask, kind, lengths)[real], expected[real]) < TOLERANCE


@pytest.mark.parametrize("lengths", CHUNKS.values(), ids=list(CHUNKS))
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("architecture", [one for one in GENERATORS if one.kind == "seq2seq"], ids=str)
@torch.no_grad()
def test_chunks_of_a_decoder_with_an_encoder_equal_the_full_forward(architecture, kind, lengths):
    eager, fast = architecture.pair()
    given = {"input_ids": tokens(2, 9), "attention_mask": padding(2, 9, "right")}
    ids = tokens(2, SEQLEN, seed=2)
    expected = eager(**given, decoder_input_ids=ids).logits
    encoded = fast.get_encoder()(**given)
    past, start, logits = cache(kind, fast.config, 2, 9), 0, []
    for length in lengths:
        now = {"encoder_outputs": encoded, "attention_mask": given["attention_mask"], "past_key_values": past}
        logits.append(fast(decoder_input_ids=ids[:, start : start + length], use_cache=True, **now).logits)
        start += length
    assert distance(torch.cat(logits, dim=1), expected) < TOLERANCE


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=["dynamic", "static", "beams"]
)
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("architecture", GENERATORS, ids=str)
def test_generate_gives_the_tokens_of_eager(architecture, side, options):
    eager, fast = architecture.pair()
    mask = padding(2, 9, "ones" if side == "none" else side)
    given = {"input_ids": tokens(2, 9), "attention_mask": mask, "max_new_tokens": 9, "do_sample": False, **options}
    assert fast.generate(**given).tolist() == eager.generate(**given).tolist()


def test_a_static_cache_is_read_only_as_far_as_it_is_filled():
    """What lies beyond, here NaN, never reaches the logits."""
    eager, fast = DECODERS[0].pair()
    ids = tokens(2, 6)
    past = StaticCache(config=fast.config, max_cache_len=16)
    with torch.no_grad():
        fast(ids[:, :3], past_key_values=past, use_cache=True)
        for layer in past.layers:
            layer.keys[:, :, 3:], layer.values[:, :, 3:] = 1e30, 1e30
        got = fast(ids[:, 3:], past_key_values=past, use_cache=True).logits
        assert distance(got, eager(ids).logits[:, 3:]) < TOLERANCE
