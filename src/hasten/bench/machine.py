"""What this machine is: devices, drivers, versions, and the commit of these sources.

Called by the records and by `hasten doctor`. Every answer is None where there is nothing to say.
"""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

#: Packages whose versions change what hasten does or how fast.
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "flash-attn",
    "flash-attn-4",
    "matplotlib",
)


def describe() -> dict[str, str | None]:
    """Name -> what is here, in the order in which a reader wants it."""
    facts: dict[str, str | None] = {
        "hasten": package_version("hasten"),
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    facts |= {name: package_version(name) for name in PACKAGES}
    facts["torch"] = torch.__version__  # the metadata leaves the build out
    capability = torch.backends.cpu.get_cpu_capability()
    facts["CPU"] = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, {capability}"
    facts["CUDA"] = torch.version.cuda
    facts["ROCm"] = torch.version.hip
    facts["driver"] = driver_version()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        facts[f"GPU {number}"] = _gpu(number)
    return facts


def device_name(device: torch.device) -> str:
    """The name of a device as its maker gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    """The version of the NVIDIA driver, or None where there is none."""
    text = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return text.splitlines()[0].strip() if text else None


def package_version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit this package was loaded from, with "+changed" if its sources differ; None outside git."""
    folder = str(Path(__file__).parents[1])
    tracked = _output(["git", "-C", folder, "ls-files", "--error-unmatch", "__init__.py"])
    commit = _output(["git", "-C", folder, "rev-parse", "--short=12", "HEAD"])
    if not tracked or not commit:
        return None
    changed = _output(["git", "-C", folder, "status", "--porcelain", "."])
    return commit.strip() + ("+changed" if changed else "")


def _gpu(number: int) -> str:
    properties = torch.cuda.get_device_properties(number)
    memory, cores = properties.total_memory / 2**30, properties.multi_processor_count
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, compute capability {capability}, {memory:.0f} GiB, {cores} multiprocessors"


def _output(words: list[str]) -> str | None:
    """What a program prints, or None if it is not there or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
