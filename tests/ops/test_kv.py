"""Views of a KV cache, the write into them, the common prefix: in PyTorch, in the interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hasten.errors import ArgumentError, ArgumentTypeError
from hasten.ops import append
from hasten.ops.append import append_kv, quantize
from hasten.ops.kv import KV, ContiguousKV, PagedKV, RingKV, common_prefix, rows_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
KINDS = ("paged", "contiguous", "ring")
LENGTHS = (5, 0, 40, 17)
CPU = pytest.param("cpu", id="pytorch")
INTERPRETER = pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreter)
GPU = pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)


def view(kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> KV:
    """A cache of four sequences, heads 3, head_dim 24, head_dim_v 20, everything in it 1."""
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    shape = {"paged": (20, 16), "contiguous": (4, 64), "ring": (4, 24)}[kind]
    k, v = (torch.ones(*shape, 3, dim, device=device).to(dtype) for dim in (24, 20))
    scales = [None, None] if dtype.itemsize > 1 else [torch.ones(*shape, 3, device=device) for _ in range(2)]
    if kind == "paged":
        table = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:16].view(4, 4).int().to(device)
        return PagedKV(k, v, table, lengths, *scales)
    return (RingKV if kind == "ring" else ContiguousKV)(k, v, lengths, *scales)


def new_tokens(*rows: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.randn(*rows, 3, 24).to(device), torch.randn(*rows, 3, 20).to(device)


@pytest.mark.parametrize("device", [CPU, INTERPRETER, GPU])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_written_where_they_are_read(kind, device):
    keys = view(kind, device=device)
    k, v = new_tokens(4, 5, device=device)
    append_kv(k, v, keys)
    for number, length in enumerate(LENGTHS):
        first = max(0, length - 5)
        got_k, got_v = rows_of(keys, number, first, length, torch.float32)
        assert torch.equal(got_k, k[number, 5 - (length - first) :])
        assert torch.equal(got_v, v[number, 5 - (length - first) :])
    written = sum(min(5, length) for length in LENGTHS)
    assert int((keys.keys != 1).any(-1).sum()) == 3 * written, "nothing else is touched, rows of padding least of all"


@pytest.mark.parametrize("device", [CPU, INTERPRETER, GPU])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_tokens_are_written_too(kind, device):
    keys, dense = view(kind, device=device), view(kind, device=device)
    k, v = new_tokens(10, device=device)
    append_kv(k, v, keys, cu_seqlens_q=torch.tensor([0, 3, 3, 8, 10], dtype=torch.int32, device=device))
    for number, (start, end) in enumerate(((0, 3), (3, 3), (3, 8), (8, 10))):
        length = LENGTHS[number]
        got, _ = rows_of(keys, number, length - (end - start), length, torch.float32)
        assert torch.equal(got, k[start:end])
    assert int((keys.keys != dense.keys).any(-1).sum()) == 30


@pytest.mark.parametrize("device", [CPU, INTERPRETER, GPU])
def test_positions_outside_are_not_written(device):
    keys = replace(view("contiguous", device=device), cache_seqlens=torch.tensor([66, 1, 0, 64]).int().to(device))
    k, v = new_tokens(4, 3, device=device)
    append_kv(k, v, keys)
    assert int((keys.keys != 1).any(-1).sum()) == 3 * (1 + 1 + 0 + 3)
    ring = replace(view("ring", device=device), cache_seqlens=torch.tensor([100, 0, 0, 0]).int().to(device))
    k, v = new_tokens(4, 60, device=device)
    append_kv(k, v, ring)
    assert torch.equal(rows_of(ring, 0, 76, 100, torch.float32)[0], k[0, -24:]), "the last tokens of a ring win"


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.int8, id="int8-pytorch"),
        pytest.param("cpu", torch.float8_e4m3fn, id="fp8-pytorch"),
        pytest.param("cpu", torch.int8, id="int8-interpreter", marks=pytest.mark.interpreter),  # it rounds fp8 wrongly
        pytest.param("cuda", torch.int8, id="int8-gpu", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float8_e4m3fn, id="fp8-gpu", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("fixed", [False, True], ids=["measured", "fixed"])
def test_eight_bits_are_those_of_quantize(fixed, device, dtype):
    keys, want = view("paged", dtype, device), view("paged", dtype, device)
    if fixed:
        shared = torch.full((1, 1, 1), 0.01, device=device).expand(keys.keys.shape[:3])
        keys, want = (replace(each, key_scales=shared, value_scales=shared) for each in (keys, want))
    k, v = new_tokens(4, 2, device=device)
    k[0, 0] = 0.0
    append_kv(k, v, keys, fixed_scales=fixed)
    append._write_plain(k, v, want, None, fixed)
    for got, exact in ((keys.keys, want.keys), (keys.values, want.values), (keys.key_scales, want.key_scales)):
        assert torch.equal(got.float(), exact.float())


@pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 2.0**-4)])
def test_quantize_errs_by_half_a_step(dtype, most):
    rows = torch.randn(50, 3, 64)
    stored, scales = quantize(rows, dtype)
    assert scales.shape == (50, 3) and stored.dtype == dtype
    error = (stored.float() * scales[..., None] - rows).abs().amax(-1)
    assert (error <= 1.001 * most * rows.abs().amax(-1)).all()
    zeros, scale = quantize(torch.zeros(1, 8), dtype)
    assert not zeros.float().any() and not scale.any()


@pytest.mark.parametrize("kind", KINDS)
def test_append_compiles_to_one_graph(kind):
    keys, want = view(kind), view(kind)
    k, v = new_tokens(4, 1)
    torch.compile(lambda k, v: append_kv(k * 2.0, v, keys), fullgraph=True, backend="aot_eager")(k, v)
    append_kv(k * 2.0, v, want)
    assert torch.equal(keys.keys, want.keys) and torch.equal(keys.values, want.values)


def test_opcheck_of_append():
    keys = view("paged", torch.int8)
    terms = (keys.keys, keys.values, keys.block_table, keys.cache_seqlens, keys.key_scales, keys.value_scales)
    torch.library.opcheck(append._operator, (*new_tokens(4, 2), *terms, None, "paged", False))


def test_views_know_their_sizes():
    paged, ring = view("paged"), view("ring")
    assert (paged.page_size, paged.capacity, paged.batch) == (16, 64, 4)
    assert (ring.capacity, ring.batch, ring.kind) == (24, 4, "ring")


def test_rows_of_a_contiguous_cache_are_views():
    keys = view("contiguous")
    k, v = rows_of(keys, 2, 3, 40, torch.float32)
    assert k.data_ptr() == keys.keys[2, 3].data_ptr() and v.data_ptr() == keys.values[2, 3].data_ptr()


@pytest.mark.parametrize(
    ("table", "lengths", "want"),
    [
        ([[3, 4, 5], [3, 4, 6]], [40, 40], 32),
        ([[3, 4, 5], [3, 4, 5]], [48, 48], 32),  # the last page is still written to
        ([[3, 4, 5], [3, 4, 5]], [48, 20], 16),
        ([[3, 4, 5], [9, 4, 5]], [48, 48], 0),
        ([[3, 4, 5]], [48], 0),
        ([[3, 4, 5], [3, 4, 6], [0, 0, 0]], [40, 40, 0], 32),  # a row of padding
        ([[0, 0, 0], [3, 4, 6], [3, 4, 6]], [0, 40, 40], 0),
    ],
)
def test_the_common_prefix_is_whole_pages_that_nobody_writes_to(table, lengths, want):
    assert common_prefix(table, lengths, 16) == want
    assert common_prefix(torch.tensor(table), torch.tensor(lengths), 16) == want


def test_the_common_prefix_is_never_read_back_from_a_device():
    with pytest.raises(ArgumentError, match="block_table: expected a list or a CPU tensor"):
        common_prefix(torch.zeros(2, 3, device="meta"), [1, 2], 16)


GOOD = {
    "key_pages": torch.zeros(4, 16, 2, 8),
    "value_pages": torch.zeros(4, 16, 2, 8),
    "block_table": torch.zeros(3, 2, dtype=torch.int32),
    "cache_seqlens": torch.zeros(3, dtype=torch.int32),
}
EIGHT = {"key_pages": torch.zeros(4, 16, 2, 8).to(torch.int8), "value_pages": torch.zeros(4, 16, 2, 8).to(torch.int8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_pages": "pages"}, "key_pages: expected a tensor"),
        ({"key_pages": torch.zeros(16, 2, 8)}, "key_pages: expected shape"),
        ({"key_pages": torch.zeros(4, 16, 2, 8, dtype=torch.int32)}, "key_pages: expected a floating dtype"),
        (
            {"key_pages": torch.zeros(4, 24, 2, 8), "value_pages": torch.zeros(4, 24, 2, 8)},
            "key_pages: expected page_size",
        ),
        ({"key_pages": torch.zeros(4, 16, 2, 16)[..., ::2]}, "key_pages: expected a last stride of 1"),
        ({"value_pages": torch.zeros(4, 16, 1, 8)}, "value_pages: expected (4, 16, 2)"),
        ({"value_pages": torch.zeros(4, 16, 2, 8).half()}, "value_pages: expected torch.float32"),
        ({"block_table": torch.zeros(3, 2)}, "block_table: expected an int32"),
        ({"block_table": torch.zeros(2, 2, dtype=torch.int32)}, "block_table: expected one row a sequence"),
        ({"block_table": torch.zeros(2, 3, dtype=torch.int32).T}, "block_table: expected a last stride of 1"),
        ({"cache_seqlens": torch.zeros(3)}, "cache_seqlens: expected an int32"),
        ({"cache_seqlens": torch.zeros(3, 1, dtype=torch.int32)}, "cache_seqlens: expected shape"),
        ({"key_scales": torch.ones(4, 16, 2)}, "key_scales: expected None"),
        (EIGHT, "key_scales: expected float32"),
        ({**EIGHT, "key_scales": torch.ones(4, 16)}, "key_scales: expected float32"),
        ({**EIGHT, "key_scales": torch.ones(4, 16, 2)}, "value_scales: expected float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_views_are_one_clear_line(change, message):
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        PagedKV(**{**GOOD, **change})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(4, 5, 3, 8)}, "k: expected"),
        ({"k": torch.zeros(4, 5, 3, 24).half()}, "k: expected the dtype"),
        ({"k": torch.zeros(4, 5, 3, 24).int()}, "k: expected a floating tensor"),
        ({"v": torch.zeros(4, 2, 3, 20)}, "v: expected (4, 5, 3)"),
        ({"k": torch.zeros(2, 5, 3, 24), "v": torch.zeros(2, 5, 3, 20)}, "k: expected 4 sequences"),
        ({"keys": torch.zeros(1)}, "keys: expected PagedKV"),
        ({"cu_seqlens_q": torch.zeros(5).int()}, "k: expected (total_q"),
        ({"k": torch.zeros(4, 5, 3, 24, requires_grad=True)}, "k: expected a tensor without gradients"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_tokens_are_one_clear_line(change, message):
    k, v = new_tokens(4, 5)
    terms = {"k": k, "v": v, "keys": view("paged"), **change}
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        append_kv(**terms)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_shared_scale_has_to_be_called_fixed():
    keys = view("paged", torch.int8)
    keys = replace(keys, key_scales=torch.ones(1, 1, 1).expand(20, 16, 3))
    with pytest.raises(ArgumentError, match=r"key_scales: .*fixed_scales=True"):
        append_kv(*new_tokens(4, 1), keys)
