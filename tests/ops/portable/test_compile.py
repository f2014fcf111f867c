"""Every shipped tile compiles for sm_80, sm_90 and sm_100 without a GPU: no spills, shared memory within limits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from hasten.masks import Causal, Full, Global, Padding, Window
from hasten.ops.call import Call
from hasten.ops.portable import launch, table
from tests.ops.portable.compiling import SHARED_LIMIT, compile_launches, tensors

pytestmark = pytest.mark.compiler

LONGFORMER = Window(64, 64) | Global((0,))
TERMS = {
    "causal": {"mask": Causal()},
    "padded": {"mask": Causal() & Padding([1000])},
    "sinks": {"mask": Window(128, 0), "sinks": torch.empty(16)},
    "lists": {"mask": LONGFORMER},
    "bias": {"mask": Causal(), "bias": torch.empty(1, 16, 1024, 1024)},
    "alibi": {"mask": Causal(), "slopes": torch.empty(1, 16)},
    "softcap": {"mask": Full(), "softcap": 20.0},
    "dropout": {"mask": Causal(), "seed": torch.zeros(1, dtype=torch.int64), "dropout_p": 0.1},
}
# spills that were measured to be faster than the tiles without any: (arch, head_dim, kernel) -> most bytes
MEASURED_FASTER = {(90, 256, "attention_dkdv"): 512}
CASES = [
    *[(arch, head_dim, "causal") for arch in (80, 90, 100) for head_dim in (64, 128, 256)],
    *[(90, 64, name) for name in TERMS if name != "causal"],
    (80, 128, "lists"),
    (80, 64, "bias"),
    (90, 128, "lists"),
    (90, 128, "dropout"),
    (100, 128, "lists"),
]


@pytest.mark.parametrize(("arch", "head_dim", "terms"), CASES, ids=lambda value: str(value))
def test_shipped_tiles_neither_spill_nor_overflow(arch, head_dim, terms, monkeypatch):
    monkeypatch.setattr(launch, "limits", lambda device: table.Limits(arch, SHARED_LIMIT[arch]))
    q, k, v, out, lse = tensors(head_dim)
    call = Call(softmax_scale=head_dim**-0.5, max_seqlen_q=1024, max_seqlen_k=1024, **TERMS[terms])

    def launch_all():
        launch.forward(q, k, v, call)
        launch.backward(out, None, q, k, v, out, lse, call)

    kernels = compile_launches(launch_all, arch)
    expected = {"attention_forward", "attention_delta", "attention_dkdv", "attention_dq"}
    assert {kernel.name for kernel in kernels} == expected | ({"attention_dbias"} if "bias" in TERMS[terms] else set())
    for kernel in kernels:
        assert kernel.shared_bytes <= SHARED_LIMIT[arch], kernel.name
        allowed = MEASURED_FASTER.get((arch, head_dim, kernel.name), 0)
        assert kernel.spill_bytes <= allowed, f"{kernel.name}: {kernel.spill_bytes} bytes spilled"


def test_a_tile_that_is_too_large_is_seen_to_spill(monkeypatch):
    """The gate can fail."""
    monkeypatch.setattr(launch, "limits", lambda device: table.Limits(90, SHARED_LIMIT[90]))
    monkeypatch.setitem(table.TABLE, ("forward", 2, 128), {"plain": table.Tile(128, 64, 4, 3)})
    q, k, v, _, _ = tensors(128)
    call = Call(mask=Causal(), softmax_scale=1.0, max_seqlen_q=1024, max_seqlen_k=1024)
    assert compile_launches(lambda: launch.forward(q, k, v, call), 90)[0].spill_bytes > 0


@pytest.mark.parametrize("shared_bytes", [48 * 1024, 64 * 1024, 99 * 1024])
@pytest.mark.parametrize("key", table.TABLE, ids=str)
def test_tiles_are_made_to_fit_smaller_gpus(key, shared_bytes):
    phase, element_size, head_dim = key
    line = table.tile(phase, element_size, head_dim, "plain", table.Limits(80, shared_bytes))
    smallest = line.block_m == 16 or line.block_n == 32
    assert table.shared_need(phase, line, element_size, head_dim) <= shared_bytes or smallest
    assert line.block_m >= 16 and line.block_n % 32 == 0
