"""Compile Hopper kernels without a GPU, exactly as a launch would, and read what ptxas says of them."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

#: bytes of shared memory one CTA may have on sm_90
SHARED_LIMIT = 232_448


class AbsentHopper:
    """A driver that only says what to compile for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 90

    def get_current_stream(self, device):
        return 0

    def get_device_interface(self):
        return torch.cuda


@dataclass(frozen=True)
class Compiled:
    """What matters of one compiled kernel. `warnings`: what ptxas said besides its statistics."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warnings: str
    ptx: str
    cubin: bytes

    @property
    def is_serialized(self) -> bool:
        """Whether ptxas made wgmma wait for each other (C7510 to C7520)."""
        return "wgmma" in self.warnings


def compile_launches(launch) -> list[Compiled]:
    """Run `launch()` with every kernel compiled for sm_90 instead of run."""
    kernels = []
    real_run = JITFunction.run

    def warmup(self, *args, grid, warmup, **kwargs):
        kernels.append(real_run(self, *args, grid=grid, warmup=True, **kwargs))

    previous = driver._active if hasattr(driver, "_active") else None
    driver.set_active(AbsentHopper())
    JITFunction.run = warmup
    try:
        launch()
    finally:
        JITFunction.run = real_run
        driver._active = previous
    return [_read(kernel) for kernel in kernels]


def ptxas_command(metadata) -> list[str]:
    """ptxas as Triton calls it for a launch; from 3.7 on it says how hard to allocate registers."""
    allocation = "--regAllocOptLevel=2"
    options = [allocation] if allocation in inspect.getsource(nvidia.CUDABackend) else []
    return [nvidia.get_ptxas(90).path, "-v", "-lineinfo", *options, *(metadata.ptx_options or "").split()]


def _read(kernel) -> Compiled:
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [*ptxas_command(kernel.metadata), "--gpu-name=sm_90a", str(source), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", said))
    warnings = "\n".join(line for line in said.splitlines() if "warning" in line or "wgmma" in line)
    return Compiled(kernel.metadata.name, registers, spills, kernel.metadata.shared, warnings, ptx, kernel.asm["cubin"])
