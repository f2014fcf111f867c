"""Compile portable kernels for a GPU that is not here, exactly as a launch would, and read what ptxas says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

#: bytes of shared memory one program may have
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}


class AbsentGPU:
    """A driver that only says which GPU to compile for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_device_interface(self):
        return torch.cuda


@dataclass(frozen=True)
class Compiled:
    """What matters of one compiled kernel."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str


def compile_launches(launch, arch: int) -> list[Compiled]:
    """Run `launch()` with every kernel of the portable package compiled for `arch` instead of run."""
    from triton.runtime.jit import JITFunction

    kernels = []
    real_run = JITFunction.run

    def warmup(self, *args, grid, warmup, **kwargs):
        kernels.append(real_run(self, *args, grid=grid, warmup=True, **kwargs))

    previous = driver._active if hasattr(driver, "_active") else None
    driver.set_active(AbsentGPU(arch))
    JITFunction.run = warmup
    try:
        launch()
    finally:
        JITFunction.run = real_run
        driver._active = previous
    return [_read(kernel, arch) for kernel in kernels]


def _read(kernel, arch: int) -> Compiled:
    ptx = kernel.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            get_ptxas(arch).path,
            "-v",
            f"--gpu-name={target}",
            str(source),
            "-o",
            str(Path(folder) / "kernel.cubin"),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", said))
    return Compiled(kernel.metadata.name, registers, spills, kernel.metadata.shared, ptx)


def tensors(
    head_dim: int,
    head_dim_v: int | None = None,
    dtype=torch.bfloat16,
    seqlen: int = 1024,
    heads: int = 16,
    kv_heads: int = 16,
):
    """q, k, v, out, lse of a typical shape, on the CPU: only their types and alignment matter."""
    q = torch.empty(1, seqlen, heads, head_dim, dtype=dtype)
    k = torch.empty(1, seqlen, kv_heads, head_dim, dtype=dtype)
    v = torch.empty(1, seqlen, kv_heads, head_dim_v or head_dim, dtype=dtype)
    out = torch.empty(1, seqlen, heads, head_dim_v or head_dim, dtype=dtype)
    return q, k, v, out, torch.empty(1, heads, seqlen)


__all__ = ["SHARED_LIMIT", "Compiled", "compile_launches", "tensors", "triton"]
