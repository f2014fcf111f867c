"""The decode kernels compile for sm_80, sm_90 and sm_100 without a GPU: no spills, shared memory, copies in flight."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from hasten.ops.decode_call import DecodeCall
from hasten.ops.kv import PagedKV
from hasten.ops.portable import decode_launch, table
from tests.ops.portable.compiling import SHARED_LIMIT, Compiled, compile_launches

pytestmark = pytest.mark.compiler
BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
# arch, head_dim, group_size, queries, dtype of the cache, shared prefix, and dtype of queries over 8 bits
CASES = [
    (80, 128, 4, 1, BF16, 0),
    (80, 256, 32, 1, INT8, 0),
    (90, 64, 1, 1, BF16, 0),
    (90, 128, 4, 1, BF16, 4096),
    (90, 128, 32, 1, BF16, 0),
    (90, 256, 4, 1, BF16, 4096),
    (90, 128, 4, 64, BF16, 0),
    (90, 128, 4, 1, FP8, 0),
    (90, 128, 4, 1, INT8, 0, torch.float16),
    (90, 128, 32, 1, INT8, 0, torch.float16),
    (80, 256, 32, 1, INT8, 0, torch.float16),
    (90, 128, 4, 64, INT8, 0, torch.float16),
    (90, 128, 4, 1, FP8, 4096, torch.float16),
    (90, 64, 1, 1, INT8, 0, torch.float16),
    (90, 128, 8, 1, torch.float32, 0),
    (90, 256, 16, 4, BF16, 0),
    (100, 128, 16, 4, BF16, 0),
    (100, 128, 4, 64, BF16, 0),
]


def compiled(
    arch: int, head_dim: int, group: int, queries: int, dtype: torch.dtype, prefix: int, wide: torch.dtype = BF16
) -> list[Compiled]:
    """Both kernels of a call over a paged cache, split into groups of units."""
    pages = torch.empty(1024, 16, 8, head_dim, dtype=dtype)
    scales = torch.empty(pages.shape[:3]) if dtype in (INT8, FP8) else None
    batch = 64 if prefix else 2
    ints = (torch.empty(batch, 512, dtype=torch.int32), torch.empty(batch, dtype=torch.int32))
    keys = PagedKV(pages, torch.empty_like(pages), *ints, scales, scales)
    q = torch.empty(batch, queries, 8 * group, head_dim, dtype=wide if scales is not None else dtype)
    call = DecodeCall(softmax_scale=0.1, max_seqlen_q=queries, right=0, shared_prefix=prefix)
    plan = decode_launch.plan_for(q, keys, call)
    if plan.units:
        plan = replace(plan, units=decode_launch.GROUP, prefix_units=decode_launch.GROUP if prefix else 0)
    return compile_launches(lambda: decode_launch.forward(q, keys, call, plan), arch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part) for part in case))
def test_shipped_tiles_neither_spill_nor_overflow(case, monkeypatch):
    arch = case[0]
    monkeypatch.setattr(decode_launch, "limits", lambda device: table.Limits(arch, SHARED_LIMIT[arch]))
    kernels = compiled(*case)
    merge = {"decode_merge"} if case[3] <= decode_launch.MOST_SPLIT else set()
    assert {kernel.name for kernel in kernels} == {"decode_part"} | merge
    for kernel in kernels:
        assert kernel.spill_bytes == 0 and kernel.shared_bytes <= SHARED_LIMIT[arch], kernel
    ends = [("griddepcontrol.launch_dependents", "decode_part"), ("griddepcontrol.wait", "decode_merge")]
    for instruction, name in ends if len(kernels) > 1 else []:
        assert any(instruction in kernel.ptx for kernel in kernels if kernel.name == name) == (arch >= 90)
    if case[4] == BF16:
        assert all("cp.async.cg.shared.global" in kernel.ptx for kernel in kernels if kernel.name == "decode_part")


def test_keys_of_a_page_table_are_fetched_ahead(monkeypatch):
    """While one tile is computed, copies of the next are in flight: a wait that lets none pending would show as 0."""
    monkeypatch.setattr(decode_launch, "limits", lambda device: table.Limits(90, SHARED_LIMIT[90]))
    ptx = compiled(90, 128, 4, 1, BF16, 0)[0].ptx
    assert max(int(count, 0) for count in re.findall(r"cp\.async\.wait_group\s+(\w+);", ptx)) >= 4


@pytest.mark.parametrize("shared_bytes", [48 * 1024, 64 * 1024, 99 * 1024])
@pytest.mark.parametrize("key", decode_launch.TABLE, ids=str)
def test_tiles_are_made_to_fit_smaller_gpus(key, shared_bytes):
    line = decode_launch.tile_for(*key, 16, True, table.Limits(86, shared_bytes))
    assert 1 <= line.num_stages <= decode_launch.TABLE[key].num_stages
    assert 2 * line.block_n * key[0] * key[1] * line.num_stages <= max(shared_bytes, 2 * line.block_n * key[0] * key[1])
