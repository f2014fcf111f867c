"""Every shipped backward compiles for sm_90 without a GPU: wgmma in flight, few spills, shared memory within limits."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from triton import knobs

from hasten.masks import Causal, Full, Global, Padding, Window
from hasten.ops.call import Call
from hasten.ops.hopper import backward_launch, table
from hasten.ops.tiles import pieces
from tests.ops.hopper.compiling import SHARED_LIMIT, Compiled, compile_launches
from tests.ops.portable.compiling import tensors

pytestmark = pytest.mark.compiler

BOUNDS = torch.tensor([0, 500, 1024], dtype=torch.int32)
TERMS = {
    "full": {"mask": Full()},
    "causal": {"mask": Causal()},
    "window": {"mask": Window(128, 64)},
    "padded": {"mask": Causal() & Padding([1000])},
    "lists": {"mask": Window(64, 64) | Global((0,))},
    "softcap": {"mask": Causal(), "softcap": 20.0},
    "packed": {"mask": Causal(), "cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS},
    "deterministic": {"mask": Causal(), "deterministic": True},
    "pieces": {"mask": Window(32, 32) | Global((0,))},
    "lists deterministic": {"mask": Window(64, 64) | Global((0,)), "deterministic": True},
}
# Bytes that ptxas says it spills: scalars, written once a tile. In the loops over blocks, what is read or written
# there a thread and block: nothing, but for windows, lists and the soft cap, which need a few registers more.
MOST_SPILLED, MOST_IN_LOOP = 352, 16
MOST_SPILLED_WITH_PIECES = 768  # parts of the addresses that pieces store to, written once a program, read there alone
CASES = [
    *[(head_dim, terms) for head_dim in (64, 256) for terms in ("full", "causal", "softcap")],
    *[(128, terms) for terms in TERMS],
    *[(head_dim, terms) for head_dim in (64, 256) for terms in ("lists", "pieces")],
]


def compiled(head_dim: int, terms: str, kv_heads: int = 16, dtype: torch.dtype = torch.bfloat16) -> dict[str, Compiled]:
    """The kernels of one backward by name."""
    q, k, v, out, lse = tensors(head_dim, kv_heads=kv_heads, dtype=dtype)
    if terms == "packed":
        q, k, v, out, lse = (tensor[0] for tensor in (q, k, v, out, lse))
    call = Call(softmax_scale=head_dim**-0.5, max_seqlen_q=1024, max_seqlen_k=1024, **TERMS[terms])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward_launch, "num_multiprocessors", lambda device: 132)
        if terms == "pieces":
            patch.setattr(pieces, "_FEWEST", 2)
        kernels = compile_launches(lambda: backward_launch.backward(out, None, q, k, v, out, lse, call))
    return {kernel.name: kernel for kernel in kernels}


def loops(kernel: Compiled, folder: Path) -> list[list[str]]:
    """The instructions of the two innermost loops with wgmma: one for each warpgroup."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.cubin)
    said = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", path], capture_output=True, text=True, check=True).stdout
    lines, labels, found = said.splitlines(), {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], number) < number:
            body = lines[labels[jump[1]] : number]
            if any("HGMMA" in text for text in body):
                found.append(body)
    return sorted(found, key=len)[:2]


@pytest.mark.parametrize(("head_dim", "terms"), CASES, ids=str)
def test_shipped_kernels_neither_spill_nor_overflow_nor_serialize(head_dim: int, terms: str, tmp_path: Path) -> None:
    kernels = compiled(head_dim, terms)
    names = {"backward_before", "attention_backward", "backward_after"}
    assert kernels.keys() == names | ({"add_pieces"} if terms == "pieces" else set())
    main = kernels.pop("attention_backward")
    assert main.shared_bytes <= SHARED_LIMIT
    assert not main.is_serialized, main.warnings
    most = MOST_SPILLED_WITH_PIECES if terms == "pieces" else MOST_SPILLED
    assert main.spill_bytes <= most, f"{main.spill_bytes} bytes spilled"
    bodies = loops(main, tmp_path)
    assert len(bodies) == 2
    for body in bodies:
        local = sum("LDL" in line or "STL" in line for line in body)
        assert local <= (0 if terms in ("full", "causal", "packed", "padded") else MOST_IN_LOOP), local
    assert main.ptx.count("cp.reduce.async.bulk.tensor") >= 2
    for kernel in kernels.values():
        assert kernel.spill_bytes == 0, kernel.name


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_five_products_a_block_and_seven_above_128(head_dim: int) -> None:
    """wgmma of 64 rows, 16 deep, in the code of both warpgroups."""
    tile = table.backward_tile(1 << (head_dim - 1).bit_length(), True, False)
    main = compiled(head_dim, "causal")["attention_backward"]
    scores = 2 * (head_dim // 16)
    sums = 2 * (tile.block_m // 16)
    dq = 2 * (64 // 16)  # 128 keys in two parts; above 128, two pieces of 64 keys
    assert main.ptx.count("wgmma.mma_async") == 2 * (scores + sums + dq)


def test_float16_and_grouped_heads_compile_as_well() -> None:
    main = compiled(128, "causal", kv_heads=4, dtype=torch.float16)["attention_backward"]
    assert not main.is_serialized and main.spill_bytes <= MOST_SPILLED
    assert ".f16.f16" in main.ptx
