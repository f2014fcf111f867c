"""One token over a cache equals the oracle over the same keys, for every feature a layer may ask."""

from __future__ import annotations

import pytest
import torch

from hasten import Window
from hasten.cache import KVCache
from hasten.engine.attend import attend, attend_encoder
from hasten.ops.attention import attention

HEADS, HEAD_DIM = 6, 8


def filled(length, num_kv_heads, dtype=torch.float32):
    cache = KVCache(length + 1)
    shape = (2, num_kv_heads, length, HEAD_DIM)
    cache.update(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), 0)
    return cache


def expected(cache, query, bias=None, **options):
    """The reference over all that the cache holds."""
    layer = cache.layers[0]
    q, k, v = (each.double().transpose(1, 2) for each in (query, layer.keys, layer.values))
    bias = None if bias is None else bias[..., : layer.length].double()
    return attention(q, k, v, bias=bias, implementation="reference", **options)


def run(length, num_kv_heads, dtype=torch.float32, bias=None, sinks=None, left=None, softcap=None):
    """(got, expected)"""
    cache = filled(length, num_kv_heads, dtype)
    query = torch.randn(2, HEADS, 1, HEAD_DIM).to(dtype)
    new = [torch.randn(2, num_kv_heads, 1, HEAD_DIM).to(dtype) for _ in range(2)]
    got = attend(cache, 0, query, *new, bias, sinks, 0.3, left, softcap)
    assert got.shape == (2, 1, HEADS, HEAD_DIM) and got.dtype == dtype
    assert cache.length == length + 1 and torch.equal(cache.layers[0].keys[:, :, -1:], new[0])
    mask = None if left is None else Window(left, 0)
    return got, expected(cache, query, bias, mask=mask, softmax_scale=0.3, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("length", [1, 16, 17, 129])
@pytest.mark.parametrize("num_kv_heads", [6, 3, 2, 1])
def test_groups(length, num_kv_heads):
    torch.testing.assert_close(*(each.float() for each in run(length, num_kv_heads)), atol=1e-6, rtol=1e-5)


FEATURES = {
    "window": {"left": 4},
    "window_of_nothing": {"left": 0},
    "window_beyond": {"left": 40},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 1, HEADS)},
    "bias": {"bias": torch.linspace(-3, 3, HEADS * 64).reshape(1, HEADS, 1, 64)},
    "bias_and_softcap": {"bias": torch.linspace(-3, 3, HEADS * 64).reshape(1, HEADS, 1, 64), "softcap": 2.0},
    "window_and_softcap": {"left": 3, "softcap": 2.0},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature):
    torch.testing.assert_close(*(each.float() for each in run(17, 2, **FEATURES[feature])), atol=2e-6, rtol=1e-5)


def test_window_with_bias_takes_the_bias_of_its_own_keys():
    bias = torch.randn(1, HEADS, 1, 64)
    got, want = run(17, 2, bias=bias, left=4)
    torch.testing.assert_close(got, want.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact_as_its_storage(dtype):
    got, want = run(33, 2, dtype)
    assert (got.double() - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()


def test_over_an_encoder():
    cache = filled(9, 2)
    query = torch.randn(2, HEADS, 1, HEAD_DIM)
    got = attend_encoder(cache, 0, query, None, None, 0.3, None)
    assert cache.length == 9
    torch.testing.assert_close(got, expected(cache, query, softmax_scale=0.3).float(), atol=1e-6, rtol=1e-5)


def test_what_is_not_filled_is_never_read():
    cache = filled(5, 2)
    cache.layers[0].key_buffer[:, :, 6:], cache.layers[0].value_buffer[:, :, 6:] = float("nan"), float("nan")
    query, new = torch.randn(2, HEADS, 1, HEAD_DIM), torch.randn(2, 2, 1, HEAD_DIM)
    assert attend(cache, 0, query, new, new, None, None, 0.3, None, None).isfinite().all()
