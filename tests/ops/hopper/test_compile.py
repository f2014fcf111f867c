"""Every shipped forward compiles for sm_90 without a GPU: wgmma in flight, no spills, shared memory within limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from hasten.masks import Causal, Full, Global, Mask, Padding, Window
from hasten.ops.call import Call
from hasten.ops.hopper import bridge, launch, table
from hasten.ops.tiles import as_band, pieces
from tests.ops.hopper.compiling import SHARED_LIMIT, Compiled, compile_launches

pytestmark = pytest.mark.compiler

BOUNDS = torch.tensor([0, 500, 1024], dtype=torch.int32)
TERMS = {
    "full": {"mask": Full()},
    "causal": {"mask": Causal()},
    "window": {"mask": Window(128, 64)},
    "padded": {"mask": Causal() & Padding([1000])},
    "lists": {"mask": Window(64, 64) | Global((0,))},
    "pieces": {"mask": Window(32, 32) | Global((0,)), "sinks": torch.empty(16)},
    "packed": {"mask": Window(128, 0), "cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS},
    "rich": {"mask": Causal(), "softcap": 20.0, "sinks": torch.empty(16)},
}
LINES = {"64": (64, table.D64), "64 long": (64, table.D64_TALL), "128": (128, table.D128), "256": (256, table.D256)}
# Scalars that ptxas keeps in memory though registers are left: written once an item, outside the loops over keys
# (but for head_dim 256 with masks, where a visit reads a few). None of D = 128, whose loops are the tightest, but for
# the entry of a packed item under Triton 3.9.
MOST_SPILLED = {"64": 0, "64 long": 256, "128": 0 if bridge.OPTIONS == {} else 96, "256": 288}


def compiled(line: table.Tile, head_dim: int, terms: str, dtype: torch.dtype = torch.bfloat16) -> Compiled:
    """The forward kernel of one line of the table."""
    shape = (1024, 16, head_dim) if terms == "packed" else (1, 1024, 16, head_dim)
    q, k, v = (torch.empty(shape, dtype=dtype) for _ in range(3))
    call = Call(softmax_scale=head_dim**-0.5, max_seqlen_q=1024, max_seqlen_k=1024, **TERMS[terms])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "num_multiprocessors", lambda device: 132)
        patch.setattr(launch, "forward_tile", lambda *choice: line)
        if terms == "pieces":
            patch.setattr(pieces, "_FEWEST", 2)
        kernel, *others = compile_launches(lambda: launch.forward(q, k, v, call))
    assert [(other.name, other.spill_bytes) for other in others] == [("merge_pieces", 0)] * (terms == "pieces")
    return kernel


DAILY = {("128", terms) for terms in TERMS} | {
    ("64", "causal"),
    ("64 long", "full"),
    ("256", "causal"),
    ("256", "lists"),
    ("256", "pieces"),
}
CASES = [
    pytest.param(name, terms, marks=() if (name, terms) in DAILY else pytest.mark.slow)  # 6 seconds of two cores each
    for name in LINES
    for terms in TERMS
    if (name, terms) != ("64 long", "pieces")  # lists never take that line
]


@pytest.mark.parametrize(("name", "terms"), CASES)
def test_shipped_kernels_neither_spill_nor_overflow_nor_serialize(name: str, terms: str) -> None:
    head_dim, line = LINES[name]
    kernel = compiled(line, head_dim, terms)
    assert kernel.name == "attention_forward"
    assert kernel.shared_bytes <= SHARED_LIMIT
    assert not kernel.is_serialized, kernel.warnings
    assert kernel.spill_bytes <= MOST_SPILLED[name], f"{kernel.spill_bytes} bytes spilled"
    products = head_dim // 16 + line.block_n // 16  # wgmma of one visit: Q K^T, then P V
    assert kernel.ptx.count("wgmma.mma_async") == line.consumers * (3 * products)
    assert "setmaxnreg" in kernel.ptx


def test_the_gate_sees_registers_that_do_not_suffice() -> None:
    line = replace(table.D64_TALL, consumer_registers=152, producer_registers=56)
    kernel = compiled(line, 64, "causal")
    assert kernel.is_serialized and kernel.spill_bytes > max(MOST_SPILLED.values())


@pytest.mark.parametrize(
    "head_dim", [96, pytest.param(40, marks=pytest.mark.slow), pytest.param(192, marks=pytest.mark.slow)]
)
def test_other_dims_ride_on_the_next_power_of_two(head_dim: int) -> None:
    line = table.forward_tile(max(64, 1 << (head_dim - 1).bit_length()), "full", 1024)
    kernel = compiled(line, head_dim, "causal", torch.float16)
    assert kernel.spill_bytes <= MOST_SPILLED["256"] and "f32.f16.f16" in kernel.ptx


@pytest.mark.parametrize(
    ("seqlen", "mask", "consumers"),
    [
        (1024, Full(), 2),
        (4096, Full(), 3),
        (4096, Causal(), 2),
        (16384, Causal(), 3),
        (16384, Window(511, 0), 2),
        (16384, Window(256, 256) | Global((0,)), 2),
    ],
)
def test_long_dense_sequences_take_three_consumers(seqlen: int, mask: Mask, consumers: int) -> None:
    band = as_band(mask)
    kind = table.kind_of(None if band is None else (band.left, band.right))
    assert table.forward_tile(64, kind, seqlen).consumers == consumers


def test_lengths_and_windows_do_not_compile_anew() -> None:
    from triton.runtime.jit import JITFunction

    compiled: list[object] = []
    real = JITFunction._do_compile

    def count(self: object, *args: object, **options: object) -> object:
        compiled.append(self)
        return real(self, *args, **options)

    def launch_all() -> None:
        for seqlen, heads, left in ((1, 1, 1), (16, 2, 16), (100, 3, 5), (101, 16, 64)):
            q, sinks = torch.empty(2, seqlen, heads, 64, dtype=torch.bfloat16), torch.empty(heads)
            mask = Window(left, None)  # with sinks: no other test compiles that
            call = Call(mask=mask, softmax_scale=1.0, max_seqlen_q=seqlen, max_seqlen_k=seqlen, sinks=sinks)
            launch.forward(q, q, q, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "num_multiprocessors", lambda device: 132)
        patch.setattr(JITFunction, "_do_compile", count)
        compile_launches(launch_all)
    assert len(compiled) == 1
