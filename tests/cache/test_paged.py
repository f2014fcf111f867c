"""The tensors of the pools: kinds of layers found, pages written and copied, sizes told when they do not fit."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hasten.cache.paged import Kind, PagedCache, Tables, kinds_of, layers_of, page_bytes
from hasten.cache.pages import Copy
from hasten.errors import ArgumentError
from tests.models.tiny import ARCHITECTURES, VOCAB, WINDOW

BY_NAME = {one.name: one for one in ARCHITECTURES}
FULL, SLIDING = Kind(None, 2, 8, 8), Kind(WINDOW - 1, 2, 8, 8)


def cache(layers=(FULL, SLIDING, FULL), num_pages=(5, 3)):
    return PagedCache(layers, num_pages, 16, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", [FULL, FULL]),
        ("mistral", [SLIDING, SLIDING]),
        ("gemma2", [SLIDING, FULL, SLIDING]),
        ("gpt_neox", [Kind(None, 4, 8, 8)] * 2),
    ],
)
def test_the_kinds_of_layers_are_found(name, layers):
    assert layers_of(BY_NAME[name].build()) == layers


def test_models_without_such_layers_are_refused():
    with pytest.raises(ArgumentError, match="model: expected a decoder-only model, got T5ForConditionalGeneration"):
        layers_of(BY_NAME["t5"].build())


def test_a_model_that_ignores_the_cache_is_refused():
    class Forgetful(GPT2LMHeadModel):
        def forward(self, *args, past_key_values=None, **options):
            return super().forward(*args, **options)

    model = Forgetful(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1)).eval()
    with pytest.raises(ArgumentError, match="model: expected a model that uses the cache it is given, got Forgetful"):
        layers_of(model)


def test_layers_of_one_kind_share_a_pool_and_its_null_page():
    paged = cache()
    assert paged.kinds == (FULL, SLIDING) == kinds_of([FULL, SLIDING, FULL])
    assert [layer.kind for layer in paged.layers] == [0, 1, 0]
    assert [tuple(layer.key_pages.shape) for layer in paged.layers] == [(6, 16, 2, 8), (4, 16, 2, 8), (6, 16, 2, 8)]
    assert paged.nbytes == 2 * 4 * 16 * 2 * 8 * (2 * 6 + 4)
    assert page_bytes([FULL, SLIDING, FULL], FULL, 16, torch.float32) == 2 * (2 * 16 * 2 * 8) * 4
    assert all(not pool.any() for pool in [pool for pools in paged.pools for pool in pools])
    ledger = paged.ledger()
    assert ledger.num_free == (5, 3) and ledger.windows == (None, WINDOW - 1)


def test_what_is_written_is_where_the_tables_say():
    layer = cache().layers[2]  # the second of two layers of its kind
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    pages, offsets = torch.tensor([4, 2, 0]), torch.tensor([15, 0, 7])
    tables = Tables(torch.tensor([[4, 2]], dtype=torch.int32), pages * 2 * 16 + offsets)
    layer.write(tables.rows, k, v)
    assert torch.equal(layer.key_pages[pages, offsets], k) and torch.equal(layer.value_pages[pages, offsets], v)
    assert not cache().layers[0].key_pages.any() and layer.key_pages.count_nonzero() == k.numel()
    for buffers in (None, (torch.empty(2, 16, 2, 8), torch.empty(2, 16, 2, 8))):
        keys, values = layer.gather(torch.tensor([2, 4]), buffers)
        assert torch.equal(keys, layer.key_pages[[2, 4]]) and torch.equal(values, layer.value_pages[[2, 4]])
    view = layer.view(tables, torch.tensor([17], dtype=torch.int32))
    assert view.keys is layer.key_pages and view.capacity == 32


def test_copies_read_all_before_they_write():
    paged = cache()
    for pool in [pool for pools in paged.pools for pool in pools]:
        pool += torch.arange(len(pool)).view(-1, 1, 1, 1, 1)
    paged.copy([[Copy(1, 2), Copy(2, 3)], []])
    assert paged.pools[0][0][:, 0, 0, 0, 0].tolist() == [0, 1, 1, 2, 4, 5]
    assert paged.pools[0][1][:, 1, 3, 1, 2].tolist() == [0, 1, 1, 2, 4, 5]
    assert paged.pools[1][0][:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_pages_of_8_bits_have_scales_which_are_copied_too(stored):
    paged = PagedCache([FULL, SLIDING, FULL], (5, 3), 16, torch.float32, "cpu", stored)
    assert paged.is_quantized and paged.page_nbytes[0] == page_bytes([FULL, SLIDING, FULL], FULL, 16, stored)
    view = paged.layers[2].view(Tables(torch.zeros(1, 1, dtype=torch.int32)), torch.ones(1, dtype=torch.int32))
    assert view.keys.dtype == stored and view.key_scales.shape == (6, 16, 2)
    for pool in paged.pools[0]:
        pool[1] = 3
    paged.copy([[Copy(1, 2)], []])
    assert all(bool((pool[2].float() == 3).all()) for pool in paged.pools[0])


def test_sizes_that_cannot_be_are_told():
    with pytest.raises(ArgumentError, match=r"page_size: expected one of .16, 32, 64, 128, 256., got 5"):
        PagedCache([FULL], [4], 5, torch.float32, "cpu")
    with pytest.raises(ArgumentError, match=r"num_pages: expected pages that fit in memory, got .* GiB are free"):
        PagedCache([FULL], [2**42], 16, torch.float32, "cpu")
